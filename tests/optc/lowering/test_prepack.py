"""Prepacking: one oneDNN primitive per layer, the same outputs, at the packed batch and any other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from optc import Program, capture
from optc.lowering.prepack import LAYERS, prepack
from optc.ops import COMPOSITES
from optc.rewrite import STRIDES_READ

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
aten = torch.ops.aten


def names(program: Program) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def check(program: Program, *inputs: Tensor, tolerance: float = 1e-5) -> None:
    fork = program.fork()
    prepack(fork)
    for batch in (1, 2, 5):
        x = [torch.randn(batch, *t.shape[1:]).to(t.dtype) for t in inputs]
        for got, want in zip(fork.run(*x), program.run(*x), strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_packs_every_layer_of_a_cnn(cnn: Program) -> None:
    fork = cnn.fork()
    packed = prepack(fork)
    assert packed.layers == 4
    assert not packed.left
    assert names(fork).isdisjoint({"aten.conv2d.default", "aten.linear.default"})
    assert all(tensor.is_mkldnn for name, tensor in fork.constants() if name.endswith("_packed"))
    # The weights it replaced are not held on to.
    assert {name.removesuffix("_packed") for name, _ in fork.constants()} >= {"conv1_weight", "fc1_weight"}
    assert not [name for name, _ in fork.module.named_parameters() if name.endswith("weight")]
    check(cnn, torch.randn(2, 3, 16, 16))


def test_packs_a_transformer_block(block: Program) -> None:
    assert prepack(block.fork()).layers == 4
    check(block, torch.randn(2, 3, 16, 16))


class OneComposite(nn.Module):
    def __init__(self, target: Callable) -> None:
        super().__init__()
        self.target, self.row = target, LAYERS[target]
        self.layer = nn.Conv2d(4, 4, 3, padding=1) if self.row.is_conv else nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        other = (x.tanh(),) if self.row.residual else ()
        geometry = ([1, 1], [1, 1]) if self.row.is_conv else ()
        return self.target(x, self.layer.weight, self.layer.bias, *other, *geometry) * 0.5


@pytest.mark.parametrize("target", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_composite_computes_the_same(target: Callable, dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this CPU")
    x = (torch.randn(2, 4, 6, 6) if LAYERS[target].is_conv else torch.randn(2, 4)).to(dtype)
    program = capture(OneComposite(target).to(dtype), (x,))
    assert prepack(program.fork()).layers == 1
    check(program, x, tolerance=1e-5 if dtype is torch.float32 else 2e-2)


class Views(nn.Module):
    """Views of what convolutions compute: packed, these are channels-last and cannot be viewed so."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depthwise, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.conv(x)).relu()
        y = y.view(y.shape[0], 2, 4, 4, 4).transpose(1, 2).reshape(y.shape[0], 8, 4, 4)
        return self.head(y.view(y.shape[0], -1))


def test_views_of_convolutions_still_work() -> None:
    program = capture(Views(), (torch.randn(2, 3, 8, 8),))
    assert "aten.view.default" in names(program)
    check(program, torch.randn(2, 3, 8, 8))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.linear(x)) @ self.linear.weight


def test_weights_used_elsewhere_too_stay() -> None:
    program = capture(Tied(), (torch.randn(2, 6),))
    check(program, torch.randn(2, 6))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.wide = nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.linear(x).double()) + nn.functional.linear(x, self.linear.weight.softmax(0)).double()


def test_says_what_it_left_and_why() -> None:
    program = capture(Mixed(), (torch.randn(2, 4),))
    packed = prepack(program.fork())
    assert packed.layers == 1
    assert packed.left == {"linear_1": "oneDNN has no float64 kernel on this CPU", "linear_2": "its weight is computed"}
    check(program, torch.randn(2, 4))


class Vector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.linear(x), self.weight)


def test_a_vector_as_weight_is_left() -> None:
    program = capture(Vector(), (torch.randn(2, 6),))
    packed = prepack(program.fork())
    assert packed.layers == 1
    assert packed.left == {"linear_1": "its weight is a vector"}
    check(program, torch.randn(2, 6))


def test_table_covers_the_composites() -> None:
    assert set(LAYERS) == {*COMPOSITES, aten.conv2d.default, aten.linear.default}


class Broadcast(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("shape", [(), (1,), (1, 5)], ids=str)
def test_a_bias_that_is_broadcast_is_left(shape: tuple[int, ...]) -> None:
    """oneDNN would leave a single number out without a word."""
    program = capture(Broadcast(shape), (torch.randn(2, 6),))
    assert prepack(program.fork()).left == {"linear": "its bias is not one number per output channel"}
    check(program, torch.randn(2, 6))


class Strided(nn.Module):
    """Two operators, each behind a convolution, that want the strides they were captured with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.conv(x).view(x.shape[0], 4, 8, 4, 2))
        return torch.view_as_real(pairs * 1j).flatten(3) + self.other(x).as_strided((4, 8), (8, 1)).sum()


def test_operators_that_want_particular_strides_have_them() -> None:
    program = capture(Strided(), (torch.randn(2, 4, 8, 8),))
    packed = prepack(program.fork())
    assert packed.layers == 1
    assert packed.left == {"conv2d_1": STRIDES_READ}
    check(program, torch.randn(2, 4, 8, 8), tolerance=1e-4)
