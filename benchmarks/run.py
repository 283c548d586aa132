"""Run the benchmarks, each in a process of its own: ``python benchmarks/run.py [NAME ...]``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = (
    "harness_overhead",
    "same_model",
    "pass_scaling",
    "ort_static",
    "ort_options",
    "torch_memory",
    "overhead",
    "quantization",
    "hard_models",
    "peers",
    "partition",
    "pipeline_throughput",
    "vit_huge",
)
ARGUMENTS = {"peers": ("--short",)}


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all, and return how many claims did not hold."""
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        sys.exit(f"unknown benchmark {', '.join(unknown)} (there are {', '.join(NAMES)})")
    failed = []
    for name in names or NAMES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        if subprocess.run([sys.executable, FOLDER / f"{name}.py", *ARGUMENTS.get(name, ())], check=False).returncode:
            failed.append(name)
    subprocess.run([sys.executable, str(FOLDER / "readme.py")], check=True)
    print(f"did not hold: {', '.join(failed)}" if failed else "every claim held", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
