from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from optc import Runner, Target
from optc.bench import measure as measure_module
from optc.bench import quiet
from optc.bench.measure import MAX_QUERIES, measure
from optc.bench.results import Candidate, Measurement
from optc.errors import BackendError

Arrays = tuple[np.ndarray, ...]


class _Watched(Runner):
    """Calls a function; a log shows when it was opened, called and closed."""

    provider, precision = "test runtime", "float32 really"

    def __init__(self, name: str, function: Callable[..., Arrays], log: list[tuple[str, str]]) -> None:
        self.name, self.function, self.log = name, function, log
        log.append(("open", name))

    def __call__(self, *inputs: np.ndarray) -> Arrays:
        self.log.append(("call", self.name))
        return self.function(*inputs)

    def close(self) -> None:
        self.log.append(("close", self.name))


@pytest.fixture
def log() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def query() -> list[Arrays]:
    return [(np.ones((1, 64), np.float32),)]


def _candidate(
    name: str,
    log: list[tuple[str, str]],
    function: Callable[..., Arrays] | None = None,
    *,
    quantized: bool = False,
    size: int = 0,
) -> Candidate:
    return Candidate(name, "float32", quantized, lambda: _Watched(name, function or _work(1), log), size)


def _work(layers: int) -> Callable[..., Arrays]:
    """Matrix products on one thread: the same work each time, in proportion to ``layers``."""
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8 * layers)]).eval()

    @torch.no_grad()
    def run(x: np.ndarray) -> Arrays:
        return (model(torch.from_numpy(x)).numpy(),)

    return run


def _turns(log: list[tuple[str, str]]) -> list[str]:
    """Names in the order they had the machine to themselves."""
    turns: list[str] = []
    for event, name in log:
        if event == "call" and (not turns or turns[-1] != name):
            turns.append(name)
    return turns


def _short(candidates: list[Candidate], query: list[Arrays], **options: object) -> Measurement:
    options = {"blocks": 2, "block_seconds": 0.02, **options}
    return measure(candidates, query, Target(threads=1), **options)  # type: ignore[arg-type]


def test_blocks_take_turns_and_all_latencies_are_kept(log: list[tuple[str, str]], query: list[Arrays]) -> None:
    result = _short([_candidate("a", log), _candidate("b", log)], query, blocks=3)
    assert _turns(log) == ["a", "b", "a", "b", "a", "b"]
    assert result.interleaved
    assert result.sequential_reason == ""
    for name in "ab":
        candidate = result[name]
        assert len(candidate.blocks) == 3
        calls = sum(entry == ("call", name) for entry in log)
        warm_up = calls - sum(len(block.latencies_ns) for block in candidate.blocks)
        assert 3 <= warm_up <= 3 * 2  # two calls before each block; one where the machine stalls for a block's length
        assert candidate.percentiles is not None
        pooled = np.concatenate(candidate.latencies_ns)
        assert candidate.percentiles.p50_ns == pytest.approx(np.median(pooled))
        assert candidate.precision == "float32 really"
        assert candidate.provider == "test runtime"
    assert [entry for entry in log if entry[0] == "close"] == [("close", "a"), ("close", "b")]


def test_a_quarter_of_the_work_is_faster(log: list[tuple[str, str]], query: list[Arrays]) -> None:
    one, two = _work(1), _work(4)
    candidates = [_candidate("again", log, one, quantized=True), _candidate("four times", log, two)]
    less = measure(candidates, query, Target(threads=1), optimized="again", block_seconds=0.1)
    assert less.ratio is not None
    assert less.ratio.value < 1
    assert less.ratio.outcome == "faster"


