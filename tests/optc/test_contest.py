"""Which programs are lowered to which backends, judged by real runtimes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optc
from optc.batches import as_calibration
from optc.contest import Contest
from optc.lowering.backend import Backend, Lowered
from optc.lowering.eager import EagerBackend
from optc.lowering.inductor import InductorBackend
from optc.lowering.lowering import Lowering, lower
from optc.lowering.onnxruntime import OnnxRuntimeBackend
from optc.passmanager.contract import PassRecord
from optc.passmanager.manager import build_passes
from optc.progress import Progress, Run
from optc_passes.quant_account import Entry
from optc_passes.quant_account import account as account_of

X = torch.randn(1, 512)
TARGET = optc.Target(threads=1)


@pytest.fixture(scope="module")
def lowerings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Lowering]:
    """One layer, and sixty like it, each lowered."""
    found = {}
    for name, layers in (("small", 1), ("large", 60)):
        program = optc.capture(nn.Sequential(*(nn.Linear(512, 512) for _ in range(layers))), (X,))
        made = lower(EagerBackend(), program, TARGET, Path(tmp_path_factory.mktemp(name)) / "eager")
        found[name] = replace(made, passes=name)
    return found


def contest(best: Lowering | None, first: Mapping[str, float] | None = None) -> Contest:
    made = Contest(Run(Progress()), (X,), TARGET)
    made._best, made._first = best, first or {}
    return made


def test_a_program_far_slower_than_the_best_is_not_compiled(lowerings: dict[str, Lowering]) -> None:
    race = contest(lowerings["small"], {"eager": 1e6, "inductor": 1e6})
    assert race._promising(lowerings["large"], [InductorBackend()]) == []
    (left,) = race.left
    assert (left.backend, left.passes) == ("inductor", "large")
    assert left.reason.startswith("not tried: expected to have ")
    assert left.reason.endswith(" times the latency of small on eager, going by eager")
    assert race._best is lowerings["small"]


def test_a_faster_program_is_the_best_from_then_on(lowerings: dict[str, Lowering]) -> None:
    race = contest(lowerings["large"], {"eager": 1e6, "inductor": 1e7})
    compiles = InductorBackend()
    assert race._promising(lowerings["small"], [compiles]) == [compiles], "60 times as fast as what led so far"
    assert race._best is lowerings["small"]
    assert race._promising(lowerings["small"], [compiles]) == [], "now ten times as slow as the best"


def test_a_backend_that_could_not_take_the_first_program_may_win(lowerings: dict[str, Lowering]) -> None:
    unknown = OnnxRuntimeBackend()
    assert contest(lowerings["small"], {"eager": 1e6})._promising(lowerings["large"], [unknown]) == [unknown]


def test_further_programs_go_to_the_fastest_backend_first() -> None:
    programs = {
        name: optc.capture(nn.Sequential(*(nn.Linear(512, 512) for _ in range(layers))), (X,))
        for name, layers in (("small", 1), ("large", 60), ("smaller", 1))
    }
    race = contest(None)
    race.enter(programs, [EagerBackend(), OnnxRuntimeBackend()])
    looked = [each for each in race.left if each.p50_ms is not None]
    lowered = [(made.passes, made.backend.name) for made in race.lowerings]
    lowered += [(each.passes, each.backend) for each in looked]
    backends = {name for passes, name in lowered if passes == "small"}
    assert backends == {"eager", "onnxruntime"}
    assert len([name for passes, name in lowered if passes == "large"]) == 1, "60 times as slow there as the best"
    (loser,) = [each for each in looked if each.passes == "large"]
    assert re.fullmatch(r"\d+\.\d times the lowest latency in a short look: not measured further", loser.reason)
    assert loser.file_bytes > 60 * 512 * 512 * 4
    assert not list(race.folder.path.glob("1/*/*")), "its files are gone"


class Refusing(OnnxRuntimeBackend):
    name = "refusing"

    def lower(self, program: optc.Program, target: optc.Target, folder: Path) -> optc.Lowered:
        raise optc.BackendError("not today")


def test_where_the_fastest_backend_refuses_a_program_the_next_tells_whether_it_is_compiled(
    lowerings: dict[str, Lowering], tmp_path: Path
) -> None:
    race = contest(lowerings["small"], {"refusing": 1e5, "eager": 1e6, "inductor": 1e6})
    backends = [InductorBackend(), EagerBackend(), Refusing()]
    large = optc.capture(nn.Sequential(*(nn.Linear(512, 512) for _ in range(60))), (X,))
    (made,) = race._lower_where_promising("large", large, backends, tmp_path)
    assert made.backend.name == "eager"
    assert [each.backend for each in race.left] == ["refusing", "inductor"]
    assert race.left[1].reason.startswith("not tried: expected to have ")


class Offering(EagerBackend):
    name = "offering"

    def variants(
        self, lowered: Lowered, target: optc.Target, folder: Path
    ) -> Sequence[tuple[Mapping[str, Any], Lowered]]:
        return ()


def test_what_was_far_behind_when_looked_at_is_not_looked_at_again(lowerings: dict[str, Lowering]) -> None:
    race = contest(None)
    race.lowerings = [replace(made, backend=Offering()) for made in lowerings.values()]
    small, large = race.lowerings
    known = {small.title: 1e12, large.title: 2e12}
    race._best, race._looked = small, dict(known)
    assert race._near_the_fastest() == [small]
    assert race._looked == known, "one alone is near itself"
    race._looked[large.title] = 1.1e12
    assert race._near_the_fastest() == [small]
    assert race._looked[small.title] < race._looked[large.title] < 1e12
    race._best, race._looked = None, {}
    assert race._near_the_fastest() == [small], "looked at as nothing is known of them"
    assert race._looked[large.title] > race._looked[small.title]


def test_a_disturbed_look_leaves_out_nothing(lowerings: dict[str, Lowering]) -> None:
    race = contest(None)
    race.lowerings = [*lowerings.values(), replace(lowerings["large"], passes="as large")]
    race._looked = {made.title: 1.0 + number / 10 for number, made in enumerate(race.lowerings)}
    disturbed = race._look(race.lowerings, lambda text: None)
    assert disturbed[1] > 2 * disturbed[0]
    race._leave_losers()
    assert race.left == []


def test_of_one_backend_other_options_are_tried_on_what_is_as_fast_as_its_fastest(
    lowerings: dict[str, Lowering], monkeypatch: pytest.MonkeyPatch
) -> None:
    race = contest(None)
    race.lowerings = [replace(lowerings["small"], backend=Offering(), passes=passes) for passes in ("a", "b", "c")]
    fastest = replace(lowerings["small"], passes="fastest")
    race.lowerings.append(fastest)
    race._best = fastest
    monkeypatch.setattr(race, "_look", lambda lowerings, progress: [1.2, 1.05, 1.1, 1.0])
    assert [made.passes for made in race._near_the_fastest()] == ["b", "c"]


def test_quantized_layers_are_computed_in_float_only_where_no_other_backend_takes_them() -> None:
    captured = optc.capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (torch.randn(1, 8),))
    calibration = as_calibration([torch.randn(8, 8)], captured)
    quantized = build_passes("quant", None)(captured, optc.PassContext(TARGET, calibration)).program

    race = contest(None)
    race.enter({"": quantized}, [EagerBackend(), OnnxRuntimeBackend()])
    assert [made.backend.name for made in race.lowerings] == ["onnxruntime"]
    (left,) = race.left
    assert (left.backend, left.reason) == ("eager", "not tried: it computes quantized layers in float")

    refusing: list[Backend] = [EagerBackend(), Refusing()]
    for chosen in (refusing[:1], refusing):
        race = contest(None)
        race.enter({"": quantized}, chosen)
        assert [made.backend.name for made in race.lowerings] == ["eager"]
        assert [left.backend for left in race.left] == [each.name for each in chosen[1:]]
        assert all("not today" in left.reason for left in race.left)

    race = contest(None, {"refusing": 1e6})
    race.enter({"": quantized}, [EagerBackend(), Refusing()])
    assert [made.backend.name for made in race.lowerings] == ["eager"], "of a later program, too"

    race = contest(None)
    race.enter({"": captured}, [EagerBackend(), OnnxRuntimeBackend()])
    assert {made.backend.name for made in race.lowerings} == {"eager", "onnxruntime"}


def test_formats_chosen_on_one_backend_are_not_compiled_for_seconds_for_another() -> None:
    quick, slow = EagerBackend(), InductorBackend()
    program = optc.capture(nn.Linear(4, 4), (torch.randn(1, 4),))
    race = contest(None)
    assert race._apt("plain", program, [quick, slow]) == [quick, slow], "nothing was measured for it"

    account = {"account": list(account_of([Entry("eager", "linear", "", "float", math.inf, 1e-6, 64)], {}, {}))}
    chosen = replace(program, history=(PassRecord("quant", {}, True, (), (), account),))
    assert race._apt("mixed", chosen, [quick, slow]) == [quick]
    (left,) = race.left
    assert (left.backend, left.passes) == ("inductor", "mixed")
    assert left.reason == "not tried: each layer's format is the fastest on eager"
    assert race._apt("mixed", chosen, [slow]) == [slow], "the only one there is"
