"""Making a model ready with one tool, in a process of its own whose time and memory are measured.

``python -m tools.produce NAME TASK FOLDER`` is that process; :func:`produce` starts it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from command import watch

from optc.errors import one_line
from tools import PEERS
from tools.peer import Task

LIMIT_SECONDS = 3600.0
FACTS = "facts.json"
_QUIET = {"HF_HUB_OFFLINE": "1", "NNCF_CI": "1", "OLIVE_DISABLE_TELEMETRY": "1"}
"""No tool reports its use or asks a model hub."""


@dataclass(frozen=True)
class Production:
    """What making the model took.

    Attributes:
        seconds: wall time of the process, with its imports and building the model, which all tools have in common.
        own_seconds: of that, from the built model and the calibration images to the end.
        peak_bytes: largest sum of the resident sets of the process and all that it started.
        details: what the tool had to say.
        error: why it failed; ``None`` if it did not.
    """

    seconds: float = 0.0
    own_seconds: float = 0.0
    peak_bytes: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def produce(name: str, task: Task, folder: Path) -> Production:
    """Make the model ready in ``folder`` (made here); a failure is part of the answer."""
    folder.mkdir()
    try:
        PEERS[name].load().prepare()
    except Exception as error:
        return Production(error=one_line(error))
    task_text = json.dumps(asdict(task))
    # Empty caches: nobody profits from an earlier run.
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "XDG_CACHE_HOME": str(folder / "cache")}
    environment = {**os.environ, **_QUIET, **caches, "OMP_NUM_THREADS": str(task.threads)}
    watched = watch(
        [sys.executable, "-m", "tools.produce", name, task_text, str(folder)],
        cwd=Path(__file__).parents[1],
        environment=environment,
        output=folder / "log.txt",
        errors=subprocess.STDOUT,
        limit_seconds=LIMIT_SECONDS,
    )
    facts = folder / FACTS
    found = json.loads(facts.read_text()) if facts.exists() else {"error": watched.failure(folder / "log.txt")}
    return Production(watched.seconds, peak_bytes=watched.peak_bytes, **found)


def main(name: str, task_text: str, folder: Path) -> None:
    """Make the model ready and write down what it took."""
    import torch

    with contextlib.suppress(OSError):  # where memory runs out, this process goes and not the one that measures
        Path("/proc/self/oom_score_adj").write_text("1000")
    task = Task(**json.loads(task_text))
    torch.set_num_threads(task.threads)
    facts: dict[str, Any] = {}
    try:
        peer = PEERS[name].load()
        _ = task.loaded, task.calibration, task.queries
        start = time.perf_counter()
        facts["details"] = peer.produce(task, folder)
        facts["own_seconds"] = time.perf_counter() - start
    except Exception as error:
        import traceback

        traceback.print_exc()
        facts = {"error": one_line(error)}
    (folder / FACTS).write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
