"""fuse-activation: an activation becomes part of the convolution or linear layer that alone feeds it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from optc_passes.activation_fusion import FuseActivation
from optc_passes.residual_fusion import FuseResidual

IMAGE = torch.randn(2, 4, 7, 6)
TOKENS = torch.randn(2, 5, 8)
ACTIVATIONS = {
    "relu": torch.relu,
    "relu6": nn.functional.relu6,
    "hardswish": nn.functional.hardswish,
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "hardsigmoid": nn.functional.hardsigmoid,
}


class Layers(nn.Module):
    """``compute(module, x)`` with layers at hand."""

    def __init__(self, compute: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
        self.conv_same = nn.Conv2d(4, 6, (3, 5), padding="same", dilation=2)
        self.conv_valid = nn.Conv2d(4, 6, 2, padding="valid")
        self.conv_uneven = nn.Conv2d(4, 6, 2, padding="same")
        self.up = nn.ConvTranspose2d(4, 6, 2)
        self.conv1d = nn.Conv1d(5, 5, 3)
        self.linear = nn.Linear(8, 8)
        self.linear_bare = nn.Linear(8, 8, bias=False)
        self.compute = compute

    def forward(self, x: Tensor) -> object:
        return self.compute(self, x)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("layer", "x"), [("conv", IMAGE), ("linear", TOKENS)])
def test_fuses_every_activation(tester: Callable, layer: str, x: Tensor, name: str) -> None:
    activation = ACTIVATIONS[name]
    t = tester(Layers(lambda m, x: activation(getattr(m, layer)(x))), x).run(FuseActivation())
    composite = f"{'conv2d' if layer == 'conv' else 'linear'}_{name}"
    t.check_count(**{composite: 1}, conv2d=0, linear=0).check_applied("fuse-activation", 1).check_close()
    assert sum(node.op == "call_function" for node in t.program.graph.nodes) == 1
    assert not t.skipped


@pytest.mark.parametrize(("layer", "composite"), [("conv_same", "conv2d_relu"), ("conv_valid", "conv2d_relu")])
def test_writes_out_padding_given_as_a_word(tester: Callable, layer: str, composite: str) -> None:
    t = tester(Layers(lambda m, x: getattr(m, layer)(x).relu()), IMAGE).run(FuseActivation())
    t.check_count(**{composite: 1}, conv2d=0, relu=0).check_close()


def test_fuses_a_layer_without_bias_and_in_place_activations(tester: Callable) -> None:
    t = tester(Layers(lambda m, x: nn.functional.relu(m.linear_bare(x), inplace=True)), TOKENS).run(FuseActivation())
    t.check_count(linear_relu=1, relu=0).check_close()


def test_hardtanh_between_zero_and_six_is_relu6(tester: Callable) -> None:
    t = tester(Layers(lambda m, x: nn.functional.hardtanh(m.linear(x), 0, 6)), TOKENS).run(FuseActivation())
    t.check_count(linear_relu6=1, hardtanh=0).check_close()


def test_fuses_chains_layer_by_layer(tester: Callable) -> None:
    t = tester(Layers(lambda m, x: nn.functional.gelu(m.linear_bare(m.linear(x).relu()))), TOKENS).run(FuseActivation())
    t.check_count(linear_relu=1, linear_gelu=1).check_applied("fuse-activation", 2).check_close()


def test_only_the_first_of_two_activations_is_fused(tester: Callable) -> None:
    t = tester(Layers(lambda m, x: torch.sigmoid(m.linear(x).relu())), TOKENS).run(FuseActivation())
    t.check_count(linear_relu=1, sigmoid=1).check_close()


def two_users(m: nn.Module, x: Tensor) -> Tensor:
    y = m.linear(x)
    return y.relu() * y


def returned(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.linear(x)
    return y.relu(), y


BLOCKED = {
    "another user": (two_users, TOKENS, "linear (linear) is also used by mul"),
    "an output": (returned, TOKENS, "linear (linear) is also used by an output"),
    "elu": (lambda m, x: nn.functional.elu(m.conv(x)), IMAGE, "there is no composite of conv2d and elu"),
    "tanh": (lambda m, x: torch.tanh(m.linear(x)), TOKENS, "there is no composite of linear and tanh"),
    "prelu": (
        lambda m, x: nn.functional.prelu(m.linear(x), x[0, 0, :1]),
        TOKENS,
        "there is no composite of linear and prelu",
    ),
    "hardtanh": (
        lambda m, x: nn.functional.hardtanh(m.linear(x)),
        TOKENS,
        "no composite of linear and hardtanh(-1.0, 1.0)",
    ),
    "uneven padding": (lambda m, x: m.conv_uneven(x).relu(), IMAGE, "conv2d pads one side more than the other"),
    "transposed": (lambda m, x: m.up(x).relu(), IMAGE, "conv_transpose2d is a transposed convolution"),
    "decomposed": (
        lambda m, x: torch.convolution(x, m.conv_valid.weight, None, [1] * 2, [0] * 2, [1] * 2, False, [0], 1).relu(),
        IMAGE,
        "convolution is a decomposed layer: export the model without run_decompositions()",
    ),
    "vector": (
        lambda m, x: nn.functional.linear(x, m.linear.bias).relu(),
        TOKENS,
        "the weight of linear is a vector",
    ),
    "one-dimensional": (lambda m, x: m.conv1d(x).relu(), TOKENS, "conv1d is not a 2-D convolution"),
}


@pytest.mark.parametrize("case", BLOCKED)
def test_says_why_not(tester: Callable, case: str) -> None:
    compute, x, reason = BLOCKED[case]
    tester(Layers(compute), x).run(FuseActivation()).check_untouched().check_skipped("fuse-activation", reason)


@pytest.mark.parametrize(
    "compute",
    [
        lambda m, x: nn.functional.relu(x),
        lambda m, x: nn.functional.relu(m.linear(x).softmax(-1)),
        lambda m, x: m.linear(x).exp(),
        lambda m, x: nn.functional.gelu(m.linear(x).transpose(1, 2)),
    ],
)
def test_leaves_other_graphs_alone(tester: Callable, compute: Callable) -> None:
    t = tester(Layers(compute), TOKENS).run(FuseActivation()).check_untouched()
    assert not t.skipped


def test_joins_a_fused_residual_with_relu_but_with_nothing_else(tester: Callable) -> None:
    both = (FuseResidual(), FuseActivation())
    t = tester(Layers(lambda m, x: nn.functional.relu(m.conv(x) + 2 * m.conv(x))), IMAGE).run(*both)
    t.check_count(conv2d_add_relu=1, relu=0, add=0).check_close()
    t = tester(Layers(lambda m, x: nn.functional.silu(m.conv(x) + x.sum() * torch.ones_like(m.conv(x)))), IMAGE).run(
        *both
    )
    t.check_count(conv2d_add=1, silu=1).check_close()
    t.check_skipped("fuse-activation", "there is no composite of conv2d_add and silu")


def test_keeps_the_layers_place_in_the_model(tester: Callable) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    t = tester(model, TOKENS).run(FuseActivation())
    assert t.applied[0].node == "linear_relu"
    assert t.applied[0].detail == "linear (0.0) + relu"
    (node,) = (n for n in t.program.graph.nodes if n.name == "linear_relu")
    assert next(reversed(node.meta["nn_module_stack"].values()))[0] == "0.0"
    assert node.meta["replaces"] == "relu"
