"""What goes wrong outside optc is one line; what can only be a bug is not hidden."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optc.cli.failures import in_one_line

Command = Callable[..., Any]
LONG = "a" * 300
CODE = """
import sys
import torch
from torch import nn

class Leaves(nn.Linear):
    def forward(self, x):
        sys.exit(0)

def leaves():
    return Leaves(3, 3), (torch.randn(1, 3),)

def fine():
    return nn.Linear(3, 3), (torch.randn(1, 3),)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "failing.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("failing", None)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("optimize", "failing:fine", "-o", LONG), LONG),
        (("optimize", "failing:fine", "-o", f"{LONG}/out"), LONG),
        (("optimize", "failing:fine", "--weights", f"{LONG}.pt"), f"{LONG}.pt"),
        (("optimize", "failing:fine", "--data", LONG), LONG),
        (("optimize", "failing:fine", "--report", f"{LONG}.md"), f"{LONG}.md"),
        (("partition", "failing:fine", "-o", LONG), LONG),
        (("profile", LONG, "--against", "none"), LONG),
        (("profile", "failing:fine", "-o", LONG), LONG),
        (("compare", "failing:fine", LONG), LONG),
        (("explain", LONG), LONG),
    ],
)
def test_a_name_too_long_is_one_line(arguments: tuple[str, ...], name: str, command: Command, folder: Path) -> None:
    done = command(*arguments, *(["-q"] if arguments[0] != "explain" else []))
    assert done.returncode == 2
    assert done.stderr.startswith("optc: ")
    assert name in done.stderr
    assert "File name too long" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["optimize", "partition", "profile"])
@pytest.mark.parametrize(
    ("output", "reason"), [("failing.py/x", "failing.py': Not a directory"), ("/proc/x", "'/proc': No such file")]
)
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_looked_for(
    name: str, output: str, reason: str, command: Command, folder: Path
) -> None:
    done = command(name, "no-such-model", "-o", output)
    assert done.returncode == 2
    assert f"cannot write '{output}': " in done.stderr
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["failing.py"]


@pytest.mark.parametrize("option", [("--backend", "nope"), ("-O", "onnxruntime.spin_us=-3")])
def test_a_backend_is_refused_before_the_model_is_looked_for(
    option: tuple[str, str], command: Command, folder: Path
) -> None:
    done = command("optimize", "no-such-model", *option, "-q")
    assert done.returncode == 2
    assert "unknown backend 'nope'" in done.stderr or "option onnxruntime.spin_us='-3'" in done.stderr


def test_a_model_that_ends_the_process_does_not_end_it_well(command: Command, folder: Path) -> None:
    done = command("optimize", "failing:leaves", "--no-measure", "--backend", "eager", "-q", "-o", "out")
    assert done.returncode == 2
    assert "sys.exit(0)" in done.stderr or "SystemExit" in done.stderr
    assert not (folder / "out").exists()


@pytest.mark.parametrize(("name", "what"), [("folder.pt2", "is a folder"), ("nothing.pt2", "does not exist")])
def test_what_is_no_model_file_is_told_how_to_mend_it(name: str, what: str, command: Command, folder: Path) -> None:
    (folder / "folder.pt2").mkdir()
    done = command("optimize", name, "-q")
    assert done.returncode == 2
    assert done.stderr == f"optc: model file '{name}' {what} — give a file that torch.export.save wrote\n"


def test_memory_that_is_not_there_is_one_line() -> None:
    for allocate in (lambda: torch.empty(10**16), lambda: np.empty(10**16)):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            allocate()
        assert in_one_line(caught.value) == "not enough memory — give a smaller --batch, or use a machine with more"


def test_a_bug_is_not_told_as_the_users_mistake() -> None:
    for error in (RuntimeError("shapes differ"), OSError("no file named"), AssertionError(), KeyError("x")):
        assert in_one_line(error) is None


def test_shells_are_given_completions() -> None:
    command = [sys.executable, "-c", "from optc.cli.main import main; main()"]
    environment = {**os.environ, "_OPTC_COMPLETE": "bash_source"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "complete" in done.stdout
