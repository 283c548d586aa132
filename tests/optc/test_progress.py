"""Steps of a run: each is timed, however often it is repeated and however it ends."""

from __future__ import annotations

import time
from itertools import count

import pytest

from optc.progress import Progress, Run


def test_repeated_steps_and_those_that_fail_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    run = Run(Progress())
    for _ in range(3):
        with run.step("Measuring"):
            pass
    with pytest.raises(ValueError, match="no"), run.step("Measuring"):
        raise ValueError("no")
    assert run.seconds == {"Measuring": 4.0}