def test_the_baseline_is_the_fastest_unquantized_candidate_but_not_the_optimized_one(
    log: list[tuple[str, str]], query: list[Arrays]
) -> None:
    def sleep(milliseconds: float) -> Callable[..., Arrays]:
        def run(x: np.ndarray) -> Arrays:
            time.sleep(milliseconds / 1000)
            return (x,)

        return run

    candidates = [
        _candidate("slow", log, sleep(60)),
        _candidate("middling", log, sleep(20)),
        _candidate("int8", log, sleep(0), quantized=True),
        _candidate("fused", log, sleep(1)),
    ]
    result = _short(candidates, query, optimized="fused")
    assert result.baseline == "middling"
    assert result.ratio is not None
    assert result.ratio.value < 0.5
    assert _short(candidates, query).ratio is None
    assert _short(candidates[2:3], query, optimized="int8").baseline is None


def test_what_fails_is_listed_with_its_reason(log: list[tuple[str, str]], query: list[Arrays]) -> None:
    def refuse() -> Runner:
        raise BackendError("no kernel for bf16 convolution", "use float32")

    def crash() -> Runner:
        raise RuntimeError("first line\nsecond line")

    calls = iter(range(1000))

    def dies(x: np.ndarray) -> Arrays:
        if next(calls) == 3:
            raise ValueError("bad shape")
        time.sleep(0.005)
        return (x,)

    result = _short(
        [
            Candidate("refused", "bfloat16", False, refuse),
            Candidate("crashed", "int8", True, crash),
            _candidate("dies", log, dies),
            _candidate("works", log, quantized=True),
        ],
        query,
        optimized="works",
    )
    assert result["refused"].error == "no kernel for bf16 convolution — use float32"
    assert result["refused"].percentiles is None
    assert result["crashed"].error == "RuntimeError: first line"
    died = result["dies"].error
    assert died is not None
    assert "'dies' failed on sample 0" in died
    assert "ValueError: bad shape" in died
    assert ("close", "dies") in log
    assert result["works"].error is None
    assert len(result["works"].blocks) == 2
    assert result.baseline is None  # a candidate that died is nothing to compare with
    assert result.ratio is None


def test_nan_outputs_are_warned_of(log: list[tuple[str, str]], query: list[Arrays]) -> None:
    result = _short([_candidate("nan", log, lambda x: (x * np.float32("nan"),))], query)
    total = sum(len(block.latencies_ns) for block in result["nan"].blocks)
    assert f"{total} of {total} queries returned NaN or infinity" in result["nan"].warnings


def test_a_runner_that_cannot_be_closed_ends_nothing(log: list[tuple[str, str]], query: list[Arrays]) -> None:
    class Stuck(_Watched):
        def close(self) -> None:
            raise OSError("in use")

    stuck = Candidate("stuck", "", False, lambda: Stuck("stuck", _work(1), log))
    result = _short([stuck, _candidate("b", log)], query)
    assert result["stuck"].error == "closing it failed: OSError: in use"
    assert result["b"].error is None
    assert ("close", "b") in log


def test_one_after_another_on_request_and_where_memory_is_short(
    log: list[tuple[str, str]], query: list[Arrays]
) -> None:
    asked = _short([_candidate("a", log), _candidate("b", log)], query, together=False)
    assert [entry for entry in log if entry[0] != "call"] == [
        ("open", "a"),
        ("close", "a"),
        ("open", "b"),
        ("close", "b"),
    ]
    assert not asked.interleaved
    assert _turns(log) == ["a", "b"]
    huge = [_candidate("a", log, size=10**15), _candidate("b", log, quantized=True)]
    result = _short(huge, query, optimized="b")
    assert not result.interleaved
    assert "1000000.0 GB" in result.sequential_reason
    assert result.ratio is not None
    assert _short(huge, query, together=True).interleaved


def test_one_after_another_opens_the_largest_first_and_keeps_the_order_of_results(
    log: list[tuple[str, str]], query: list[Arrays]
) -> None:
    result = _short([_candidate("small", log, size=1), _candidate("large", log, size=2)], query, together=False)
    assert _turns(log) == ["large", "small"]
    assert [candidate.name for candidate in result.results] == ["small", "large"]


