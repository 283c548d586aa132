from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from optc import Runner
from optc.bench.loadgen import single_stream
from optc.errors import MeasurementError

Arrays = tuple[np.ndarray, ...]


class _Calls(Runner):
    """A runner made from a function."""

    provider, precision = "test", "float32"

    def __init__(self, function: Callable[..., Arrays]) -> None:
        self.function = function

    def __call__(self, *inputs: np.ndarray) -> Arrays:
        return self.function(*inputs)


@pytest.fixture(scope="module")
def samples() -> list[Arrays]:
    generator = np.random.default_rng(0)
    return [(generator.standard_normal((1, 3, 32, 32), dtype=np.float32),) for _ in range(5)]


@pytest.fixture(scope="module")
def convnet() -> _Calls:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 30 * 30, 10)).eval()

    @torch.no_grad()
    def run(x: np.ndarray) -> Arrays:
        return (model(torch.from_numpy(x)).numpy(),)

    return _Calls(run)


def test_every_query_is_timed_and_loadgen_agrees(convnet: _Calls, samples: list[Arrays]) -> None:
    run = single_stream(convnet, samples, 400)
    assert run.latencies_ns.shape == (400,)
    assert run.latencies_ns.dtype == np.int64
    assert (run.latencies_ns > 0).all()
    assert run.summary.valid
    assert run.summary.reasons == ()
    assert run.summary.scenario == "SingleStream"
    assert run.nonfinite_queries == 0
    # LoadGen's latencies are ours plus the harness, query by query; so are their order statistics.
    ordered = np.sort(run.latencies_ns)
    assert run.summary.min_ns >= ordered[0]
    assert run.summary.mean_ns >= ordered.mean()
    for percentile in ("50.00", "90.00", "97.00"):
        own = ordered[int(len(ordered) * float(percentile) / 100)]
        theirs = run.summary.percentiles_ns[percentile]
        assert own <= theirs
    assert run.summary.percentiles_ns["50.00"] <= 2 * np.median(run.latencies_ns)


def test_draws_every_sample_and_passes_all_inputs() -> None:
    pairs = [(np.full((1, 2), i, np.float32), np.full((1, 3), -i, np.float32)) for i in range(4)]
    seen: set[float] = set()

    def run(a: np.ndarray, b: np.ndarray) -> Arrays:
        assert a.shape == (1, 2)
        assert b.shape == (1, 3)
        assert a[0, 0] == -b[0, 0]
        seen.add(float(a[0, 0]))
        return (a, b)

    single_stream(_Calls(run), pairs, 200)
    assert seen == {0.0, 1.0, 2.0, 3.0}


def test_nan_and_infinity_are_counted_in_every_output(samples: list[Arrays]) -> None:
    calls = iter(range(1000))

    def run(x: np.ndarray) -> Arrays:
        number = next(calls)
        second = np.ones(3, np.float32)
        second[1] = {0: np.nan, 1: np.inf}.get(number % 10, 1.0)
        return (x, second)

    assert single_stream(_Calls(run), samples, 100).nonfinite_queries == 20


def test_outputs_that_are_not_contiguous_or_not_float_are_fine(samples: list[Arrays]) -> None:
    run = single_stream(_Calls(lambda x: (x.transpose(0, 3, 2, 1), np.arange(4))), samples, 70)
    assert len(run.latencies_ns) == 70
    assert run.nonfinite_queries == 0


def test_loadgen_calls_too_few_queries_invalid_and_says_why(samples: list[Arrays]) -> None:
    summary = single_stream(_Calls(lambda x: (x,)), samples, 10).summary
    assert not summary.valid
    assert any("64" in reason for reason in summary.reasons)


def test_a_failing_runner_ends_the_run_and_names_the_sample(samples: list[Arrays]) -> None:
    calls = 0

    def run(x: np.ndarray) -> Arrays:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise RuntimeError("out of memory in layer 3")
        return (x,)

    with pytest.raises(MeasurementError, match=r"'int8' failed on sample [0-4] \(query 7 of 100000\)") as caught:
        single_stream(_Calls(run), samples, 100_000, name="int8")
    assert "RuntimeError: out of memory in layer 3" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert calls == 7
    assert len(single_stream(_Calls(lambda x: (x,)), samples, 10).latencies_ns) == 10


def test_a_runner_without_outputs_is_a_failure(samples: list[Arrays]) -> None:
    with pytest.raises(MeasurementError, match="IndexError"):
        single_stream(_Calls(lambda x: ()), samples, 10)


def test_an_exit_inside_the_runner_is_passed_on(samples: list[Arrays]) -> None:
    def run(x: np.ndarray) -> Arrays:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        single_stream(_Calls(run), samples, 10)


