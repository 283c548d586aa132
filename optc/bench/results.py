"""What a measurement says: per candidate its raw latencies and percentiles, and the comparison that was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optc.bench import statistics
from optc.bench.statistics import Percentiles, Ratio
from optc.bench.summary import LoadGenSummary
from optc.lowering.backend import Array, Runner
from optc.target import Target

EARLY_STOPPING_QUERIES = 64
"""What LoadGen's early-stopping criterion asks for at the 90th percentile. It judges each block by itself; a block of a
slow model is then "INVALID" in its account although all blocks together have enough."""
_UNSTEADY = 0.10
_ENOUGH_BLOCKS = 5


@dataclass(frozen=True)
class Candidate:
    """Something to measure.

    Attributes:
        precision: what its arithmetic is meant to run in; the opened runner's own word replaces it.
        quantized: whether weights or activations are quantized; the baseline is sought among those that are not.
        open: makes it ready to run; called whenever it is opened anew, and may raise (the reason is kept).
        bytes: memory its weights take while open, besides what is held anyway.
        inputs: queries to draw from, one array per model input each; empty for those given to the measurement.
        specialised: whether it is compiled for the batch size of ``inputs`` when it is opened.
        instead_of: the candidate that this is another way to run; that one stays unless this is shown to be faster.
    """

    name: str
    precision: str
    quantized: bool
    open: Callable[[], Runner]
    bytes: int = 0
    inputs: tuple[tuple[Array, ...], ...] = ()
    specialised: bool = False
    instead_of: str = ""


@dataclass(frozen=True)
class Block:
    """One LoadGen run: latencies inside the runner in ns, queries with NaN or infinite outputs, LoadGen's account."""

    latencies_ns: tuple[int, ...]
    nonfinite_queries: int
    loadgen: LoadGenSummary


@dataclass(frozen=True)
class CandidateResult:
    """What was found out about one candidate.

    Attributes:
        provider, precision: what really ran, as the runner tells.
        open_seconds: time to load or compile it.
        blocks: raw results, in the order measured; up to the failure if there was one.
        percentiles: over all blocks; ``None`` if nothing was measured.
        spread: how far the blocks' medians lie apart, as a share of their median; ``None`` likewise.
        error: why it did not open or failed; ``None`` if all went well.
        warnings: what to know before believing the numbers.
        instead_of: as of the candidate.
    """

    name: str
    provider: str
    precision: str
    quantized: bool
    open_seconds: float
    blocks: tuple[Block, ...]
    percentiles: Percentiles | None
    spread: float | None
    error: str | None
    warnings: tuple[str, ...]
    instead_of: str = ""

    @classmethod
    def of(
        cls,
        candidate: Candidate,
        provider: str,
        precision: str,
        open_seconds: float,
        blocks: tuple[Block, ...],
        error: str | None,
        warnings: Sequence[str] = (),
    ) -> CandidateResult:
        """The result of a candidate that delivered ``blocks`` and then perhaps failed with ``error``."""
        latencies = [block.latencies_ns for block in blocks]
        spread = statistics.block_spread(latencies) if blocks else None
        return cls(
            name=candidate.name,
            provider=provider,
            precision=precision,
            quantized=candidate.quantized,
            open_seconds=open_seconds,
            blocks=blocks,
            percentiles=statistics.percentiles(latencies) if blocks else None,
            spread=spread,
            error=error,
            warnings=(*_warnings(blocks, spread), *warnings),
            instead_of=candidate.instead_of,
        )

    @property
    def latencies_ns(self) -> list[tuple[int, ...]]:
        """Raw latencies, block by block."""
        return [block.latencies_ns for block in self.blocks]

    @property
    def nonfinite_queries(self) -> int:
        """How many queries returned NaN or infinity."""
        return sum(block.nonfinite_queries for block in self.blocks)


def _warnings(blocks: tuple[Block, ...], spread: float | None) -> list[str]:
    warnings = []
    if spread is not None and spread > _UNSTEADY:
        warnings.append(f"unsteady: the medians of its blocks lie {spread:.0%} apart")
    total = sum(len(block.latencies_ns) for block in blocks)
    broken = sum(block.nonfinite_queries for block in blocks)
    if broken:
        warnings.append(f"{broken} of {total} queries returned NaN or infinity")
    if blocks and total < EARLY_STOPPING_QUERIES:
        warnings.append(
            f"only {total} queries: LoadGen wants {EARLY_STOPPING_QUERIES} before it vouches for a 90th percentile"
        )
    return warnings


