"""The most a machine can do, measured: matrix products per type, and memory and caches by size."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from optc.bench.disturbance import Watch

Work = tuple[Callable[[], object], float]
"""Something to repeat, and how much a call of it does (operations or bytes)."""

_SIDES = (512, 1024)
_SIZES = tuple(int(2**power) for power in range(18, 29, 2))
"""Bytes over all threads, 256 KiB to 256 MiB: from each core's cache to main memory."""
_ROUNDS = 5
_ROUND_SECONDS = 0.02


@dataclass(frozen=True)
class Peaks:
    """What matrix products and memory reach on this machine at best, with so many threads.

    Attributes:
        operations: by type (``"float32"``, ``"bfloat16"``, ``"int8"``), operations a second; a multiplication with an
            addition counts as two. A type that has no kernel is missing.
        bandwidth: (bytes, bytes a second) of touching that many bytes again and again, smallest first.
        measured: when, ISO 8601 in UTC.
        disturbed: what else was going on then, in plain words; empty if nothing was.
    """

    threads: int
    operations: dict[str, float]
    bandwidth: tuple[tuple[int, float], ...]
    measured: str = ""
    disturbed: str = ""

    def compute(self, kind: str) -> float:
        """Operations a second in a type; for one that was not measured those of float32."""
        return self.operations.get("int8" if kind == "int4" else kind, self.operations["float32"])

    def memory(self, size: float) -> float:
        """Bytes a second when ``size`` bytes take turns in the caches; between measured sizes on a straight line of
        logarithms, beyond them the nearest.
        """
        sizes, rates = np.log(np.array(self.bandwidth, np.float64)).T
        return float(np.exp(np.interp(np.log(max(size, 1.0)), sizes, rates)))

    def or_better(self, other: Peaks) -> Peaks:
        """These peaks, with those of ``other`` where they are higher."""
        operations = {
            kind: max(rate, other.operations.get(kind, 0.0))
            for kind, rate in (other.operations | self.operations).items()
        }
        rates = dict(other.bandwidth)
        bandwidth = tuple((size, max(rate, rates.get(size, 0.0))) for size, rate in self.bandwidth)
        return replace(self, operations=operations, bandwidth=bandwidth)


def measure_peaks(threads: int, measured: str = "") -> Peaks:
    """Measure this machine's CPU with ``threads`` threads; takes some four seconds.

    Each thread works for itself and the best of several short rounds counts, so that other load on the machine, which
    can only take away, takes little. Products are PyTorch's (oneDNN's and its BLAS'), of square matrices; memory is
    read (NumPy's maximum) and copied, and the faster of both counts.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Watch() as watch:
            operations = {
                kind: max(_best([make(side) for _ in range(threads)]) for side in _SIDES)
                for kind, make in _PRODUCTS.items()
                if _runs(make)
            }
            rates = [_bandwidth(size, threads) for size in _SIZES]
    finally:
        torch.set_num_threads(before)
    # What fits into a smaller cache is never slower: overhead per call is not the memory's.
    monotone = np.maximum.accumulate(rates[::-1])[::-1]
    bandwidth = tuple((size, float(rate)) for size, rate in zip(_SIZES, monotone, strict=True))
    return Peaks(threads, operations, bandwidth, measured, "; ".join(watch.warnings()))


def _product(dtype: torch.dtype) -> Callable[[int], Work]:
    def make(side: int) -> Work:
        a, b = torch.ones(side, side, dtype=dtype), torch.ones(side, side, dtype=dtype)
        out = torch.empty(side, side, dtype=dtype)
        return lambda: torch.mm(a, b, out=out), 2.0 * side**3

    return make


def _int8_product(side: int) -> Work:
    """oneDNN's product of unsigned by signed 8-bit integers, the kernel that PyTorch's quantized layers use."""
    onednn = torch.ops.onednn
    a = torch.ones(side, side, dtype=torch.uint8)
    packed = onednn.qlinear_prepack(torch.ones(side, side, dtype=torch.int8), [side, side])
    scale, zero = torch.ones(side), torch.zeros(side, dtype=torch.int64)

    def call() -> object:
        return onednn.qlinear_pointwise(
            a, 1.0, 0, packed, scale, zero, None, float(side), 0, torch.uint8, "none", [], ""
        )

    return call, 2.0 * side**3


_PRODUCTS: dict[str, Callable[[int], Work]] = {
    "float32": _product(torch.float32),
    "bfloat16": _product(torch.bfloat16),
    "int8": _int8_product,
}


def _runs(make: Callable[[int], Work]) -> bool:
    try:
        make(64)[0]()
    except (AttributeError, RuntimeError):  # this build of PyTorch has no such kernel
        return False
    return True


def _bandwidth(size: int, threads: int) -> float:
    count = size // threads // 4
    return max(_best([make(count) for _ in range(threads)]) for make in (_read, _copy))


def _read(count: int) -> Work:
    values = np.ones(count, np.float32)
    return values.max, 4.0 * count


def _copy(count: int) -> Work:
    source, destination = np.ones(count // 2, np.float32), np.empty(count // 2, np.float32)
    return lambda: np.copyto(destination, source), 4.0 * count


def _best(works: Sequence[Work]) -> float:
    """How much all works together do in a second, a thread each: the best of some rounds."""
    return max(_round(works) for _ in range(_ROUNDS))


def _round(works: Sequence[Work]) -> float:
    rates = [0.0] * len(works)
    start = threading.Barrier(len(works))

    def repeat(index: int) -> None:
        call, amount = works[index]
        call()
        start.wait()
        begin, calls, elapsed = time.perf_counter(), 0, 0.0
        while elapsed < _ROUND_SECONDS:
            call()
            calls += 1
            elapsed = time.perf_counter() - begin
        rates[index] = calls * amount / elapsed

    workers = [threading.Thread(target=repeat, args=(index,)) for index in range(len(works))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(rates)
