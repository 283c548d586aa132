"""Measuring candidates against each other: interleaved blocks of LoadGen queries, every raw latency kept."""

from __future__ import annotations

import gc
import statistics as plain
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from optc import machine
from optc.bench import statistics
from optc.bench.disturbance import Watch, busy_warning
from optc.bench.loadgen import single_stream
from optc.bench.quiet import frozen_heap, quiet_machine, torch_threads
from optc.bench.results import Block, Candidate, CandidateResult, Measurement, conclude
from optc.errors import one_line
from optc.lowering.backend import Array, Runner
from optc.target import Target

MAX_QUERIES = 10_000
"""Most queries in a block: a model of microseconds is not to fill the manifest."""
FAR = {2: 1.5, 3: 1.25}
"""By a number of blocks how many times the fastest one's median an optimized candidate may have taken in each of them
at most to get more: where it is shown to be slower, they would only narrow the interval of a loser."""
SETTLING_BLOCKS, SETTLING_SECONDS = 12, 20.0
"""Most further blocks for optimized candidates that are not told apart from the fastest one, and most time for them."""
SETTLING_QUERIES = 3
"""Fewest queries in one of those, within :data:`STRETCH`; where a block holds fewer, twice the time: one disturbed
query is not to be all that is known of a block."""
WAYS_BLOCKS = 1
"""Further blocks that all ways to run one lowering get. Beyond them the fastest goes on against the one without
options: it replaces that only if shown to be faster, which on a noisy machine takes many blocks of the two."""
NEAR, NEAR_BLOCKS = 1.1, 3
"""Optimized candidates that took at most this many times the fastest one's median get this many further blocks even if
told apart: they are opened anew for those, and what tells them apart may be how one of them lay in memory."""
STRETCH = 5
"""How much longer than asked for a block may take to hold as many queries as asked for."""
STEADYING_BLOCKS = 20
"""Most blocks where a measurement goes on until it is steady."""
REOPEN_SECONDS = 2.0
"""Longest opening that is repeated for every block where candidates are opened anew."""
_MEMORY_SHARE = 0.2
"""Most of the free memory that candidates' weights may take together: runtimes hold packed copies besides, and what is
gained by taking turns matters least for models that large."""


