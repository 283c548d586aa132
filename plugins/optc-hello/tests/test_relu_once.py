from __future__ import annotations

import torch
from torch import nn

import optc
from optc.rewrite import calls
from optc_hello.relu_once import RELU, ReluOnce


def captured(*layers: nn.Module) -> optc.Program:
    torch.manual_seed(0)
    return optc.capture(nn.Sequential(nn.Conv2d(3, 4, 3), *layers), (torch.randn(1, 3, 8, 8),))


def test_drops_every_relu_but_the_first_and_keeps_the_outputs() -> None:
    before = captured(nn.ReLU(), nn.ReLU(), nn.ReLU())
    result = ReluOnce()(before)
    assert [change.rule for change in result.applied] == ["relu-once", "relu-once"]
    assert len(list(calls(result.program, RELU))) == 1
    torch.testing.assert_close(result.program.run(*before.example_inputs), before.run(*before.example_inputs))


def test_leaves_relus_that_are_not_neighbours() -> None:
    before = captured(nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
    result = ReluOnce()(before)
    assert not result.modified
    assert result.program.fingerprint() == before.fingerprint()


def test_a_second_run_changes_nothing() -> None:
    once = ReluOnce()(captured(nn.ReLU(), nn.ReLU())).program
    assert not ReluOnce()(once).modified
