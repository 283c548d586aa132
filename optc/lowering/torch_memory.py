"""What PyTorch frees on the CPU stays with the process, for the next call."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache

import torch
from pydantic import Field

from optc.lowering.backend import BackendOptions

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""``mallopt``'s parameters, as ``malloc.h`` has them."""
KEPT_BYTES, MAPPED_BYTES = 2**31 - 1, 2**25
"""How much free memory stays with the process, and from which size on an allocation is a mapping of its own, which
goes back when it is freed: the most that glibc takes."""


class TorchOptions(BackendOptions):
    """Options of the backends that run PyTorch."""

    keep_memory: bool = Field(
        True,
        description="keep freed memory for the next call, in the whole process, in place of returning it to the"
        " operating system, for as long as the process lives (CPU, Linux)",
    )


def keep_freed_memory() -> None:
    """Have the allocator keep what is freed: 2 GiB at most, of allocations below 32 MiB.

    By its defaults glibc returns activations of some megabytes to the operating system as soon as they are freed, and
    each of their pages faults when the next call writes to it. That took eager ResNet-50 a sixth of its time at batch
    16, compiled ConvNeXt-T in int8 a third (``python benchmarks/torch_memory.py``; two cores, AMD Zen 5). Runtimes with
    pools of their own, such as ONNX Runtime and OpenVINO, do not have that. Only glibc has the setting; elsewhere
    nothing is done.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_MMAP_THRESHOLD, MAPPED_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, KEPT_BYTES)


def return_freed_memory() -> None:
    """Return what is free now to the operating system, and on a GPU to the other runtimes that use it."""
    torch.cuda.empty_cache()
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@lru_cache(maxsize=1)
def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