def measure(
    candidates: Sequence[Candidate],
    inputs: Sequence[tuple[Array, ...]],
    target: Target,
    *,
    optimized: str | Sequence[str] = (),
    blocks: int = 5,
    block_seconds: float = 0.3,
    block_queries: int = 1,
    limit_seconds: float = 90.0,
    together: bool | None = None,
    reopen: bool = False,
    steady: float | None = None,
    steady_seconds: float = 8.0,
    logs: Callable[[str, int], Path] | None = None,
    watch_others: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Measurement:
    """Measure the latency of candidates so that they can be compared.

    Blocks of about ``block_seconds`` take turns (A B C A B C …), so that what slows the machine for a while slows all.
    Before each block come a pause and two warm-up calls (one, if a call takes longer than a block). All candidates run
    with ``target.threads`` threads, the garbage collector off during blocks. A candidate that does not open or fails
    in a block stays in the result, with the reason.

    Where several are ``optimized`` and take turns, those far behind the fastest of them get only the blocks that
    :data:`FAR` says, and those not told apart from it up to :data:`SETTLING_BLOCKS` further rounds, until their order
    is settled or the time is up. For those rounds they are opened anew, for each one or for as many as take as long as
    that does, and the ones :data:`NEAR` the fastest take part in the first few. Of several ways to run one of them only
    the fastest goes on against it after :data:`WAYS_BLOCKS`.

    Args:
        inputs: queries to draw from, one array per model input each, for candidates without inputs of their own.
        optimized: name or names of candidates; the fastest is compared with the best unquantized one of the others.
        blocks: rounds; fewer than five give intervals that are too narrow.
        block_queries: fewest queries in a block, where they take at most :data:`STRETCH` times ``block_seconds``.
        limit_seconds: after the first round the number of rounds is cut (to no fewer than two) to fit this; opening
            candidates does not count.
        together: keep all candidates open and interleave them. ``None`` decides by whether their weights fit into
            memory at once; otherwise they are opened and measured one after another, and the result says so.
        reopen: open each candidate anew for each of its blocks, and change their order from round to round. How a model
            happens to lie in memory, and what ran before it, changes its latency by more than blocks of one opening
            show, so that a model would differ from itself. A candidate that takes over :data:`REOPEN_SECONDS` to open
            stays open, and is warned of, unless their weights do not fit into memory at once.
        steady: go on beyond ``blocks`` rounds, to :data:`STEADYING_BLOCKS` at most, until each candidate's median is
            known to this share of it at 95 % confidence, or ``steady_seconds`` are over.
        logs: where LoadGen's logs of a candidate's block go, by its name and the block's number from 1.
        watch_others: look first whether other processes are at work, which may take half a second, and warn of it.
        progress: called with a short text before each step.

    Raises:
        KeyboardInterrupt: after closing what was open.
    """
    note = "" if together or reopen else _why_not_together(candidates, target) if together is None else "as asked"
    warnings = [warning] if watch_others and (warning := busy_warning()) else []
    names = (optimized,) if isinstance(optimized, str) else tuple(optimized)
    with torch_threads(target.threads), frozen_heap():
        states = [_State(candidate, logs) for candidate in candidates]
        plan = _Plan(inputs, blocks, block_seconds, block_queries, limit_seconds, steady, steady_seconds, progress)
        try:
            if reopen:
                plan.run(states, share=1, reopen=True, keeps_open=not _why_not_together(candidates, target))
            elif note:
                # The largest first, while the process is lean: compiling leaves memory behind that is not given back.
                for state in sorted(states, key=lambda state: -state.candidate.bytes):
                    state.open(progress)
                    plan.run([state], share=len(states))
                    state.close()
            else:
                for state in states:
                    state.open(progress)
                contenders = [state for state in states if state.candidate.name in names]
                plan.run(states, share=1, contenders=contenders)
                plan.settle(contenders)
        finally:
            for state in states:
                state.close()
    return conclude([state.result() for state in states], target, names, note, block_seconds, warnings)


class _State:
    """One candidate on its way: opened, measured block by block, closed."""

    def __init__(self, candidate: Candidate, logs: Callable[[str, int], Path] | None) -> None:
        self.candidate, self.logs = candidate, logs
        self.runner: Runner | None = None
        self.provider, self.precision = "", candidate.precision
        self.open_seconds = 0.0
        self.error: str | None = None
        self.blocks: list[Block] = []
        self.kept_open = ""
        self.watch = Watch()
        self.call_seconds = 0.0

    def open(self, progress: Callable[[str], None]) -> None:
        progress(f"opening {self.candidate.name}")
        start = time.perf_counter()
        try:
            self.runner = self.candidate.open()
        except Exception as error:
            self.error = one_line(error)
            return
        self.open_seconds = max(self.open_seconds, time.perf_counter() - start)
        self.provider, self.precision = self.runner.provider, self.runner.precision

    def close(self) -> None:
        runner, self.runner = self.runner, None
        try:
            if runner is not None:
                runner.close()
        except Exception as error:
            self.error = self.error or f"closing it failed: {one_line(error)}"
        del runner
        gc.collect()

    def block(self, inputs: Sequence[tuple[Array, ...]], seconds: float, least: int) -> None:
        """Warm up, then one LoadGen run of about ``seconds``; a failure closes the candidate and is kept."""
        if self.runner is None:
            return
        inputs = self.candidate.inputs or inputs
        try:
            with quiet_machine():
                self._warm_up(self.runner, inputs[0], seconds)
                queries = min(MAX_QUERIES, max(1, round(seconds / self.call_seconds)))
                if least * self.call_seconds <= STRETCH * seconds:
                    queries = max(queries, least)
                folder = self.logs(self.candidate.name, len(self.blocks) + 1) if self.logs else None
                with self.watch:
                    run = single_stream(self.runner, inputs, queries, name=self.candidate.name, log_folder=folder)
        except Exception as error:
            self.error = one_line(error)
            self.close()
            return
        self.blocks.append(Block(tuple(run.latencies_ns.tolist()), run.nonfinite_queries, run.summary))
        self.call_seconds = plain.median(self.blocks[-1].latencies_ns) / 1e9

    def _warm_up(self, runner: Runner, inputs: tuple[Array, ...], seconds: float) -> None:
        calls: list[float] = []
        while len(calls) < 2 and sum(calls) < seconds:
            start = time.perf_counter()
            runner(*inputs)
            calls.append(time.perf_counter() - start)
        self.call_seconds = self.call_seconds or max(min(calls), 1e-7)

    def result(self) -> CandidateResult:
        return CandidateResult.of(
            self.candidate,
            self.provider,
            self.precision,
            self.open_seconds,
            tuple(self.blocks),
            self.error,
            [*filter(None, [self.kept_open]), *self.watch.warnings()],
        )


class _Plan:
    """How many rounds of how long, within the time limit."""

    def __init__(
        self,
        inputs: Sequence[tuple[Array, ...]],
        blocks: int,
        block_seconds: float,
        block_queries: int,
        limit_seconds: float,
        steady: float | None,
        steady_seconds: float,
        progress: Callable[[str], None],
    ) -> None:
        self.inputs, self.blocks = inputs, blocks
        self.block_seconds, self.block_queries = block_seconds, block_queries
        self.limit_seconds, self.progress = limit_seconds, progress
        self.steady, self.steady_seconds = steady, steady_seconds
        self.deadline = float("inf")

    def run(
        self,
        states: Sequence[_State],
        share: int,
        reopen: bool = False,
        keeps_open: bool = True,
        contenders: Sequence[_State] = (),
    ) -> None:
        """All rounds over ``states``, which may take one ``share``-th of the time limit.

        Args:
            keeps_open: where the states are opened anew, whether those that take long to open may stay open.
            contenders: of the states, those whose order matters and nothing else.
        """
        start = time.perf_counter()
        self.deadline = start + self.limit_seconds
        rounds = wanted = self.blocks
        done, far = 0, list[_State]()
        while done < rounds:
            what = f"block {done + 1} of {rounds}"
            if reopen:
                self._reopening_round([states[index] for index in _order(len(states), done)], what, keeps_open)
            else:
                # For good, so that all blocks of the same number are of the same round.
                far += _far_behind([each for each in contenders if each not in far]) if done >= min(FAR) else []
                self._round([state for state in states if state not in far], what)
            done += 1
            per_round = (time.perf_counter() - start) / done
            affordable = int(self.limit_seconds / share / per_round)
            in_time = time.perf_counter() - start + per_round <= self.steady_seconds
            if done == wanted < STEADYING_BLOCKS and in_time and not self._is_steady(states):
                wanted += 1
            rounds = min(wanted, max(2, done, affordable))

    def _is_steady(self, states: Sequence[_State]) -> bool:
        return self.steady is None or all(_uncertainty(state) <= self.steady for state in states if not state.error)

    def settle(self, states: Sequence[_State]) -> None:
        """Further rounds over the fastest state and those that nothing tells from it yet, each opened anew."""
        most = max((len(state.blocks) for state in states), default=0)
        contest = [state for state in states if state.runner is not None and len(state.blocks) == most]
        slow = any(SETTLING_QUERIES * state.call_seconds > self.block_seconds for state in contest)
        deadline = min(self.deadline, time.perf_counter() + SETTLING_SECONDS * (1 + slow))
        number = opened_anew_after = 0
        while number < SETTLING_BLOCKS and time.perf_counter() <= deadline:
            contest = _contest(contest, NEAR if number < NEAR_BLOCKS else 1.0)
            contest = contest if number < WAYS_BLOCKS else _one_way_each(contest)
            if len(contest) < 2:
                return
            if number == opened_anew_after:
                opened_anew_after += self._open_anew(contest)
            number += 1
            turn = contest if number % 2 else contest[::-1]
            self._round(turn, f"further block {number}, the order is not settled", SETTLING_QUERIES)
            contest = [state for state in contest if state.error is None]

    def _open_anew(self, states: Sequence[_State]) -> int:
        """Close and open the states again, and say how many rounds that is worth: as many as take as long."""
        seconds = 0.0
        for state in states:
            if state.open_seconds <= REOPEN_SECONDS:
                state.close()
                state.open(self.progress)
                seconds = max(seconds, state.open_seconds)
        return max(1, round(seconds / self.block_seconds))

    def _round(self, states: Sequence[_State], what: str, least: int = 1) -> None:
        for state in states:
            self.progress(f"measuring {state.candidate.name}, {what}")
            state.block(self.inputs, self.block_seconds, max(least, self.block_queries))

    def _reopening_round(self, states: Sequence[_State], what: str, keeps_open: bool) -> None:
        for state in states:
            if state.runner is None and state.error is None:
                state.open(self.progress)
            self._round([state], what)
            if state.open_seconds <= REOPEN_SECONDS or not keeps_open:
                state.close()
            elif not state.kept_open:
                state.kept_open = (
                    f"opened once, as it takes {state.open_seconds:.0f} s: another time it may differ a little"
                )


def _order(count: int, number: int) -> list[int]:
    """A round's order: each has each place once in ``count`` rounds, and if they are even in number follows each other
    once. A row of a Williams design ("Experimental designs balanced for the estimation of residual effects of
    treatments", 1949).
    """
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]
    return [(step + number) % count for step in zigzag]


