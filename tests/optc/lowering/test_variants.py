"""Several ways to run the same files: entered, checked, measured, remembered."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import optc
from optc.bench.choice import rows
from optc.bench.measure import measure
from optc.contest import Contest
from optc.lowering.backend import Array, Backend, Lowered, Runner
from optc.lowering.eager import EagerBackend
from optc.lowering.torch_memory import TorchOptions
from optc.passmanager.alternatives import Made
from optc.passmanager.contract import PassRecord
from optc.progress import Progress, Run
from optc.selection import Selection, _varying, select
from optc_passes.quant_account import Entry
from optc_passes.quant_account import account as account_of

TARGET = optc.Target(threads=1, batch=2, options={"offering": {"level": 1}})
X = torch.randn(2, 8)


class OfferingOptions(TorchOptions):
    level: int = 0
    times: float = 1.0
    pause: float = 0.002


class Times(Runner):
    """Another runner's outputs, multiplied, after a pause."""

    def __init__(self, runner: Runner, given: OfferingOptions) -> None:
        self.runner, self.given = runner, given
        self.provider, self.precision = f"{runner.provider} {given.level}", runner.precision

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        time.sleep(self.given.pause)
        return tuple(output * np.float32(self.given.times) for output in self.runner(*inputs))


class Offering(EagerBackend):
    name = "offering"
    Options = OfferingOptions
    offered: ClassVar[Sequence[Mapping[str, Any]]] = ({"pause": 0.0}, {"times": 1.5}, {"level": "high"})

    def load(self, folder: Path, files: tuple[str, ...], target: optc.Target) -> Runner:
        return Times(super().load(folder, files, target), self.options(target))

    def variants(
        self, lowered: Lowered, target: optc.Target, folder: Path
    ) -> Sequence[tuple[Mapping[str, Any], Lowered]]:
        return [(options, lowered) for options in self.offered]


class Slow(Offering):
    name = "slow"
    offered = ()


class Broken(Offering):
    name = "broken"

    def variants(
        self, lowered: Lowered, target: optc.Target, folder: Path
    ) -> Sequence[tuple[Mapping[str, Any], Lowered]]:
        raise KeyError("options")


