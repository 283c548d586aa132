from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from optc.bench import limits
from optc.bench.limits import in_force, limited, parse_bytes, parse_cpus
from optc.errors import MeasurementError


@pytest.mark.parametrize(
    ("text", "bytes_"), [("512MB", 512 * 10**6), ("2GiB", 2**31), ("1.5g", 15 * 10**8), ("4096", 4096), ("1 kib", 1024)]
)
def test_sizes(text: str, bytes_: int) -> None:
    assert parse_bytes(text) == bytes_


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "1TBs", "99999999999999999999999GB", "9" * 500])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(MeasurementError, match="is no size of memory — write 512MB"):
        parse_bytes(text)


def test_lists_of_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    assert parse_cpus("0,2-4, 8") == {0, 2, 3, 4, 8}
    for text in ("", "a", "3-1", "1,,2", "9" * 5000):
        with pytest.raises(MeasurementError, match="is no list of CPUs"):
            parse_cpus(text)
    with pytest.raises(MeasurementError, match="may not use CPU 12 — choose among 0, 1"):
        parse_cpus("11-13")
    with pytest.raises(MeasurementError, match="may not use CPU 12 — choose among 0, 1"):
        parse_cpus("0-99999999999")  # as a set these would not fit into memory


def test_limits_hold_for_a_while_and_are_told() -> None:
    before = in_force()
    cpu = min(os.sched_getaffinity(0))
    with limited(cpus=frozenset({cpu}), memory_bytes=2**40):
        assert in_force() == {"cpus": [cpu], "memory_limit_bytes": 2**40}
        in_child = subprocess.run([sys.executable, "-c", _TELL], capture_output=True, text=True, check=True)
        assert json.loads(in_child.stdout) == in_force()
    assert in_force() == before


_TELL = "import json; from optc.bench.limits import in_force; print(json.dumps(in_force()))"
_TAKES = """
import threading, time
import numpy as np, os
from optc.bench.limits import limited
started, seen = threading.Event(), []
def work():
    started.wait()
    seen.append(os.sched_getaffinity(0))
thread = threading.Thread(target=work); thread.start()
cpu = min(os.sched_getaffinity(0))
with limited(cpus=frozenset({cpu}), memory_bytes=10**9):
    started.set(); thread.join()
    np.ones(10**7)
    try:
        np.ones(10**9)
    except MemoryError:
        print(seen == [{cpu}], "too much")
np.empty(10**9)
"""


def test_more_memory_than_allowed_fails_and_threads_that_run_are_bound_too() -> None:
    done = subprocess.run([sys.executable, "-c", _TAKES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True too much\n"


def test_a_limit_below_what_is_taken_already_is_refused() -> None:
    with (
        pytest.raises(MeasurementError, match=r"optc itself has taken .* MB .* — allow at least"),
        limited(memory_bytes=1),
    ):
        pass
    assert limits._data_bytes() > 2**20
