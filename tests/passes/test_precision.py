"""Half precision as passes: casts in the graph, the same interface, outputs near the captured ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import optc
from optc import PassContext, Program
from optc.plugins.registry import registry

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def program(model: nn.Module, *shape: int) -> Program:
    torch.manual_seed(0)
    return optc.capture(model, (torch.randn(1, *shape),))


@pytest.fixture(scope="module")
def net() -> Program:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return program(layers, 3, 12, 12)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_layers_run_in_half_and_the_border_stays_float(net: Program, name: str) -> None:
    result = registry().load("pass", name)()(net, PassContext())
    assert result.modified
    layers = [
        node for node in result.program.graph.nodes if str(node.target).startswith(("aten.conv2d", "aten.linear"))
    ]
    assert len(layers) == 2
    assert {node.meta["val"].dtype for node in layers} == {DTYPES[name]}
    x = torch.randn(4, 3, 12, 12)
    (want,), (got,) = net.run(x), result.program.run(x)
    assert got.dtype == torch.float32
    assert got.shape == want.shape == (4, 5)
    assert not torch.equal(got, want)
    assert float((got - want).norm() / want.norm()) < 0.03
    assert result.program.constant_bytes() < 0.6 * net.constant_bytes()


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_second_run_changes_nothing(net: Program, name: str) -> None:
    once = registry().load("pass", name)()(net, PassContext()).program
    assert not registry().load("pass", name)()(once, PassContext()).modified


def test_weights_beyond_fp16_stay_float_with_a_reason() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = 1e6
    captured = program(model, 3, 2, 2)
    result = registry().load("pass", "fp16")()(captured, PassContext())
    (output,) = result.program.run(*captured.example_inputs)
    assert torch.isfinite(output).all()
    assert result.skipped
    assert all(skip.reason for skip in result.skipped)
