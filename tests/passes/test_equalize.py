"""equalize: channels scaled between layers; outputs equal, quantization noise less."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import optc
import optc.rewrite
from optc_passes.activation_fusion import FuseActivation
from optc_passes.constants import FoldConstants
from optc_passes.equalize import Equalize
from optc_passes.quant import Quant

TOKENS, IMAGE = torch.randn(8, 6, 16), torch.randn(2, 4, 9, 9)


class Block(nn.Module):
    """A layer norm read by two linear layers, one with a GELU; channels of very different size."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(16, 8)
        self.c = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.c(nn.functional.gelu(self.a(y))) + self.b(y)


class Outliers(Block):
    """As trained transformers have them: a few channels a hundred times the others."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.norm.weight[3] *= 100
            self.norm.weight[7] *= 60
            for layer in (self.a, self.b):
                layer.weight[:, [3, 7]] /= 60


def convolutions(between: nn.Module, groups: int = 1, padding: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3), between, nn.Conv2d(8, 8, 3, padding=padding, groups=groups))


class Batches:
    description = "test batches"

    def __init__(self, *batches: Tensor) -> None:
        self._batches = batches

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([(batch,) for batch in self._batches])


@pytest.mark.parametrize("fused", [False, True])
def test_after_a_layer_norm(tester: Callable, fused: bool) -> None:
    passes = (FuseActivation(),) if fused else ()
    t = tester(Block(), TOKENS).run(*passes, Equalize()).check_applied("equalize", 1).check_close()
    assert "gelu" in next(skip.reason for skip in t.skipped if skip.rule == "equalize")


@pytest.mark.parametrize("between", [nn.Identity(), nn.ReLU()], ids=["nothing", "relu"])
@pytest.mark.parametrize("groups", [1, 8], ids=["dense", "depthwise"])
@pytest.mark.parametrize("fused", [False, True])
def test_between_layers(tester: Callable, between: nn.Module, groups: int, fused: bool) -> None:
    passes = (FuseActivation(),) if fused else ()
    tester(convolutions(between, groups), IMAGE).run(*passes, Equalize()).check_applied("equalize", 1).check_close()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (convolutions(nn.Hardswish()), "hardswish (1) is neither"),
        (convolutions(nn.ReLU6()), "hardtanh (1) is neither"),
        (convolutions(nn.MaxPool2d(2)), "max_pool2d (1) is neither"),
    ],
)
def test_says_why_not(tester: Callable, model: nn.Module, reason: str) -> None:
    t = tester(model, IMAGE).run(Equalize()).check_untouched()
    assert reason in t.skipped[0].reason


def test_what_is_fused_and_does_not_commute_is_named(tester: Callable) -> None:
    t = tester(convolutions(nn.ReLU6()), IMAGE).run(FuseActivation(), Equalize())
    assert "relu6 is fused to it" in next(skip.reason for skip in t.skipped if skip.rule == "equalize")


def test_outlier_channels_cost_less_in_int8() -> None:
    torch.manual_seed(0)
    model = Outliers().eval()
    batches = [torch.randn(8, 6, 16) for _ in range(4)]
    program = optc.capture(model, (batches[0][:2],))
    context = optc.PassContext(calibration=Batches(*batches))
    unseen = torch.randn(64, 6, 16)
    wanted = program.run(unseen)[0]

    def noise(quantized: optc.Program) -> float:
        return float((quantized.run(unseen)[0] - wanted).square().sum() / wanted.square().sum())

    equal = Equalize()(program, context).program
    torch.testing.assert_close(equal.run(unseen)[0], wanted, rtol=1e-4, atol=1e-4)
    plain, smooth = (noise(Quant()(each, context).program) for each in (program, equal))
    assert smooth < plain / 4


def test_the_strength_says_how_much_moves() -> None:
    torch.manual_seed(0)
    program = optc.capture(Outliers().eval(), (TOKENS,))
    context = optc.PassContext(calibration=Batches(TOKENS))

    def spread(strength: float) -> tuple[float, float]:
        """Largest over smallest channel of what the norm writes, and of the weights that read it."""
        made = Equalize(strength=strength)(program, context).program
        (norm,) = made.graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default)
        weights = [optc.rewrite.constant_of(made, reader.args[1]) for reader in norm.users]
        columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
        written = []

        class Watcher(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> object:
                value = super().run_node(n)
                if n is norm:
                    written.append(value.abs().amax((0, 1)))
                return value

        with torch.no_grad():
            Watcher(made.module).run(TOKENS)
        return float(written[0].max() / written[0].min()), float(columns.max() / columns.min())

    nothing, half, all_of_it = spread(0.0), spread(0.5), spread(1.0)
    assert nothing[0] > half[0] > all_of_it[0] == pytest.approx(1.0, rel=1e-4)
    assert pytest.approx(1.0, rel=1e-4) == nothing[1] < half[1] < all_of_it[1]


def test_a_vector_for_a_weight_is_left_alone(tester: Callable) -> None:
    class Vector(Block):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.norm(x), self.a.weight[0])

    t = tester(Vector(), TOKENS).run(FoldConstants(), Equalize())
    assert {skip.reason for skip in t.skipped} == {"the weight of linear is a vector"}
    t.check_close()


class AddsItself(nn.Module):
    """Layers whose input is added to their output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.conv = nn.LayerNorm(16), nn.Linear(16, 16), nn.Conv2d(4, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        with torch.no_grad():
            self.norm.weight[3] *= 100

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        y, z = self.norm(x), self.conv(image)
        return y + self.a(y), z + self.depthwise(z)


def test_what_a_layer_adds_as_well_is_not_scaled() -> None:
    torch.manual_seed(0)
    inputs = (TOKENS, torch.randn(8, 4, 9, 9))
    made = optc.optimize(AddsItself(), inputs, "fuse,equalize", calibration=[inputs], backend="eager", measure=False)
    reasons = [skip.reason for record in made.report.passes for skip in record.skipped if record.name == "equalize"]
    assert any(reason.endswith("after it adds it as well") for reason in reasons)