def _contest(states: Sequence[_State], near: float) -> list[_State]:
    """The fastest state, and those whose latency is below ``near`` times its, or not shown to differ from it."""

    def is_in(state: _State) -> bool:
        ratio = _ratio(state, best)
        return ratio.outcome == "no difference" or ratio.value < near

    if len(states) < 2:
        return list(states)
    best = _fastest(states)
    return [state for state in states if state is best or is_in(state)]


def _one_way_each(states: Sequence[_State]) -> list[_State]:
    """The states without all but the fastest of those that are other ways to run the same candidate."""
    ways: dict[str, list[_State]] = {}
    for state in states:
        ways.setdefault(state.candidate.instead_of, []).append(state)
    kept = [_fastest(each) for each in ways.values()]
    return [state for state in states if not state.candidate.instead_of or state in kept]


def _far_behind(states: Sequence[_State]) -> list[_State]:
    """Those that have had their blocks, by :data:`FAR`, and are shown to be slower than the fastest."""
    open_states = [state for state in states if state.runner is not None]

    def is_far(state: _State) -> bool:
        pairs = zip(state.blocks, best.blocks, strict=False)
        ratios = [plain.median(own.latencies_ns) / plain.median(its.latencies_ns) for own, its in pairs]
        far = any(len(ratios) >= blocks and min(ratios) > limit for blocks, limit in FAR.items())
        return far and _ratio(state, best).outcome == "slower"

    if not open_states:
        return []
    best = _fastest(open_states)
    return [state for state in open_states if is_far(state)]


