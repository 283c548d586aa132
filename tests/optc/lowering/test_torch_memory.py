"""Counts the page faults of real calls, in processes of their own: what is set holds for a whole process."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import optc
from optc.lowering.inductor import _run_script
from optc.lowering.torch_memory import KEPT_BYTES, MAPPED_BYTES, TorchOptions, _glibc

pytestmark = pytest.mark.skipif(_glibc() is None, reason="only glibc keeps freed memory when told to")

CALLS = 5
FAULTS = f"""
import json, resource, sys
import numpy as np
import optc

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({CALLS}):
        runner(images)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

images = np.zeros((16, 3, 128, 128), np.float32)
runner = optc.load(sys.argv[1])
faults()
during = min(faults() for _ in range(3))  # a block that finds no place among what is kept is new once
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = resident()
runner.close()
print(json.dumps({{"faults": during, "returned": before - resident()}}))
"""


class Branches(nn.Module):
    """Eight activations of 16 MB that are there at the same time: more than glibc keeps by its defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, 16, 1) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        return reduce(torch.maximum, [branch(x) for branch in self.branches])


def artifact(backend: str, folder: Path) -> Path:
    target = optc.Target(threads=1, batch=16, options={backend: {"keep_memory": True}})
    made = optc.optimize(
        Branches(), torch.randn(16, 3, 128, 128), "fuse", backend=backend, target=target, verify=False, measure=False
    )
    return made.save(folder / "kept")


def returning(kept: Path, backend: str) -> Path:
    """The same artifact with the option off, on which nothing that is compiled depends."""
    folder = Path(shutil.copytree(kept, kept.with_name("returned")))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["target"]["options"][backend]["keep_memory"] = False
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def ran(folder: Path) -> dict[str, int]:
    done = subprocess.run([sys.executable, "-c", FAULTS, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_activations_do_not_fault_in_again_at_each_call(backend: str, tmp_path: Path) -> None:
    folder = artifact(backend, tmp_path)
    kept, without = ran(folder), returning(folder, backend)
    # By chance a small block at the heap's end keeps all below it from being returned.
    assert any(kept["faults"] * 5 < ran(without)["faults"] for _ in range(4))
    assert kept["returned"] > 8 * 2**20, "closing returns what was kept"
    if backend == "inductor":
        assert (folder / "run.py").read_text() == _run_script(TorchOptions(keep_memory=True))


@pytest.mark.parametrize("keep", [True, False])
def test_the_run_script_keeps_what_the_backend_keeps(keep: bool, tmp_path: Path) -> None:
    text = _run_script(TorchOptions(keep_memory=keep))
    assert f"mallopt(-3, 2**{MAPPED_BYTES.bit_length() - 1})" in text
    assert "mallopt(-1, 2**31 - 1)" in text
    assert KEPT_BYTES == 2**31 - 1
    (tmp_path / "run.py").write_text(text)
    assert runpy.run_path(str(tmp_path / "run.py"))["KEEP_MEMORY"] is keep
