"""The process of :mod:`optc.bench.memory`: loads one model, answers a few queries, prints what that took, and ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from optc.lowering.backend import Array
from optc.target import Target

QUERIES = 3


def main(asked: dict[str, Any]) -> dict[str, int | None]:
    """Load and run what is asked for; returns sizes in bytes, named as in :class:`optc.bench.memory.Memory`."""
    target, folder, files = Target(**asked["target"]), Path(asked["folder"]), tuple(asked["files"])
    query = [np.zeros(shape, _numpy_name(dtype)) for shape, dtype in asked["inputs"]]
    load = _loader(asked["backend"], folder, files, target)
    free = _device_free(target)
    runtime = _status("VmRSS")
    _reset_peak()
    run = load()
    load_peak, loaded = _status("VmHWM"), _status("VmRSS")
    _reset_peak()
    for _ in range(QUERIES):
        run(*query)
    query_peak = _status("VmHWM")
    device = None if free is None else free - (_device_free(target) or 0)
    return {
        "runtime": runtime,
        "load_peak": load_peak,
        "loaded": loaded,
        "query_peak": query_peak,
        "device": device,
    }


def _loader(backend: str, folder: Path, files: tuple[str, ...], target: Target) -> Callable[[], Callable[..., object]]:
    """Import what the backend needs; returns what loads the model."""
    if backend == "captured":
        import torch

        from optc.lowering.graph_file import read_graph

        torch.set_num_threads(target.threads)

        def load() -> Callable[..., object]:
            program = read_graph(folder, target.batch, target.device)

            def run(*query: Array) -> object:
                with torch.inference_mode():
                    tensors = map(torch.from_numpy, query)
                    return program.run(*(new.to(old) for new, old in zip(tensors, program.example_inputs, strict=True)))

            return run

        return load
    from optc.plugins.registry import registry

    made = registry().load("backend", backend)()
    return lambda: made.load(folder, files, target)


def _numpy_name(dtype: str) -> str:
    """Runners take float32 for what numpy has not."""
    return "float32" if dtype.startswith(("bfloat", "float8")) else dtype


def _device_free(target: Target) -> int | None:
    if target.device != "cuda":
        return None
    import torch

    return torch.cuda.mem_get_info()[0]


def _status(name: str) -> int:
    """A size that Linux keeps of this process: ``VmRSS`` now, ``VmHWM`` the most since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def _reset_peak() -> None:
    """Let Linux forget the peak so far (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
