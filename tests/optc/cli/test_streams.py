"""``--json`` and standard output: real processes, whose children and native code write to it as well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from optc.cli.main import cli
from optc.cli.streams import stdout_to_stderr

NOISY = """
import ctypes, os
import torch
from torch import nn

def noisy():
    print("python noise")
    os.system("echo child noise")
    ctypes.CDLL(None).printf(b"native noise\\n")
    return nn.Linear(3, 3), (torch.randn(1, 3),)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "noisy_model.py").write_text(NOISY)
    return tmp_path


def optimize(folder: Path, redirection: str = "") -> subprocess.CompletedProcess[str]:
    command = "optimize noisy_model:noisy --passes fuse --backend eager --no-measure --threads 1 --json -q -o out"
    line = f"exec {sys.executable} -m optc.cli.main {command} {redirection}"
    return subprocess.run(line, shell=True, capture_output=True, text=True, cwd=folder, check=False)


def test_what_children_and_native_code_print_goes_to_stderr(folder: Path) -> None:
    done = optimize(folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["artifact"] == "out"
    assert all(f"{who} noise" in done.stderr for who in ("python", "child", "native"))


def test_a_closed_stdout_is_no_error(folder: Path) -> None:
    done = optimize(folder, ">&-")
    assert (done.returncode, done.stdout) == (0, "")
    assert "Traceback" not in done.stderr
    assert (folder / "out" / "manifest.json").exists()


def test_json_is_where_clicks_runner_looks_for_it() -> None:
    done = CliRunner().invoke(cli, ["passes", "--json"], standalone_mode=False)
    assert done.exit_code == 0
    assert {"fuse", "quant"} <= {each["name"] for each in json.loads(done.stdout)}


def test_the_file_descriptor_is_as_it_was_even_if_something_fails(capfd: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        os.system("echo within")
        print("printed")
        raise KeyError

    with pytest.raises(KeyError), stdout_to_stderr():
        fails()
    os.system("echo after")
    captured = capfd.readouterr()
    assert captured.out == "after\n"
    assert sorted(captured.err.split()) == ["printed", "within"]


@pytest.mark.parametrize("options", ["", "--json"])
def test_a_reader_that_has_seen_enough_is_no_error(options: str) -> None:
    line = f"set -o pipefail; {sys.executable} -m optc.cli.main passes {options} | true"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
