"""Olive: a recipe of its peephole optimizer and static int8 quantization, in a virtual environment of its own."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np

from optc import Runner
from tools.onnx_runtime import FILE, export, session_runner
from tools.peer import Peer, Task, int8_saturates

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements-olive.txt"


class OliveInt8(Peer):
    """Starts from the ONNX file that PyTorch exports, as Olive itself would let PyTorch export it."""

    def prepare(self) -> None:
        """Make Olive's environment."""
        olive_python()

    def produce(self, task: Task, folder: Path) -> dict[str, Any]:
        """Export, write the calibration images where Olive's process finds them, run the recipe."""
        source = folder / "source"
        source.mkdir()
        export(task, source / FILE)
        np.save(folder / "calibration.npy", np.stack([batch.numpy() for batch in task.calibration]))
        seven_bits = ["--reduce-range"] if int8_saturates() else []
        recipe = [olive_python(), HERE / "olive_recipe.py", source / FILE, folder, *seven_bits]
        done = subprocess.run(recipe, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return {}

    def load(self, task: Task, folder: Path) -> Runner:
        """A session over what Olive wrote."""
        return session_runner(next((folder / "output").rglob("*.onnx")), task, "int8")


def olive_python() -> Path:
    """The interpreter of Olive's environment, which is made in ours when it is first asked for."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = Path(sys.prefix) / f"olive-{digest}"
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", REQUIREMENTS], check=True
        )
        done.touch()
    return python