@pytest.mark.parametrize(("queries", "count"), [(0, 1), (5, 0)])
def test_nothing_to_measure_is_refused(queries: int, count: int, samples: list[Arrays]) -> None:
    with pytest.raises(MeasurementError, match="nothing to measure"):
        single_stream(_Calls(lambda x: (x,)), samples[:count], queries)


def test_logs_are_kept_only_on_request(samples: list[Arrays], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    working, temporary = tmp_path / "working", tmp_path / "temporary"
    working.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(working)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    assert single_stream(_Calls(lambda x: (x,)), samples, 70).log_folder is None
    assert not list(working.iterdir())
    assert not list(temporary.iterdir())
    kept = single_stream(_Calls(lambda x: (x,)), samples, 70, log_folder=tmp_path / "kept" / "logs").log_folder
    assert kept is not None
    assert (kept / "mlperf_log_summary.txt").read_text().count("Result is : VALID") == 1


def test_a_log_folder_that_cannot_be_made_is_one_clear_line(samples: list[Arrays], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MeasurementError, match="cannot write LoadGen's logs"):
        single_stream(_Calls(lambda x: (x,)), samples, 10, log_folder=tmp_path / "file")


def test_an_audit_config_lying_about_is_not_read(
    samples: list[Arrays], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "audit.config").write_text("*.SingleStream.max_query_count = 3\n*.SingleStream.min_query_count = 3\n")
    monkeypatch.chdir(tmp_path)
    assert len(single_stream(_Calls(lambda x: (x,)), samples, 70).latencies_ns) == 70


def test_writes_nothing_to_the_terminal(samples: list[Arrays], capfd: pytest.CaptureFixture[str]) -> None:
    single_stream(_Calls(lambda x: (x,)), samples, 70)
    assert capfd.readouterr() == ("", "")


def test_runs_in_a_thread_other_than_the_main_one(samples: list[Arrays]) -> None:
    counts: list[int] = []
    thread = threading.Thread(
        target=lambda: counts.append(len(single_stream(_Calls(lambda x: (x,)), samples, 70).latencies_ns))
    )
    thread.start()
    thread.join()
    assert counts == [70]


_AT_ONCE = """
import threading
import numpy as np
from optc import Runner
from optc.bench.loadgen import single_stream

class Same(Runner):
    provider = precision = "test"
    def __call__(self, x):
        return (x,)

counts = []
def run():
    for _ in range(5):
        counts.append(len(single_stream(Same(), [(np.ones(3, np.float32),)], 500).latencies_ns))

threads = [threading.Thread(target=run) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(counts == [500] * 15)
"""


def test_threads_that_measure_at_once_wait_for_each_other() -> None:
    done = subprocess.run([sys.executable, "-c", _AT_ONCE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


_INTERRUPTED = """
import signal, sys, time
import numpy as np
from optc import Runner
from optc.bench.loadgen import single_stream

class Slow(Runner):
    provider = precision = "test"
    def __call__(self, x):
        print("query", flush=True)
        {work}
        return (x,)

handler = signal.getsignal(signal.SIGINT)
try:
    single_stream(Slow(), [(np.ones(3, np.float32),)], 1_000_000)
except KeyboardInterrupt:
    print("interrupted", signal.getsignal(signal.SIGINT) is handler, flush=True)
    sys.exit(130)
"""


_TERMINATED = """
def end(number, frame):
    raise KeyboardInterrupt(number)

signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the jobs of scripts
signal.signal(signal.SIGTERM, end)
try:
    single_stream(Slow(), [(np.ones(3, np.float32),)], 1_000_000)
except KeyboardInterrupt as error:
    print("ended", error.args == (signal.SIGTERM,), signal.getsignal(signal.SIGTERM) is end, flush=True)
"""


def test_sigterm_ends_the_run_where_ctrl_c_is_ignored() -> None:
    script = _INTERRUPTED.partition("handler =")[0].format(work="time.sleep(0.01)") + _TERMINATED
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "query\n"
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=50)
    assert output.endswith("ended True True\n"), errors
    assert process.returncode == 0


WORK = [
    "time.sleep(60)",
    pytest.param("time.sleep(0.01)", marks=pytest.mark.slow),
    "pass",
    "\n        while True: pass",
]


@pytest.mark.parametrize("work", WORK)
def test_ctrl_c_ends_the_run_at_once(work: str) -> None:
    script = textwrap.dedent(_INTERRUPTED).format(work=work)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    for _ in range(1 if work.endswith(("(60)", "True: pass")) else 3):
        assert process.stdout.readline() == "query\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=50)
    assert process.returncode == 130, errors
    assert output.endswith("interrupted True\n")
    assert errors == ""
