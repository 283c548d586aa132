"""channels_last: which weights and values change their layout, where copies stand, and that no value changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import optc
from optc.frontend.load import load_model
from optc.lowering.graph_file import read_graph, write_graph
from optc_passes.channels_last import ChannelsLast
from optc_passes.fuse import Fuse

X = torch.randn(2, 3, 12, 12)


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


class Run:
    """A program, and what the pass made of it. It is run twice, the second time for nothing."""

    def __init__(self, model: nn.Module, *inputs: Tensor) -> None:
        torch.manual_seed(0)
        self.before = optc.capture(model, inputs)
        self.result = ChannelsLast()(self.before)
        self.program = self.result.program
        assert not ChannelsLast()(self.program).modified
        self.rules = [change.rule for change in self.result.applied]

    def check_same(self) -> None:
        inputs = [torch.randn(3, *tensor.shape[1:]) for tensor in self.before.example_inputs]
        for got, want in zip(self.program.run(*inputs), self.before.run(*inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            assert got.stride() == want.stride()


def test_values_stay_channels_last_between_convolutions() -> None:
    run = Run(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)), X)
    assert sorted(run.rules) == ["from-channels-last", "to-channels-last", "weight", "weight"]
    calls = [n for n in run.program.graph.nodes if n.op == "call_function" and isinstance(n.meta["val"], Tensor)]
    assert [is_channels_last(n.meta["val"]) for n in calls] == [True] * (len(calls) - 1) + [False]
    run.check_same()


def test_flattened_outputs_need_no_copy_back() -> None:
    run = Run(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(800, 5)), X)
    assert run.rules == ["weight", "to-channels-last"]
    run.check_same()


def test_a_model_that_is_channels_last_already_is_left_alone() -> None:
    """A single channel is in both formats at once."""
    run = Run(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 5)), torch.randn(2, 1, 12, 12))
    assert not run.result.modified


def test_views_of_the_old_layout_still_hold() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y.view(y.shape[0], 4, -1).permute(0, 2, 1)

    Run(Model(), X).check_same()


def test_a_value_and_a_weight_of_two_convolutions_are_stored_once() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.conv(x), self.conv(x.relu()) + torch.nn.functional.conv2d(x, self.conv.weight, padding=1)

    run = Run(Model(), X)
    assert run.rules.count("to-channels-last") == 2
    assert run.program.constant_bytes() == run.before.constant_bytes()
    run.check_same()


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 6, 3, groups=3), nn.ConvTranspose2d(3, 6, 3, stride=2), nn.Conv2d(3, 6, 3, padding="same")],
    ids=["grouped", "transposed", "same"],
)
def test_every_kind_of_convolution(layer: nn.Module) -> None:
    run = Run(nn.Sequential(layer, nn.Hardswish()), X)
    assert run.result.modified
    run.check_same()


def test_composites_take_channels_last_too() -> None:
    program = optc.capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), (X,))
    fused = Fuse()(program).program
    result = ChannelsLast()(fused)
    (composite,) = (n for n in result.program.graph.nodes if "optc" in str(n.target))
    assert is_channels_last(composite.meta["val"])
    x = torch.randn(3, *X.shape[1:])
    torch.testing.assert_close(result.program.run(x), program.run(x), rtol=1e-4, atol=1e-5)


class Unbatched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Computed(Unbatched):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, self.conv.weight * x.mean())


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (Unbatched(), X[0], "its input has no batch dimension"),
        (Computed(), X, "its weight is computed, not a constant"),
    ],
)
def test_what_is_left_alone_has_a_reason(model: nn.Module, x: Tensor, reason: str) -> None:
    program = optc.capture(model, (x,), dynamic_batch=False)
    result = ChannelsLast()(program)
    assert not result.modified
    assert [skip.reason for skip in result.skipped] == [reason]


def test_other_ranks_have_no_channels_last() -> None:
    run = Run(nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(40, 2)), torch.randn(2, 3, 12))
    assert not run.result.modified
    assert not run.result.skipped


@pytest.mark.parametrize("name", ["resnet18", pytest.param("mobilenetv3_small_050", marks=pytest.mark.slow)])
def test_whole_models(name: str, tmp_path: Path) -> None:
    model = load_model(name, weights="random", num_classes=10).module
    run = Run(model, torch.randn(2, 3, 64, 64))
    run.check_same()
    convolutions = [n for n in run.program.graph.nodes if "conv2d" in str(n.target)]
    assert convolutions
    assert all(is_channels_last(n.meta["val"]) or 1 in n.meta["val"].shape[1:] or _one_pixel(n) for n in convolutions)
    write_graph(run.program, tmp_path)
    read = read_graph(tmp_path, 1)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(read.run(x), run.before.run(x), rtol=1e-4, atol=1e-4)


def _one_pixel(node: fx.Node) -> bool:
    return tuple(node.meta["val"].shape[2:]) == (1, 1)
