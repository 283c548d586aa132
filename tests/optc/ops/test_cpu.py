"""oneDNN kernels of the composites: used where they can be, equal to the decomposition wherever they are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optc.ops import COMPOSITES, Composite, cpu

OPERATORS = {row.name: operator for operator, row in COMPOSITES.items()}
CONVS = [row.name for row in COMPOSITES.values() if row.is_conv]
LINEARS = [row.name for row in COMPOSITES.values() if not row.is_conv]
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def row(name: str) -> Composite:
    return COMPOSITES[OPERATORS[name]]


def called(name: str, args: tuple[Any, ...]) -> set[str]:
    """Names of the operators a composite call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        OPERATORS[name](*args)
    return {event.name for event in profile.events()}


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last)


@needs_onednn
@pytest.mark.parametrize("name", OPERATORS)
def test_runs_as_one_onednn_primitive(name: str) -> None:
    if row(name).is_conv:
        args: tuple[Any, ...] = (channels_last(torch.randn(2, 4, 6, 6)), torch.randn(4, 4, 1, 1), torch.randn(4))
        operator = "mkldnn::_convolution_pointwise"
    else:
        args = (torch.randn(2, 4), torch.randn(4, 4), torch.randn(4))
        operator = "mkldnn::_linear_pointwise"
    if row(name).residual:
        args = (*args, torch.randn_like(args[0]))
    events = called(name, args)
    assert operator in events
    assert not events & {"aten::conv2d", "aten::linear", "aten::add", "aten::relu", "aten::gelu", "aten::sigmoid"}


