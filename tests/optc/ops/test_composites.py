"""The composite operators: registered soundly, and equal to the ATen operators they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from optc.ops import ACTIVATIONS, COMPOSITES, Composite, find_composite

aten = torch.ops.aten
ALL = pytest.mark.parametrize("operator", COMPOSITES, ids=lambda operator: operator._opname)


def example(composite: Composite, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, ...]:
    """All arguments of a composite: uneven geometry, batch 2."""
    if not composite.is_conv:
        tensors: list[Tensor] = [torch.randn(2, 5, 8), torch.randn(6, 8), torch.randn(6)]
        rest: tuple[Any, ...] = ()
        output = (2, 5, 6)
    else:
        tensors = [torch.randn(2, 4, 9, 8), torch.randn(6, 2, 3, 2), torch.randn(6)]
        rest = ([2, 1], [1, 0], [1, 2], 2)
        output = (2, 6, 5, 6)
    if composite.residual:
        tensors.append(torch.randn(output))
    return (*(tensor.to(device, dtype) for tensor in tensors), *rest)


def reference(composite: Composite, args: tuple[Any, ...]) -> Tensor:
    """The composite in float64, spelled with torch.nn.functional."""
    wide = [a.double() if isinstance(a, Tensor) else a for a in args]
    functional = nn.functional
    if composite.is_conv:
        value = functional.conv2d(*wide[:3], *wide[-4:])
    else:
        value = functional.linear(*wide[:3])
    if composite.residual:
        value = value + wide[3]
    named = {
        None: lambda x: x,
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }
    activation = named.get(composite.activation) or getattr(functional, str(composite.activation))
    return activation(value)


def test_every_activation_has_a_conv_and_a_linear() -> None:
    for base in (aten.conv2d.default, aten.linear.default):
        for activation in ACTIVATIONS:
            operator = find_composite(base, activation)
            assert operator is not None
            assert COMPOSITES[operator].activation == activation
        assert find_composite(base, None, residual=True) is not None
    assert find_composite(aten.conv2d.default, "relu", residual=True) is torch.ops.optc.conv2d_add_relu.default
    assert find_composite(aten.conv2d.default, "gelu", residual=True) is None
    assert find_composite(aten.conv3d.default, "relu") is None


@ALL
def test_is_soundly_registered(operator: OpOverload) -> None:
    """Schema, fake kernel and functionalisation, as torch's own checker sees them, static and dynamic."""
    composite = COMPOSITES[operator]
    results = torch.library.opcheck(operator, example(composite))
    assert set(results.values()) == {"SUCCESS"}


@ALL
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_computes_what_its_name_says(operator: OpOverload, dtype: torch.dtype) -> None:
    composite = COMPOSITES[operator]
    args = example(composite, dtype)
    got = operator(*args)
    assert got.dtype == dtype
    # One rounding of the result; the sums inside are kept in float32 or wider.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(got.double(), reference(composite, args), rtol=tolerance, atol=4 * tolerance)


@ALL
def test_bias_may_be_left_out(operator: OpOverload) -> None:
    composite = COMPOSITES[operator]
    x, weight, bias, *rest = example(composite)
    without = operator(x, weight, None, *rest)
    torch.testing.assert_close(without, operator(x, weight, torch.zeros_like(bias), *rest))


@ALL
def test_defaults_are_those_of_the_base(operator: OpOverload) -> None:
    composite = COMPOSITES[operator]
    ours, theirs = ({a.name: a.default_value for a in op._schema.arguments} for op in (operator, composite.base))
    assert {name: value for name, value in ours.items() if name not in ("bias", "other")} == {
        name: value for name, value in theirs.items() if name != "bias"
    }
    if composite.is_conv:  # the dispatcher leaves defaults out when it calls a Python kernel
        x, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 2, 2)
        other = [torch.randn(2, 4, 4, 4)] if composite.residual else []
        args = (x, weight, None, *other)
        torch.testing.assert_close(operator(*args), composite.decomposition(*args))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point, self.linear = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, bias=False), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        ops = torch.ops.optc
        y = ops.conv2d_relu(x, self.conv.weight, self.conv.bias)
        y = ops.conv2d_add_relu(y, self.point.weight, None, y)
        return ops.linear_gelu_tanh(y.mean((2, 3)), self.linear.weight, self.linear.bias)


def test_survives_export_decomposition_and_a_round_trip_through_a_file(tmp_path: Path) -> None:
    model, x = Model().eval(), torch.randn(2, 3, 8, 8)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).run_decompositions()
    torch.export.save(exported, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    called = [
        str(node.target) for node in again.graph.nodes if node.op == "call_function" and "optc" in str(node.target)
    ]
    assert called == ["optc.conv2d_relu.default", "optc.conv2d_add_relu.default", "optc.linear_gelu_tanh.default"]
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(again(x), model(x))
