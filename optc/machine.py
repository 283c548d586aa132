"""Facts about the machine that measurements depend on, read without importing torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from optc.threads import available_threads

ISA_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
"""Instruction sets that decide how fast int8 and bf16 run, as Linux spells them."""
INT8_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8")
"""Those that add up products of 8 bits exactly, each as good as the others."""
BF16_FLAGS = ("avx512_bf16", "amx_bf16")
"""Those without which bfloat16 and float16 are emulated."""

PACKAGES = (
    "optc",
    "torch",
    "torchvision",
    "timm",
    "torchao",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "torch-tensorrt",
    "tensorrt",
    "mlcommons-loadgen",
    "numpy",
    "scipy",
)


@dataclass(frozen=True)
class Machine:
    """What a measurement ran on.

    Attributes:
        cpu: model name, with family and model number where the system tells them.
        isa: those of :data:`ISA_FLAGS` the CPU has; ``None`` where the system does not tell.
        cores: cores this process may use.
        memory_bytes: memory this process may use (the container's limit, if lower than the machine's).
        gpus: names of the CUDA devices; empty if there are none or nobody asked.
        system, python: operating system and interpreter.
        packages: installed versions of :data:`PACKAGES`; with GPUs also PyTorch's ``cuda`` and the ``nvidia-driver``.
        load_average: runnable processes over the last minute; ``None`` where the system does not tell.
    """

    cpu: str
    isa: tuple[str, ...] | None
    cores: int
    memory_bytes: int
    gpus: tuple[str, ...]
    system: str
    python: str
    packages: dict[str, str]
    load_average: float | None


def machine(*, gpus: bool | None = None) -> Machine:
    """Look at the machine.

    Args:
        gpus: ask torch for CUDA devices, importing it if need be; ``None`` asks only if torch is imported already.
    """
    found = _gpu_names() if gpus or (gpus is None and "torch" in sys.modules) else ()
    return Machine(
        cpu=cpu_name(),
        isa=isa(),
        cores=available_threads(),
        memory_bytes=total_memory(),
        gpus=found,
        system=platform.platform(),
        python=platform.python_version(),
        packages=versions(PACKAGES) | (_gpu_versions() if found else {}),
        load_average=load_average(),
    )


def cpu_name() -> str:
    """The CPU's model name, with family and model number on x86, or its architecture where the system does not tell.

    Clouds hide the name: two generations of one maker are told apart only by their numbers.
    """
    known = _cpuinfo()
    name = known.get("model name") or platform.processor() or platform.machine()
    family, model = known.get("cpu family"), known.get("model")
    return f"{name} (family {family} model {model})" if family and model else name


def isa() -> tuple[str, ...] | None:
    """Those of :data:`ISA_FLAGS` the CPU has; ``None`` where the system does not tell (not Linux on x86)."""
    present = cpu_flags()
    return None if present is None else tuple(flag for flag in ISA_FLAGS if flag in present)


def emulates_bf16(isa: Iterable[str] | None) -> bool:
    """Whether a CPU with these of :data:`ISA_FLAGS` converts bfloat16 to float32 for each operator; not if unknown."""
    return isa is not None and set(isa).isdisjoint(BF16_FLAGS)


def saturates_int8(isa: Iterable[str] | None) -> bool:
    """Whether a CPU with these of :data:`ISA_FLAGS` adds pairs of int8 products in 16 bits; not if unknown."""
    return isa is not None and set(isa).isdisjoint(INT8_FLAGS)


def cpu_flags() -> frozenset[str] | None:
    """All features the CPU has, as Linux spells them; ``None`` where the system does not tell (not Linux on x86)."""
    flags = _cpuinfo().get("flags")
    return None if flags is None else frozenset(flags.split())


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those distributions that are installed, without importing them."""
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def total_memory() -> int:
    """Bytes of memory this process may use."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read_int("/sys/fs/cgroup/memory.max")
    return min(physical, limit) if limit else physical


def available_memory() -> int:
    """Bytes this process can still take without swapping: the machine's free memory, within the container's limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _read_int("/sys/fs/cgroup/memory.max"), _read_int("/sys/fs/cgroup/memory.current")
    if not limit or not used:
        return free
    entries = dict(line.split() for line in _lines("/sys/fs/cgroup/memory.stat"))
    cached = int(entries.get("inactive_file", 0))  # file contents that the kernel drops when memory is asked for
    return min(free, limit - used + cached)


def load_average() -> float | None:
    """Runnable processes, averaged over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is none."""
    entries: dict[str, str] = {}
    for line in _lines("/proc/cpuinfo"):
        if not line.strip():
            break
        key, _, value = line.partition(":")
        entries[key.strip()] = value.strip()
    return entries


def _gpu_names() -> tuple[str, ...]:
    try:
        import torch
    except ImportError:
        return ()
    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _gpu_versions() -> dict[str, str]:
    import torch

    return {"cuda": str(torch.version.cuda), "nvidia-driver": driver_version(_lines("/proc/driver/nvidia/version"))}


def driver_version(lines: Iterable[str]) -> str:
    """The version in the lines of ``/proc/driver/nvidia/version``; empty if there is none."""
    found = re.search(r"Module.*?\s(\d+(?:\.\d+)+)\s", next(iter(lines), ""))
    return found[1] if found else ""


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _read_int(path: str) -> int | None:
    """The integer a file holds; ``None`` if there is no such file or it says ``max``."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None