def test_slow_models_get_few_queries_and_fewer_rounds(log: list[tuple[str, str]], query: list[Arrays]) -> None:
    def slow(x: np.ndarray) -> Arrays:
        time.sleep(0.15)
        return (x,)

    candidates = [_candidate("slow", log, slow), _candidate("again", log, slow, quantized=True)]
    result = _short(candidates, query, blocks=50, limit_seconds=0.5, optimized="again")
    assert [len(block.latencies_ns) for block in result["slow"].blocks] == [1, 1]
    assert sum(entry == ("call", "slow") for entry in log) == 4  # one warm-up call, one query, twice
    assert any("only 2 blocks" in warning for warning in result.warnings)
    assert any("only 2 queries" in warning for warning in result["slow"].warnings)


def test_fast_models_do_not_fill_the_result(log: list[tuple[str, str]], query: list[Arrays]) -> None:
    result = _short([_candidate("null", log, lambda x: (x,))], query, block_seconds=5.0)
    assert [len(block.latencies_ns) for block in result["null"].blocks] == [MAX_QUERIES] * 2


def test_threads_and_garbage_collector_are_set_and_put_back(log: list[tuple[str, str]], query: list[Arrays]) -> None:
    seen: set[tuple[int, bool]] = set()

    def run(x: np.ndarray) -> Arrays:
        seen.add((torch.get_num_threads(), gc.isenabled()))
        return (x,)

    before = torch.get_num_threads()
    measure([_candidate("a", log, run)], query, Target(threads=before + 1), blocks=2, block_seconds=0.01)
    assert seen == {(before + 1, False)}
    assert torch.get_num_threads() == before
    assert gc.isenabled()


def test_ctrl_c_closes_what_is_open(log: list[tuple[str, str]], query: list[Arrays]) -> None:
    def interrupted(x: np.ndarray) -> Arrays:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _short([_candidate("a", log), _candidate("b", log, interrupted)], query)
    assert log[-2:] == [("close", "a"), ("close", "b")]


def test_a_busy_machine_is_warned_of(
    log: list[tuple[str, str]], query: list[Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optc.bench.disturbance._LOOK_SECONDS", 0.0)
    monkeypatch.setattr("optc.bench.disturbance.Watch.others", 0.4)
    monkeypatch.setattr("os.getloadavg", lambda: (1e6, 1.0, 1.0))
    (warning,) = _short([_candidate("a", log)], query).warnings
    assert "other processes took 40% of the CPUs as the measurement began" in warning
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 1.0, 1.0))
    assert _short([_candidate("a", log)], query).warnings == ()  # what others do during the blocks is the candidate's


def test_the_result_is_plain_json(log: list[tuple[str, str]], query: list[Arrays]) -> None:
    result = _short([_candidate("a", log), _candidate("b", log, quantized=True)], query, optimized="b")
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["baseline"] == "a"
    assert data["results"][0]["blocks"][0]["latencies_ns"] == list(result["a"].blocks[0].latencies_ns)
    assert data["results"][0]["blocks"][0]["loadgen"]["scenario"] == "SingleStream"


def test_progress_names_each_step(log: list[tuple[str, str]], query: list[Arrays]) -> None:
    lines: list[str] = []
    _short([_candidate("a", log)], query, progress=lines.append)
    assert lines == ["opening a", "measuring a, block 1 of 2", "measuring a, block 2 of 2"]


def test_reopening_opens_for_every_block_and_changes_the_order(log: list[tuple[str, str]], query: list[Arrays]) -> None:
    result = _short([_candidate("a", log), _candidate("b", log)], query, blocks=3, reopen=True)
    assert _turns(log) == ["a", "b", "a", "b"]  # a b, b a, a b
    assert [name for event, name in log if event == "open"] == ["a", "b", "b", "a", "a", "b"]
    assert [event for event, _ in log if event != "call"] == ["open", "close"] * 6  # never two at once
    assert [len(each.blocks) for each in result.results] == [3, 3]
    assert result.interleaved


