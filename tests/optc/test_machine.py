from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optc import machine as facts
from optc.machine import ISA_FLAGS, available_memory, driver_version, machine, total_memory, versions
from optc.threads import available_threads


def test_facts_agree_with_what_others_say() -> None:
    found = machine()
    assert found.cores == available_threads() <= len(os.sched_getaffinity(0))
    assert found.python == platform.python_version()
    assert (
        found.packages["torch"] == torch.__version__.partition("+")[0] or found.packages["torch"] == torch.__version__
    )
    assert 0 < available_memory() < total_memory() == found.memory_bytes
    assert found.load_average is not None
    assert found.load_average >= 0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets are read on x86 only")
def test_instruction_sets_agree_with_torch() -> None:
    isa = facts.isa()
    assert isa is not None
    assert set(isa) <= set(ISA_FLAGS)
    capability = torch.backends.cpu.get_cpu_capability()
    assert ("avx512f" in isa) or capability != "AVX512"
    assert ("avx2" in isa) or capability == "DEFAULT"


def test_a_cpu_is_read_from_its_first_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = [
        "cpu family\t: 25",
        "model\t\t: 17",
        "model name\t: Some CPU @ 2.0GHz",
        "flags\t\t: fpu avx2 amx_int8 avx512_bf16",
        "",
        "model name\t: Another",
    ]
    monkeypatch.setattr(facts, "_lines", lambda path: entry if path == "/proc/cpuinfo" else [])
    assert facts.cpu_name() == "Some CPU @ 2.0GHz (family 25 model 17)"
    assert facts.isa() == ("avx2", "avx512_bf16", "amx_int8")


def test_a_system_that_does_not_tell_is_not_guessed_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_lines", lambda path: [])
    assert facts.isa() is None
    assert facts.cpu_name()
    assert total_memory() > 0


def test_a_container_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {"/sys/fs/cgroup/memory.max": ["1000000"], "/sys/fs/cgroup/memory.current": ["400000"]}
    monkeypatch.setattr(facts, "_lines", lambda path: files.get(path, []))
    assert total_memory() == 1_000_000
    assert available_memory() == 600_000
    files["/sys/fs/cgroup/memory.stat"] = ["anon 300000", "inactive_file 50000"]
    assert available_memory() == 650_000, "files that were read are dropped when memory is asked for"
    files["/sys/fs/cgroup/memory.max"] = ["max"]
    assert total_memory() > 1_000_000


def test_only_installed_packages_have_versions() -> None:
    assert set(versions(["numpy", "no-such-package-anywhere"])) == {"numpy"}


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs)", "570.86.15"),
        ("", ""),
    ],
)
def test_the_gpu_driver_is_read_from_its_kernel_module(line: str, version: str) -> None:
    assert driver_version([line, "GCC version:  gcc version 12.3.0"]) == version


@pytest.mark.gpu
def test_with_a_gpu_cuda_and_its_driver_are_among_the_versions() -> None:
    packages = machine(gpus=True).packages
    assert packages["cuda"] == torch.version.cuda
    assert packages["nvidia-driver"]


def test_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from optc.machine import machine; m = machine();"
        "sys.exit(bool({'torch', 'numpy'} & set(sys.modules)) or m.gpus != ())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