@needs_onednn
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_convolutions_equal_their_decomposition_at_any_geometry(data: st.DataObject) -> None:
    draw = data.draw
    composite = row(draw(st.sampled_from(CONVS)))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel, stride, padding, dilation = (
        [draw(st.integers(low, high)) for _ in range(2)] for low, high in [(1, 3), (1, 3), (0, 3), (1, 2)]
    )
    size = [d * (k - 1) + 1 + draw(st.integers(0, 4)) for d, k in zip(dilation, kernel, strict=True)]
    # Beyond that a window may lie wholly in the padding, and torch.conv2d itself, the reference, crashes now and then.
    padding = [min(p, d * (k - 1)) if d <= n else 0 for p, d, k, n in zip(padding, dilation, kernel, size, strict=True)]
    batch = draw(st.integers(1, 3))
    # The same weights in every layout a model may hold them and its input in.
    layout = st.sampled_from([torch.contiguous_format, torch.channels_last])
    x = torch.randn(batch, inputs, *size).to(memory_format=draw(layout))
    if draw(st.booleans()):
        x = torch.stack([x, x], -1)[..., 1]
    weight = torch.randn(outputs, inputs // groups, *kernel).to(memory_format=draw(layout))
    bias = torch.randn(2 * outputs)[:: draw(st.integers(1, 2))][:outputs] if draw(st.booleans()) else None
    geometry = (stride, padding, dilation, groups)
    other = [torch.randn_like(torch.conv2d(x, weight, bias, *geometry))] if composite.residual else []
    args = (x, weight, bias, *other, *geometry)
    got, want = OPERATORS[composite.name](*args), composite.decomposition(*args)
    assert got.shape == want.shape == composite.output_shape(args)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize(
    ("width", "kernel", "padding", "dilation"), [(5, 1, 1, 1), (5, 2, 2, 1), (5, 3, 5, 2), (1, 2, 1, 2)]
)
def test_windows_wholly_in_the_padding_are_left_to_the_decomposition(
    width: int, kernel: int, padding: int, dilation: int
) -> None:
    x, weight = torch.randn(1, 2, 4, width), torch.randn(2, 2, 1, kernel)
    args = (x, weight, None, [1, 1], [0, padding], [1, dilation], 1)
    assert "wholly in the padding" in (cpu.refusal(row("conv2d_relu"), args) or "")
    allowed = (torch.randn(1, 2, 4, 5), torch.randn(2, 2, 1, 3), None, [1, 1], [0, 2], [1, 1], 1)
    assert cpu.refusal(row("conv2d_relu"), allowed) is None


@needs_onednn
@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("shape", [(4,), (3, 4), (0, 4), (2, 3, 4), (2, 2, 3, 4)], ids=str)
def test_linears_equal_their_decomposition_at_any_rank(name: str, shape: tuple[int, ...]) -> None:
    other = [torch.randn(*shape[:-1], 5)] if row(name).residual else []
    for x in (torch.randn(shape), torch.randn(*shape[:-1], 8)[..., ::2]):
        for weight in (torch.randn(5, 4), torch.randn(4, 5).t()):
            for bias in (torch.randn(5), torch.randn(10)[::2], None):
                args = (x, weight, bias, *other)
                torch.testing.assert_close(OPERATORS[name](*args), row(name).decomposition(*args), rtol=1e-4, atol=1e-5)


BROADCAST = "its bias is not one number per output channel"
IMAGE, WEIGHT, BIAS = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 1, 1), torch.randn(4)
REFUSED = {
    "float64": ("conv2d_relu", (IMAGE.double(), WEIGHT.double(), BIAS.double()), "no float64 kernel"),
    "mixed": ("conv2d_relu", (IMAGE, WEIGHT.double(), BIAS.double()), "no float64 kernel"),
    "mixed bias": ("conv2d_relu", (IMAGE, WEIGHT, BIAS.bfloat16()), "its operands differ in dtype"),
    "unbatched": ("conv2d_relu", (IMAGE[0], WEIGHT, BIAS), "its input has no batch dimension"),
    "empty": ("conv2d_relu", (IMAGE[:0], WEIGHT, BIAS), "an operand is empty"),
    "strided bias": ("conv2d_relu", (IMAGE, WEIGHT, torch.randn(8)[::2]), "its weight or bias is not stored densely"),
    "strided weight": ("linear_relu", (torch.randn(2, 4), torch.randn(4, 4).t(), None), "not stored densely"),
    "broadcast": ("conv2d_add", (channels_last(IMAGE), WEIGHT, BIAS, IMAGE[:, :1]), "the added operand is broadcast"),
    "grouped": ("conv2d_add", (IMAGE, torch.randn(4, 2, 1, 1), BIAS, IMAGE, [1, 1], [0, 0], [1, 1], 2), "grouped"),
    "number as bias": ("linear_relu", (torch.randn(2, 4), torch.randn(5, 4), torch.tensor(0.7)), BROADCAST),
    "bias of one": ("linear_add", (torch.randn(2, 4), torch.randn(5, 4), torch.randn(1), torch.randn(2, 5)), BROADCAST),
    "row as bias": ("linear_relu", (torch.randn(2, 4), torch.randn(5, 4), torch.randn(1, 5)), BROADCAST),
    "layout": ("conv2d_add_relu", (IMAGE, WEIGHT, BIAS, IMAGE), "only to a channels-last convolution"),
}


@needs_onednn
@pytest.mark.parametrize("case", REFUSED)
def test_says_why_not(case: str) -> None:
    name, args, reason = REFUSED[case]
    assert reason in (cpu.refusal(row(name), row(name).complete(args)) or "")


@needs_onednn
@pytest.mark.parametrize("case", sorted(set(REFUSED) - {"mixed", "mixed bias"}))
def test_what_is_refused_still_runs(case: str) -> None:
    name, args, _ = REFUSED[case]
    torch.testing.assert_close(OPERATORS[name](*args), row(name).decomposition(*args))
    assert not any(event.startswith("mkldnn::_") and "pointwise" in event for event in called(name, args))


@needs_onednn
def test_can_be_turned_off() -> None:
    args = (torch.randn(2, 4), torch.randn(4, 4), None)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert cpu.refusal(row("linear_relu"), args) == "this PyTorch has oneDNN missing or turned off"
        torch.testing.assert_close(OPERATORS["linear_relu"](*args), torch.relu(args[0] @ args[1].t()))
