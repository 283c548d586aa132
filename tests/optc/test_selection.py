"""Which programs are worth compiling for seconds, judged by real runtimes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import optc
from optc.lowering.eager import EagerBackend
from optc.lowering.inductor import InductorBackend
from optc.lowering.lowering import Lowering, lower
from optc.passmanager.contract import PassRecord
from optc.progress import Progress, Run
from optc.report.account import KEYS
from optc.selection import TemporaryFolder, _Contest

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


def contest(best: Lowering | None) -> _Contest:
    made = _Contest(Run(Progress()), (X,), TARGET, TemporaryFolder())
    made._best = best
    return made


def test_a_program_far_slower_than_the_best_is_hopeless(lowerings: dict[str, Lowering]) -> None:
    reason = contest(lowerings["small"])._hopeless("large", [lowerings["large"]])
    assert reason.startswith("not tried: large has ")
    assert reason.endswith(" times the latency of small on eager already on eager")


def test_a_faster_program_or_the_first_one_is_not(lowerings: dict[str, Lowering]) -> None:
    assert contest(lowerings["large"])._hopeless("small", [lowerings["small"]]) == ""
    assert contest(None)._hopeless("large", [lowerings["large"]]) == ""


def test_formats_chosen_on_one_backend_are_not_compiled_for_seconds_for_another() -> None:
    quick, slow = EagerBackend(), InductorBackend()
    program = optc.capture(nn.Linear(4, 4), (torch.randn(1, 4),))
    race = contest(None)
    assert race._apt("plain", program, [quick, slow]) == [quick, slow], "nothing was measured for it"

    account = {"account": [dict.fromkeys(KEYS, None) | {"layer": "linear", "backend": "eager"}]}
    chosen = replace(program, history=(PassRecord("quant", {}, True, (), (), account),))
    assert race._apt("mixed", chosen, [quick, slow]) == [quick]
    (left,) = race.left
    assert (left.backend, left.passes) == ("inductor", "mixed")
    assert left.reason == "not tried: each layer's format is the fastest on eager"
    assert race._apt("mixed", chosen, [slow]) == [slow], "the only one there is"
