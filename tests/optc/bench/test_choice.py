"""Choosing among backends, on real measurements of runners whose speed differs by design."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from optc import Backend, Lowered, Program, Runner, Target
from optc.bench.choice import Outcome, choose, rows
from optc.bench.measure import measure
from optc.bench.results import Candidate
from optc.contest import candidates
from optc.errors import BackendError
from optc.lowering.lowering import Lowering


class Sleeper(Runner):
    """Takes a fixed time, or fails."""

    provider, precision = "sleep", "float32"

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds

    def __call__(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        if self.seconds is None:
            raise RuntimeError("out of order")
        time.sleep(self.seconds)
        return (inputs[0],)


class SleepBackend(Backend):
    """Writes nothing worth reading."""

    summary = "Sleeps."

    def __init__(self, name: str, seconds: float | None) -> None:
        self.name, self.seconds = name, seconds  # type: ignore[misc]

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        raise AssertionError("already lowered")

    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> Runner:
        return Sleeper(self.seconds)


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Lowering]:
    (tmp_path / "model").write_bytes(b"12345")
    lowered, target = Lowered(("model",)), Target(threads=1)
    return {
        name: Lowering(SleepBackend(name, seconds), lowered, tmp_path, target, "sleep", "float32", 1.5)
        for name, seconds in {"slow": 0.02, "broken": None, "fast": 0.001}.items()
    }


def test_the_fastest_is_kept_and_every_other_has_its_reason(made: dict[str, Lowering]) -> None:
    candidates = [Candidate(name, "float32", False, lowering.load) for name, lowering in made.items()]
    query = [(np.zeros((1, 2), np.float32),)]
    measured = measure(candidates, query, Target(threads=1), optimized=tuple(made), block_seconds=0.05, together=True)
    kept, outcomes = choose(made, [Outcome("absent", False, "pip install absent")], measured)
    assert kept is made["fast"]
    assert measured.optimized == "fast"
    assert [outcome.backend for outcome in outcomes] == ["fast", "slow", "broken", "absent"]
    assert [outcome.chosen for outcome in outcomes] == [True, False, False, False]
    assert "the latency of the one kept" in outcomes[1].reason
    assert "no difference" not in outcomes[1].reason
    assert "out of order" in outcomes[2].reason
    assert outcomes[3].reason == "pip install absent"
    assert outcomes[0].file_bytes == 5
    table = rows(outcomes)
    assert table[0][0] == "fast (kept)"
    assert table[3][2:5] == ("–", "–", "–")


def test_where_all_fail_none_is_kept(made: dict[str, Lowering]) -> None:
    broken = dict.fromkeys(("broken", "again"), made["broken"])
    candidates = [Candidate(name, "", False, each.load) for name, each in broken.items()]
    measured = measure(candidates, [(np.zeros((1, 2), np.float32),)], Target(threads=1), optimized=tuple(broken))
    with pytest.raises(BackendError, match="failed when measured: broken: RuntimeError: out of order; again: "):
        choose(broken, (), measured)


def test_equals_are_said_to_be_equal(made: dict[str, Lowering]) -> None:
    twins = {"fast": made["fast"], "again": made["fast"]}
    candidates = [Candidate(name, "float32", False, lowering.load) for name, lowering in twins.items()]
    query = [(np.zeros((1, 2), np.float32),)]
    measured = measure(candidates, query, Target(threads=1), optimized=tuple(twins), block_seconds=0.05, together=True)
    _, outcomes = choose(twins, [], measured)
    interval = outcomes[1].reason
    ratio = float(interval.partition("x")[0])
    assert 0.8 < ratio < 1.6, interval


def test_the_only_one_is_kept_without_a_measurement(made: dict[str, Lowering]) -> None:
    kept, outcomes = choose({"fast": made["fast"]}, [Outcome("refuses", False, "no kernel for Roll")], None)
    assert kept is made["fast"]
    assert [(outcome.backend, outcome.chosen) for outcome in outcomes] == [("fast", True), ("refuses", False)]
    assert outcomes[1].reason == "no kernel for Roll"


@pytest.mark.parametrize(("seconds", "kept"), [(0.0098, "plain"), (0.004, "with options")])
def test_other_options_are_kept_only_where_they_are_shown_to_be_faster(
    seconds: float, kept: str, tmp_path: Path
) -> None:
    """Sleeps that vary by a fifth from block to block."""
    (tmp_path / "model").write_bytes(b"12345")
    target = Target(threads=1)
    plain = Lowering(SleepBackend("plain", 0.01), Lowered(("model",)), tmp_path, target, "sleep", "float32", 1.5)
    other = replace(plain, options={"streams": 2})
    made = {"plain": plain, "with options": other}

    def varying(usual: float, sign: int) -> Callable[[], Runner]:
        number = itertools.count()
        return lambda: Sleeper(usual * (1 + 0.1 * sign * (-1) ** next(number)))

    opened = (varying(0.01, 1), varying(seconds, -1))
    measured = [replace(each, open=open_) for each, open_ in zip(candidates(made), opened, strict=True)]
    assert [each.instead_of for each in measured] == ["", "plain"]
    query = [(np.zeros((1, 2), np.float32),)]
    result = measure(measured, query, target, optimized=tuple(made), blocks=4, block_seconds=0.05, reopen=True)
    assert result.optimized == kept
    found, outcomes = choose(made, [], result)
    assert found is made[kept]
    assert outcomes[0].chosen