@dataclass(frozen=True)
class Measurement:
    """Candidates measured side by side, and how the optimized one compares.

    Attributes:
        results: one per candidate, in the order given.
        interleaved: whether the candidates' blocks took turns; ``sequential_reason`` says why not.
        optimized: the fastest of the optimized candidates; ``None`` if there was none.
        baseline: the fastest unquantized candidate besides the optimized ones; ``None`` if none was measured.
        ratio: median latency of ``optimized`` over that of ``baseline``; ``None`` if either is missing.
        warnings: what concerns all candidates.
    """

    results: tuple[CandidateResult, ...]
    device: str
    threads: int
    batch: int
    block_seconds: float
    interleaved: bool
    sequential_reason: str
    optimized: str | None
    baseline: str | None
    ratio: Ratio | None
    warnings: tuple[str, ...]

    def __getitem__(self, name: str) -> CandidateResult:
        """The result of the candidate of that name."""
        return next(result for result in self.results if result.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers, ready for JSON; raw latencies included."""
        return asdict(self)


def conclude(
    results: Sequence[CandidateResult],
    target: Target,
    optimized: Sequence[str],
    sequential_reason: str,
    block_seconds: float,
    warnings: Sequence[str],
) -> Measurement:
    """Find the baseline, compare the fastest optimized candidate with it, and put everything together."""
    interleaved = not sequential_reason
    unquantized = [result for result in results if not result.quantized and result.name not in optimized]
    baseline = fastest(unquantized, interleaved)
    subject = fastest([result for result in results if result.name in optimized], interleaved)
    ratio = None
    notes = list(warnings)
    if subject is not None and baseline is not None:
        ratio = statistics.ratio_of_medians(subject.latencies_ns, baseline.latencies_ns, interleaved=interleaved)
        pairs = min(len(subject.blocks), len(baseline.blocks))
        if pairs < _ENOUGH_BLOCKS:
            notes.append(f"only {pairs} blocks to compare: the confidence interval is wide")
        if interleaved and len(subject.blocks) != len(baseline.blocks):
            counts = f"{len(subject.blocks)} blocks of {subject.name} and {len(baseline.blocks)} of {baseline.name}"
            notes.append(f"medians are of {counts}, the ratio is of the {pairs} that took turns")
    return Measurement(
        results=tuple(results),
        device=target.device,
        threads=target.threads,
        batch=target.batch,
        block_seconds=block_seconds,
        interleaved=not sequential_reason,
        sequential_reason=sequential_reason,
        optimized=subject.name if subject else next(iter(optimized), None),
        baseline=baseline.name if baseline else None,
        ratio=ratio,
        warnings=tuple(notes),
    )


def fastest(results: Sequence[CandidateResult], interleaved: bool) -> CandidateResult | None:
    """The one with the lowest median latency, unless another is shown to be faster in the blocks that both have.

    Some are measured for more blocks than others, in which the machine may have been slower. What is another way to run
    one of them counts only if it is shown to be faster than that: of several that tie, one always seems to be. What
    returned NaN or infinity counts only where all did. ``None`` if none was measured without an error.
    """
    complete = [result for result in results if result.percentiles is not None and result.error is None]
    complete = [result for result in complete if not result.nonfinite_queries] or complete
    named = {result.name: result for result in complete}
    complete = [each for each in complete if _is_worth_its_options(each, named.get(each.instead_of), interleaved)]
    complete.sort(key=lambda result: result.percentiles.p50_ns if result.percentiles else math.inf)
    best = next(iter(complete), None)
    first: dict[int, CandidateResult] = {}
    for each in complete:  # of those with as many blocks as each other only the fastest can be kept
        first.setdefault(len(each.blocks), each)
    for other in first.values():
        if best is not None and interleaved and other is not best:
            ratio = statistics.ratio_of_medians(other.latencies_ns, best.latencies_ns, interleaved=True)
            best = other if ratio.outcome == "faster" else best
    return best


def _is_worth_its_options(result: CandidateResult, plain: CandidateResult | None, interleaved: bool) -> bool:
    if plain is None:
        return True
    ratio = statistics.ratio_of_medians(result.latencies_ns, plain.latencies_ns, interleaved=interleaved)
    return ratio.outcome == "faster"