@pytest.mark.parametrize("count", [1, 2, 4, 12])
def test_each_has_each_place_once_and_follows_each_other_once(count: int) -> None:
    rounds = [measure_module._order(count, number) for number in range(count)]
    every = list(range(count))
    assert all(sorted(each) == every for each in rounds)
    assert all(sorted(place) == every for place in zip(*rounds, strict=True))
    pairs = [pair for each in rounds for pair in pairwise(each)]
    assert len(set(pairs)) == len(pairs) == count * (count - 1)


def test_reopening_leaves_open_what_takes_long_to_open_and_says_so(
    log: list[tuple[str, str]], query: list[Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_module, "REOPEN_SECONDS", -1.0)
    result = _short([_candidate("a", log)], query, blocks=3, reopen=True)
    assert [event for event, _ in log if event != "call"] == ["open", "close"]
    assert any("opened once" in warning for warning in result["a"].warnings)
    assert not any("opened once" in warning for warning in _short([_candidate("a", log)], query)["a"].warnings)


def test_a_candidate_that_does_not_open_is_not_opened_again(log: list[tuple[str, str]], query: list[Arrays]) -> None:
    opened = []

    def refuse() -> Runner:
        opened.append(1)
        raise BackendError("no kernel")

    result = _short([Candidate("a", "", False, refuse)], query, blocks=3, reopen=True)
    assert len(opened) == 1
    assert result["a"].error == "no kernel"


def test_candidates_may_have_inputs_of_their_own(log: list[tuple[str, str]], query: list[Arrays]) -> None:
    shapes: set[tuple[int, ...]] = set()

    def note(x: np.ndarray) -> Arrays:
        shapes.add(x.shape)
        return (x,)

    own = ((np.ones((2, 5), np.float32),),)
    _short([Candidate("own", "", False, lambda: _Watched("own", note, log), 0, own)], query)
    assert shapes == {(2, 5)}


def test_rounds_go_on_until_every_median_is_known_well_enough(
    log: list[tuple[str, str]], query: list[Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_module, "_uncertainty", lambda state: 0.1 / len(state.blocks))
    monkeypatch.setattr(quiet, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(measure_module, "STEADYING_BLOCKS", 7)
    candidates = [_candidate("a", log), _candidate("b", log)]
    counts = {
        steady: [len(each.blocks) for each in _short(candidates, query, steady=steady, steady_seconds=1e9).results]
        for steady in (0.5, 0.02, 0.0)
    }
    assert counts == {0.5: [2, 2], 0.02: [5, 5], 0.0: [7, 7]}
    in_no_time = _short(candidates, query, steady=0.0, steady_seconds=0.0)
    assert [len(each.blocks) for each in in_no_time.results] == [2, 2]


def test_the_uncertainty_of_a_median_is_students(log: list[tuple[str, str]], query: list[Arrays]) -> None:
    state = measure_module._State(_candidate("a", log), None)
    summary = _short([_candidate("a", log)], query)["a"].blocks[0].loadgen
    state.blocks = [measure_module.Block((value,), 0, summary) for value in (90, 100, 110)]
    assert measure_module._uncertainty(state) == pytest.approx(4.303 * 10 / 3**0.5 / 100, rel=1e-3)


def test_a_block_holds_as_many_queries_as_asked_for_where_that_does_not_take_too_long(
    log: list[tuple[str, str]], query: list[Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(x: np.ndarray) -> Arrays:
        time.sleep(0.002)
        return (x,)

    for stretch, held in ((1e9, True), (0.0, False)):
        monkeypatch.setattr(measure_module, "STRETCH", stretch)
        result = _short([_candidate("a", log, slow)], query, block_seconds=0.004, block_queries=64)
        assert all((len(block.latencies_ns) == 64) is held for block in result["a"].blocks)
        assert all(block.loadgen.valid is held for block in result["a"].blocks)


def test_loadgens_logs_are_kept(log: list[tuple[str, str]], query: list[Arrays], tmp_path: Path) -> None:
    _short([_candidate("a", log)], query, logs=lambda name, block: tmp_path / name / str(block))
    kept = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("mlperf_log_summary.txt"))
    assert kept == ["a/1/mlperf_log_summary.txt", "a/2/mlperf_log_summary.txt"]
