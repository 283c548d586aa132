from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from optc import Runner
from optc.bench.scenarios import Plan, run_scenario
from optc.bench.settings import SCENARIOS, Scenario
from optc.bench.suts import BatchSystem
from optc.errors import MeasurementError

Arrays = tuple[np.ndarray, ...]


class _Calls(Runner):
    """Calls a function, and notes the batch sizes it was given."""

    provider, precision = "test", "float32"

    def __init__(self, function: Callable[..., Arrays]) -> None:
        self.function = function
        self.batches: list[int] = []

    def __call__(self, *inputs: np.ndarray) -> Arrays:
        self.batches.append(len(inputs[0]))
        return self.function(*inputs)


@pytest.fixture
def samples() -> list[Arrays]:
    return [(np.full((1, 3), i, np.float32),) for i in range(5)]


def _plan(**options: object) -> Plan:
    return Plan("model", threads=1, seconds=0.4, **options)  # type: ignore[arg-type]


def _conf(folder: Path, *lines: str) -> Path:
    path = folder / "user.conf"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(("scenario", "batch"), [("SingleStream", 1), ("MultiStream", 8), ("Offline", None)])
def test_loadgen_drives_the_runner_in_the_scenarios_batches(
    scenario: Scenario, batch: int | None, samples: list[Arrays]
) -> None:
    runner = _Calls(lambda x: (x,))
    result = run_scenario(scenario, runner, samples, "m", _plan())
    assert result.loadgen is not None
    assert result.loadgen.scenario.replace(" ", "") == scenario
    assert result.valid
    assert result.reasons == result.mends == ()
    assert result.value is not None
    assert result.value > 0
    assert (result.provider, result.precision) == ("test", "float32")
    assert runner.batches[-1] in ({batch} if batch else {1, 8, 32})
    assert result.batch == runner.batches[-1]
    assert len(result.latencies_ns) >= 1


def test_samples_are_put_together_in_the_order_loadgen_asks_for() -> None:
    seen: list[list[float]] = []

    def run(a: np.ndarray, b: np.ndarray) -> Arrays:
        assert (a == -b).all()
        seen.append(a[:, 0].tolist())
        return (a, b)

    pairs = [(np.full((1, 2), i, np.float32), np.full((1, 2), -i, np.float32)) for i in range(16)]
    run_scenario("MultiStream", _Calls(run), pairs, "m", _plan())
    assert {len(set(batch)) for batch in seen[-600:]} == {8}  # contiguous samples, so all different


def test_a_runner_that_takes_one_sample_only_gets_them_one_by_one_and_it_is_said(samples: list[Arrays]) -> None:
    def run(x: np.ndarray) -> Arrays:
        if len(x) > 1:
            raise ValueError("batch must be 1")
        return (x,)

    result = run_scenario("MultiStream", _Calls(run), samples, "m", _plan())
    assert result.batch == 1
    assert result.queries == result.loadgen.parameters["min_query_count"]  # type: ignore[union-attr]
    assert len(result.latencies_ns) == 8 * result.queries
    assert "takes no batch of 8" in result.notes[0]


def test_a_short_batch_is_filled_up(samples: list[Arrays]) -> None:
    runner = _Calls(lambda x: (x,))
    system = BatchSystem(runner, samples, "m", 3)
    (found,) = system.run([4, 2])
    assert runner.batches == [3]
    np.testing.assert_array_equal(found, [[4.0] * 3, [2.0] * 3])


def test_offline_takes_the_batch_with_the_highest_throughput(samples: list[Arrays]) -> None:
    def run(x: np.ndarray) -> Arrays:
        time.sleep({1: 0.004, 8: 0.004, 32: 0.256}[len(x)])
        return (x,)

    assert run_scenario("Offline", _Calls(run), samples, "m", _plan()).batch == 8