def _fastest(states: Sequence[_State]) -> _State:
    return min(states, key=lambda state: statistics.percentiles(_latencies(state)).p50_ns)


def _ratio(state: _State, other: _State) -> statistics.Ratio:
    return statistics.ratio_of_medians(
        _latencies(state), _latencies(other), interleaved=True, resamples=statistics.FEW_RESAMPLES
    )


def _latencies(state: _State) -> list[tuple[int, ...]]:
    return [block.latencies_ns for block in state.blocks]


def _uncertainty(state: _State) -> float:
    """Half the width of the median's 95 % interval as a share of it: Student's, over the blocks' medians."""
    from scipy import stats

    medians = [plain.median(block.latencies_ns) for block in state.blocks]
    if len(medians) < 2:
        return float("inf")
    quantile = float(stats.t.ppf(0.975, len(medians) - 1))
    return float(quantile * plain.stdev(medians) / len(medians) ** 0.5 / plain.mean(medians))


def _why_not_together(candidates: Sequence[Candidate], target: Target) -> str:
    """Why the candidates cannot all be open at once; empty if they can."""
    need = sum(candidate.bytes for candidate in candidates)
    if target.device == "cuda" and torch.cuda.is_available():
        free, where = torch.cuda.mem_get_info()[0], "GPU memory"
    else:
        free, where = machine.available_memory(), "memory"
    if need <= _MEMORY_SHARE * free:
        return ""
    return (
        f"their weights ({need / 1e9:.1f} GB) take over {_MEMORY_SHARE:.0%} of the free {where} ({free / 1e9:.1f} GB)"
    )