class Narrow(Offering):
    """Its kernels take nothing but the inputs that they were made with."""

    name = "narrow"

    def load(self, folder: Path, files: tuple[str, ...], target: optc.Target) -> Runner:
        runner = super().load(folder, files, target)

        class Limited(Runner):
            provider, precision = runner.provider, runner.precision

            def __call__(self, *inputs: Array) -> tuple[Array, ...]:
                if not np.array_equal(inputs[0], X.numpy()):
                    raise IndexError("out of range")
                return runner(*inputs)

        return Limited()


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause is told from none in little time, and what takes as long as another is not told from it in more."""
    monkeypatch.setattr("optc.selection.measure_candidates", partial(measure, blocks=3, block_seconds=0.05))
    monkeypatch.setattr("optc.bench.measure.SETTLING_SECONDS", 1.0)


def selected(
    program: optc.Program, *chosen: EagerBackend, automatic: bool = False, measure: bool = False, run: Run | None = None
) -> Any:
    """What is kept of a program on some backends."""
    made, model = Made({"": program}, {}), nn.Linear(8, 8)
    return select(run or Run(Progress()), model, (X,), made, [*chosen], {}, TARGET, automatic, measure)


@pytest.fixture(scope="module")
def program() -> optc.Program:
    return optc.capture(nn.Linear(8, 8), (X,))


def test_each_way_enters_that_computes_the_same(program: optc.Program) -> None:
    race = Contest(Run(Progress()), (X,), TARGET, with_variants=True)
    race.enter({"": program}, [Offering()])
    assert [made.title for made in race.lowerings] == ["offering", "offering pause=0.0"]
    assert race.lowerings[1].target.options == {"offering": {"level": 1, "pause": 0.0}}
    assert race.lowerings[1].provider.endswith(" 1"), "with the options that were asked for"
    assert set(race.names(several=True)) == {"optc offering", "optc offering pause=0.0"}
    wrong, refused = race.left
    assert wrong.options == {"times": 1.5}
    assert wrong.reason.startswith("offering times=1.5 computes output 'output_0' differently")
    assert "option offering.level='high'" in refused.reason
    assert rows(race.left)[0][0] == "offering times=1.5"


def test_ways_are_tried_where_they_may_win(program: optc.Program) -> None:
    race = Contest(Run(Progress()), (X,), TARGET, with_variants=True)
    race.enter({"": program}, [Offering(), EagerBackend()])  # which takes a small part of the pause
    assert {made.title for made in race.lowerings} == {"offering", "eager"}
    assert race.left == []


def test_what_a_backend_cannot_offer_names_the_backend(program: optc.Program) -> None:
    race = Contest(Run(Progress()), (X,), TARGET, with_variants=True)
    race.enter({"": program}, [Broken()])
    assert [made.title for made in race.lowerings] == ["broken"]
    (left,) = race.left
    assert left.reason.startswith("backend 'broken' (from ")
    assert left.reason.endswith(") raised KeyError: 'options'")


def test_a_way_that_cannot_be_compared_is_left(program: optc.Program) -> None:
    race = Contest(Run(Progress()), (X,), TARGET, with_variants=True)
    race.enter({"": program}, [Narrow()])
    assert [made.title for made in race.lowerings] == ["narrow"]
    (left,) = race.left
    assert left.reason.endswith(") raised IndexError: out of range")


def test_the_fastest_way_is_kept_and_remembered(
    program: optc.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    first, again = (selected(program, Offering(), Slow(), automatic=True) for _ in range(2))
    assert first.kept.options == {"pause": 0.0}
    assert first.outcomes[0].options == {"pause": 0.0}
    assert all(file.is_file() for file in first.kept.files), "they are those of the way that lost as well"
    assert "chosen by the measurement of" in again.notes[0]
    assert again.measurement is None
    for found in (first, again):
        assert found.kept.target.options["offering"] == {"level": 1, "pause": 0.0}
        assert found.kept.load().given.pause == 0.0


def test_where_what_was_kept_cannot_be_made_again_all_are_measured_anew(
    program: optc.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert selected(program, Offering(), Slow(), automatic=True).kept.backend.name == "offering"

    def lower(self: Offering, program: optc.Program, target: optc.Target, folder: Path) -> optc.Lowered:
        if type(self) is Offering:
            raise optc.BackendError("no memory left")
        return EagerBackend.lower(self, program, target, folder)

    monkeypatch.setattr(Offering, "lower", lower)
    run = Run(Progress())
    again = selected(program, Offering(), Slow(), automatic=True, run=run)
    assert again.kept.backend.name == "slow"
    assert run.notes == ["what was kept before cannot be made again (no memory left): everything is measured anew"]
    assert {each.backend: each.reason for each in again.outcomes if not each.chosen} == {"offering": "no memory left"}


@pytest.mark.usefixtures("uncompiled")
def test_where_what_was_kept_fails_when_measured_all_are_measured_anew(
    program: optc.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert selected(program, Offering(), Slow(), automatic=True).kept.backend.name == "offering"

    load, opened = Offering.load, list[Offering]()

    def once(self: Offering, folder: Path, files: tuple[str, ...], target: optc.Target) -> Runner:
        if self in opened:
            raise optc.BackendError("once is enough")
        if type(self) is Offering:
            opened.append(self)
        return load(self, folder, files, target)

    monkeypatch.setattr(Offering, "load", once)
    run = Run(Progress())
    again = selected(program, Offering(), Slow(), automatic=True, measure=True, run=run)
    assert again.kept.backend.name == "slow"
    assert run.notes == ["what was kept before failed when measured (once is enough): everything is measured anew"]
    assert again.notes == ()


def test_what_was_chosen_for_formats_that_were_measured_is_not_recalled_for_others(
    program: optc.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    account = {"account": list(account_of([Entry("slow", "linear", "", "float", math.inf, 1e-6, 64)], {}, {}))}

    def made(block: int = 64, points: float = 1.0) -> Made:
        formats = replace(program.fork(), history=(PassRecord("quant", {"block": block}, True, (), (), account),))
        return Made({"int8": program, "mixed": formats}, {}, {"budget": points})

    def notes(made: Made) -> tuple[str, ...]:
        chosen: list[Backend] = [Slow()]
        run, model = Run(Progress()), nn.Linear(8, 8)
        found: Selection = select(run, model, (X,), made, chosen, {}, TARGET, automatic=False, measure=False)
        return found.notes

    assert notes(made()) == ()
    assert "chosen by the measurement of" in notes(made())[0]
    assert notes(made(points=0.5)) == ()
    assert _varying(made()) == _varying(made()) != _varying(made(block=32))


class Exhausted(Slow):
    """Has no memory the first time."""

    name = "exhausted"
    failed = False

    def lower(self, program: optc.Program, target: optc.Target, folder: Path) -> Lowered:
        if not Exhausted.failed:
            Exhausted.failed = True
            raise MemoryError
        return super().lower(program, target, folder)


class Refusing(Slow):
    name = "refusing"

    def lower(self, program: optc.Program, target: optc.Target, folder: Path) -> Lowered:
        raise optc.BackendError("no kernel for it")


def test_a_choice_is_remembered_unless_something_failed_that_may_pass(
    program: optc.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second, third = (selected(program, Slow(), Exhausted(), automatic=True) for _ in range(3))
    assert [each.backend for each in first.outcomes] == ["slow", "exhausted"]
    assert "raised MemoryError" in first.outcomes[1].reason
    assert second.notes == ()
    assert all(each.p50_ms for each in second.outcomes), "both were measured"
    assert "chosen by the measurement of" in third.notes[0]

    first, second = (selected(program, Slow(), Refusing(), automatic=True) for _ in range(2))
    assert first.measurement is None, "there was one to measure"
    assert "chosen by the measurement of" in second.notes[0]


@pytest.mark.usefixtures("uncompiled")
def test_the_ways_of_a_backend_that_is_asked_for_are_measured_with_the_baselines(
    program: optc.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    found = selected(program, Offering(), measure=True)
    assert found.kept.options == {"pause": 0.0}
    assert found.measurement.optimized == "optc pause=0.0"
    assert found.measurement.baseline in ("eager-fp32", "eager-bf16")
    assert [each.title for each in found.outcomes][:2] == ["offering pause=0.0", "offering"]
    assert selected(program, Offering()).kept.options == {}, "nothing is measured, and nothing recalled"
    again = selected(program, Offering(), measure=True)
    assert again.kept.target.options["offering"]["pause"] == 0.0
    assert "chosen by the measurement of" in again.notes[0]
    assert again.measurement.optimized == "optc"


@pytest.mark.usefixtures("uncompiled")
def test_that_no_other_way_is_faster_is_remembered_too(
    program: optc.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    first, again = (selected(program, Slow(), measure=True) for _ in range(2))
    assert first.outcomes == again.outcomes == (), "there was nothing to choose"
    assert first.notes == ()
    assert "chosen by the measurement of" in again.notes[0]


def test_where_lists_of_passes_are_measured_other_ways_are_too(
    program: optc.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = Made({"a": program, "b": program.fork()}, {})
    model = nn.Linear(8, 8)
    found = select(Run(Progress()), model, (X,), made, [Offering()], {}, TARGET, automatic=False, measure=False)
    assert found.kept.options == {"pause": 0.0}


class Tired(Slow):
    """Runs while it is lowered and never again."""

    name = "tired"

    def load(self, folder: Path, files: tuple[str, ...], target: optc.Target) -> Runner:
        if getattr(self, "opened", False):
            raise optc.BackendError("once is enough")
        self.opened = True
        return super().load(folder, files, target)


@pytest.mark.usefixtures("uncompiled")
def test_a_backend_that_was_asked_for_is_kept_though_it_failed_when_measured(
    program: optc.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = selected(program, Tired(), measure=True)
    assert found.kept.backend.name == "tired"
    assert found.outcomes == ()
    assert found.measurement["optc"].error == "once is enough"
    assert not list(tmp_path.rglob("*.json")), "it may run another time"