def test_server_finds_a_rate_within_the_bound_and_below_what_the_runner_can_do(
    samples: list[Arrays], tmp_path: Path
) -> None:
    def run(x: np.ndarray) -> Arrays:
        time.sleep(0.004)
        return (x,)

    conf = _conf(tmp_path, "*.Server.target_latency = 400")
    result = run_scenario("Server", _Calls(run), samples, "m", _plan(user_conf=conf))
    assert result.metric == "queries/s within 400 ms"
    assert result.loadgen is not None
    assert 0 < result.loadgen.parameters["target_qps"] < 250  # one query takes 4 ms and more
    assert result.loadgen.parameters["target_latency (ns)"] == 400e6
    assert len(result.latencies_ns) == result.queries
    assert min(result.latencies_ns) >= 4e6


@pytest.mark.parametrize("scenario", ["Offline", "Server"])
def test_a_runner_gets_as_many_queries_at_a_time_as_it_wants(
    scenario: Scenario, samples: list[Arrays], tmp_path: Path
) -> None:
    running: set[int] = set()
    most = 0

    def run(x: np.ndarray) -> Arrays:
        nonlocal most
        running.add(threading.get_ident())
        most = max(most, len(running))
        time.sleep(0.004)
        running.discard(threading.get_ident())
        return (x,)

    runner = _Calls(run)
    runner.concurrency = 3
    conf = _conf(tmp_path, "*.Server.target_latency = 400", "*.Server.target_qps = 500")
    result = run_scenario(scenario, runner, samples, "m", _plan(user_conf=conf))
    assert most == 3
    assert result.notes == ("3 calls at a time",)
    assert result.value is not None
    assert result.value > 250, "one at a time cannot do more"


def test_a_failure_among_several_queries_at_a_time_ends_the_run(samples: list[Arrays]) -> None:
    def run(x: np.ndarray) -> Arrays:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("out of cheese")
        return (x,)

    runner = _Calls(run)
    runner.concurrency = 2
    with pytest.raises(MeasurementError, match=r"'m' failed on samples? .*ValueError: out of cheese"):
        run_scenario("Offline", runner, samples, "m", _plan())


def test_a_stream_has_one_query_at_a_time(samples: list[Arrays]) -> None:
    runner = _Calls(lambda x: (x,))
    runner.concurrency = 3
    assert run_scenario("MultiStream", runner, samples, "m", _plan()).notes == ()


def test_server_says_when_one_query_alone_exceeds_the_bound(samples: list[Arrays], tmp_path: Path) -> None:
    def run(x: np.ndarray) -> Arrays:
        time.sleep(0.02)
        return (x,)

    conf = _conf(tmp_path, "*.Server.target_latency = 10")
    result = run_scenario("Server", _Calls(run), samples, "m", _plan(user_conf=conf))
    assert not result.valid
    assert result.value is None
    assert "more than the bound of 10 ms" in result.reasons[0]
    assert "*.Server.target_latency" in result.mends[0]


def test_an_overloaded_server_is_invalid_with_the_reason_and_the_mend(samples: list[Arrays], tmp_path: Path) -> None:
    def run(x: np.ndarray) -> Arrays:
        time.sleep(0.01)
        return (x,)

    conf = _conf(tmp_path, "*.Server.target_qps = 2000", "*.Server.target_latency = 15")
    result = run_scenario("Server", _Calls(run), samples, "m", _plan(user_conf=conf))
    assert not result.valid
    assert result.value is None
    assert any("bound of 15 ms" in reason for reason in result.reasons)
    assert any("lower *.Server.target_qps" in mend for mend in result.mends)


def test_too_few_queries_are_invalid_with_loadgens_number_and_the_mend(samples: list[Arrays], tmp_path: Path) -> None:
    conf = _conf(tmp_path, "other.MultiStream.min_query_count = 700", "model.MultiStream.min_query_count = 20")
    result = run_scenario("MultiStream", _Calls(lambda x: (x,)), samples, "m", _plan(user_conf=conf))
    assert not result.valid
    assert result.queries == 20
    assert result.reasons == ("20 queries are too few to vouch for its percentile: LoadGen wants 662",)
    assert result.mends == ("--official, or *.MultiStream.min_query_count = 662 in --user-conf",)


