"""The cut that makes the slowest stage as fast as it can be, exact over one order of the nodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
_EXACT = 1e-12
"""Relative width at which the bisection ends: a few times the rounding of a sum."""


@dataclass(frozen=True)
class Chain:
    """Units of work in a row, to be cut into consecutive stages; cut ``c`` lies before unit ``c``.

    Attributes:
        seconds: (stages, units), how long each unit takes on each stage's device.
        transfer: (stages - 1, units + 1), how long handing on everything alive at a cut takes between a stage and the
            next; infinite where the chain cannot be cut.
        earliest: (stages, units + 1), for a stage that ends at a cut the earliest one that it may begin at for all it
            holds to fit into its device; never falls along the units.
    """

    seconds: Floats
    transfer: Floats
    earliest: Integers

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.seconds)

    @property
    def units(self) -> int:
        """Number of units."""
        return int(self.seconds.shape[1])

    def stage_seconds(self, cuts: tuple[int, ...]) -> list[float]:
        """How long each stage is busy for one microbatch: what comes in, its units, what goes out."""
        ends = (0, *cuts, self.units)
        incoming = (0.0, *(float(self.transfer[stage, cut]) for stage, cut in enumerate(cuts)))
        outgoing = (*incoming[1:], 0.0)
        return [
            incoming[stage] + float(self.seconds[stage, ends[stage] : ends[stage + 1]].sum()) + outgoing[stage]
            for stage in range(self.stages)
        ]


@dataclass(frozen=True)
class Cut:
    """Where the stages but the first begin, and how long the slowest stage is busy."""

    cuts: tuple[int, ...]
    slowest: float


def cut(chain: Chain) -> Cut | None:
    """The cut whose slowest stage is the fastest; ``None`` if no cut keeps every stage within its memory.

    Parametric search: a bound is bisected, and whether a cut keeps within it is decided by dynamic programming over
    (stage, cut): with P the running sum of a stage's seconds, stage s may end at j within T if some i in the memory's
    window was reached by stage s - 1 and has P[i] - transfer_in[i] >= P[j] + transfer_out[j] - T. The best i is a
    maximum over a window whose ends only move forward, looked up in a sparse table: O(k n log n) for a bound with k
    stages and n units, O(k n) where no device has a limit. Each bound that holds is replaced by the slowest stage of
    the cut it found, so about 40 of them settle the optimum to the rounding of floating-point sums.

    Where the bound leaves a choice, what a stage receives is kept small, and after that the stages before it are given
    an even share.
    """
    search = _Search(chain)
    best = search.within(np.inf)
    if best is None:
        return None
    low = 0.0
    while best.slowest - low > _EXACT * best.slowest:
        middle = low + (best.slowest - low) / 2
        found = search.within(middle)
        if found is None:
            low = middle
        elif found.slowest < best.slowest:
            best = found
        else:
            break
    return best


class _Search:
    """What does not depend on the bound, computed once."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        stages, units = chain.stages, chain.units
        self._sums = np.zeros((stages, units + 1))
        np.cumsum(chain.seconds, axis=1, out=self._sums[:, 1:])
        self._incoming = np.full((stages, units + 1), np.inf)
        self._incoming[0, 0] = 0.0
        self._incoming[1:, 1:units] = chain.transfer[:, 1:units]
        self._outgoing = np.full((stages, units + 1), np.inf)
        self._outgoing[-1, units] = 0.0
        self._outgoing[:-1, 1:units] = chain.transfer[:, 1:units]
        self._ends = np.arange(units + 1)

    def within(self, bound: float) -> Cut | None:
        """Some cut whose every stage takes ``bound`` at most, if there is one."""
        chain = self._chain
        reached = [self._ends == 0]
        for stage in range(chain.stages):
            value = np.where(reached[-1], self._sums[stage] - self._incoming[stage], -np.inf)
            best = _window_maximum(value, chain.earliest[stage])
            reached.append((best > -np.inf) & self._keeps(best, stage, bound))
        if not reached[-1][-1]:
            return None
        cuts: list[int] = []
        end = chain.units
        for stage in range(chain.stages - 1, 0, -1):
            end = self._begin(reached[stage], stage, end, bound)
            cuts.append(end)
        found = tuple(reversed(cuts))
        return Cut(found, max(chain.stage_seconds(found)))

    def _keeps(self, value: Floats, stage: int, bound: float, end: int | None = None) -> NDArray[np.bool_]:
        """Whether stages with ``value`` where they begin keep within the bound, ending anywhere or at ``end``."""
        sums, outgoing = self._sums[stage], self._outgoing[stage]
        if end is not None:
            sums, outgoing = sums[end], outgoing[end]
        if bound == np.inf:
            return np.broadcast_to(outgoing < np.inf, value.shape)
        within: NDArray[np.bool_] = value >= sums + outgoing - bound
        return within

    def _begin(self, reached: NDArray[np.bool_], stage: int, end: int, bound: float) -> int:
        """Where the stage that ends at ``end`` begins."""
        window = slice(int(self._chain.earliest[stage, end]), end)
        sums, incoming = self._sums[stage, window], self._incoming[stage, window]
        usable = reached[window] & (incoming < np.inf)
        usable &= self._keeps(sums - incoming, stage, bound, end)
        candidates = np.flatnonzero(usable)
        smallest = candidates[incoming[candidates] == incoming[candidates].min()]
        share = self._sums[stage, end] * stage / (stage + 1)
        return int(smallest[np.abs(sums[smallest] - share).argmin()]) + int(self._chain.earliest[stage, end])


def _window_maximum(value: Floats, earliest: Integers) -> Floats:
    """For each j the maximum of ``value[earliest[j]:j]``, minus infinity where that is empty."""
    result = np.full(len(value), -np.inf)
    if not earliest.any():
        np.maximum.accumulate(value[:-1], out=result[1:])
        return result
    ends = np.arange(len(value))
    length = ends - earliest
    table = [value]
    while 2 ** len(table) <= int(length.max()):
        half = 2 ** (len(table) - 1)
        table.append(np.maximum(table[-1][:-half], table[-1][half:]))
    level = np.frexp(np.maximum(length, 1))[1] - 1
    for each, row in enumerate(table):
        at = np.flatnonzero((level == each) & (length > 0))
        result[at] = np.maximum(row[earliest[at]], row[ends[at] - 2**each])
    return result
