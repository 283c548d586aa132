"""mypy agrees with public_api.py: what should type-check does, and what should not is caught."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow  # `make lint` checks the same file in the same way
def test_the_public_interface_is_typed_as_promised() -> None:
    # strict reports unused ignores too, so each ignored line is an error that mypy does find.
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        "tests/typing/public_api.py",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