def test_official_runs_ask_for_mlperfs_durations_and_user_conf_has_the_last_word(
    samples: list[Arrays], tmp_path: Path
) -> None:
    def slow(x: np.ndarray) -> Arrays:
        time.sleep(0.001)
        return (x,)

    conf = _conf(tmp_path, "*.SingleStream.min_duration = 300")
    logs = tmp_path / "logs"
    plan = _plan(official=True, user_conf=conf, log_folder=lambda scenario: logs / scenario)
    result = run_scenario("SingleStream", _Calls(slow), samples, "m", plan)
    assert result.official
    assert result.loadgen is not None
    assert result.loadgen.parameters["min_duration (ms)"] == 300
    assert result.valid
    detail = (logs / "SingleStream" / "mlperf_log_detail.txt").read_text()
    assert '"requested_qsl_rng_seed", "value": 0,' not in detail.replace(
        "\n", ""
    )  # MLPerf's seeds, not LoadGen's zeros
    assert "Multiple conf files" not in detail


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_runner_that_fails_in_the_middle_ends_the_run_and_names_the_sample(
    scenario: Scenario, samples: list[Arrays], tmp_path: Path
) -> None:
    runner: _Calls

    def run(x: np.ndarray) -> Arrays:
        if threading.current_thread() is not threading.main_thread() or len(runner.batches) > 500:
            raise RuntimeError("out of memory in layer 3")
        return (x,)

    runner = _Calls(run)
    conf = _conf(tmp_path, "*.*.min_query_count = 100000", "*.Server.target_qps = 1000")
    with pytest.raises(MeasurementError, match=r"'m' failed on samples? \d.*RuntimeError: out of memory in layer 3"):
        run_scenario(scenario, runner, samples, "m", _plan(user_conf=conf))
    again = run_scenario("SingleStream", _Calls(lambda x: (x,)), samples, "m", _plan())
    assert again.valid


def test_nan_is_counted_and_told(samples: list[Arrays]) -> None:
    result = run_scenario("MultiStream", _Calls(lambda x: (x * np.float32("nan"),)), samples, "m", _plan())
    assert result.nonfinite == result.queries
    assert "returned NaN or infinity" in result.notes[0]


_INTERRUPTED = """
import sys, time
import numpy as np
from pathlib import Path
from optc import Runner
from optc.bench.scenarios import Plan, run_scenario

class Slow(Runner):
    provider = precision = "test"
    def __call__(self, x):
        print("query", flush=True)
        time.sleep(0.001)
        return (x,)

try:
    run_scenario("Server", Slow(), [(np.ones((1, 3), np.float32),)], "m", Plan("m", 1, user_conf=Path("{conf}")))
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


def test_ctrl_c_ends_a_server_run_whose_schedule_is_long(tmp_path: Path) -> None:
    conf = _conf(tmp_path, "*.*.min_query_count = 100000", "*.Server.target_qps = 500")
    script = textwrap.dedent(_INTERRUPTED).format(conf=conf)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    for _ in range(500):
        assert process.stdout.readline() == "query\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert output.endswith("interrupted\n")
    assert errors == ""


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_runner_of_one_batch_size_is_given_that(scenario: Scenario, samples: list[Arrays], tmp_path: Path) -> None:
    def three(x: np.ndarray) -> Arrays:
        if len(x) != 3:
            raise ValueError(f"Got: {len(x)} Expected: 3")
        return (x,)

    runner = _Calls(three)
    result = run_scenario(scenario, runner, samples, "m", _plan(), batch=3)
    assert result.value is not None, result.reasons
    assert (set(runner.batches), result.batch) == ({3}, 3)


def test_multistream_has_the_samples_that_are_asked_for(samples: list[Arrays], tmp_path: Path) -> None:
    conf = _conf(tmp_path, "*.MultiStream.samples_per_query = 4")
    runner = _Calls(lambda x: (x,))
    result = run_scenario("MultiStream", runner, samples, "m", _plan(user_conf=conf))
    assert (result.metric, result.batch) == ("ms at the 99th percentile, 4 samples a query", 4)
    assert runner.batches[-1] == 4
