"""fold-batch-norm: where it folds, that the numbers hold, and each reason not to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import optc
from optc_passes.batch_norm import FoldBatchNorm

BN = "_native_batch_norm_legit_no_training"
IMAGE = torch.randn(2, 4, 7, 7)

LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6), torch.randn(2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), IMAGE),
    "conv2d-no-bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), IMAGE),
    "conv2d-grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), IMAGE),
    "conv2d-same": (nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6), IMAGE),
    "conv3d": (nn.Conv3d(2, 3, 3), nn.BatchNorm3d(3), torch.randn(2, 2, 5, 5, 5)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), torch.randn(2, 4, 9)),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), nn.BatchNorm2d(6), IMAGE),
    "conv_transpose2d-grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), IMAGE),
    "conv_transpose3d": (nn.ConvTranspose3d(2, 3, 2), nn.BatchNorm3d(3), torch.randn(2, 2, 4, 4, 4)),
    "linear": (nn.Linear(5, 7), nn.BatchNorm1d(7), torch.randn(2, 5)),
    "no-affine": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), IMAGE),
}


@pytest.mark.parametrize("case", LAYERS)
def test_folds_into_the_layer_before(tester: Callable, case: str) -> None:
    layer, norm, x = LAYERS[case]
    t = tester(nn.Sequential(layer, norm), x).run(FoldBatchNorm())
    t.check_count(**{BN: 0, "getitem": 0}).check_applied("fold-batch-norm", 1).check_close()
    assert t.applied[0].detail == "1 into 0"


def test_folded_constants_keep_precision_and_release_the_old(tester: Callable) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).float()
    program = FoldBatchNorm()(optc.capture(model, (torch.randn(2, 3, 8, 8),))).program
    constants = {name: t for name, t in program.constants() if not name.endswith("num_batches_tracked")}
    assert sorted(tuple(t.shape) for t in constants.values()) == [(8,), (8, 3, 3, 3)]
    assert {t.dtype for t in constants.values()} == {torch.float32}


def test_a_layer_between_two_norms_takes_both(tester: Callable) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    tester(model, IMAGE).run(FoldBatchNorm()).check_count(**{BN: 0}).check_applied("fold-batch-norm", 2).check_close()


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3)])
def test_channels_last_weights_stay_channels_last(tester: Callable, layer: nn.Module) -> None:
    model = nn.Sequential(layer, nn.BatchNorm2d(6)).to(memory_format=torch.channels_last)
    t = tester(model, IMAGE).run(FoldBatchNorm()).check_count(**{BN: 0}).check_close()
    (weight,) = (tensor for _, tensor in t.program.constants() if tensor.dim() == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last)


class Between(nn.Module):
    """A layer, something in between, a batch norm."""

    def __init__(self, layer: nn.Module, between: Callable[[Tensor], Tensor], norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm, self.between = layer, norm, between

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.between(self.layer(x)))


ACROSS = {
    "reflect-pad": (
        nn.Conv2d(4, 6, 3),
        lambda x: functional.pad(x, (1, 1, 1, 1), mode="reflect"),
        nn.BatchNorm2d(6),
        IMAGE,
    ),
    "replicate-pad": (
        nn.Conv2d(4, 6, 3),
        lambda x: functional.pad(x, (1, 0, 2, 0), mode="replicate"),
        nn.BatchNorm2d(6),
        IMAGE,
    ),
    "unsqueeze": (nn.Linear(5, 7), lambda x: x.unsqueeze(-1), nn.BatchNorm1d(7), torch.randn(2, 5)),
    "view": (nn.Linear(5, 7), lambda x: x.view(-1, 7, 1, 1), nn.BatchNorm2d(7), torch.randn(2, 5)),
    "merged-batch": (nn.Linear(5, 7), lambda x: x.view(-1, 7), nn.BatchNorm1d(7), torch.randn(2, 3, 5)),
    "flatten": (nn.Conv2d(4, 6, 3), lambda x: x.flatten(2), nn.BatchNorm1d(6), IMAGE),
    "transpose": (nn.Linear(5, 7), lambda x: x.transpose(1, 2), nn.BatchNorm1d(7), torch.randn(2, 3, 5)),
    "crop": (nn.Conv2d(4, 6, 3), lambda x: x[:, :, 1:-1, 2:], nn.BatchNorm2d(6), IMAGE),
    "dropout": (nn.Conv2d(4, 6, 3), lambda x: functional.dropout(x, training=False), nn.BatchNorm2d(6), IMAGE),
}


@pytest.mark.parametrize("case", ACROSS)
def test_folds_across(tester: Callable, case: str) -> None:
    layer, between, norm, x = ACROSS[case]
    tester(Between(layer, between, norm), x).run(FoldBatchNorm()).check_count(**{BN: 0}).check_close()


def test_zero_pad_is_crossed_where_every_channel_shifts_alike(tester: Callable) -> None:
    """``scale·0 + shift`` is one number for all channels, which the pad then pads with."""
    model = Between(nn.Conv2d(4, 6, 3), lambda x: functional.pad(x, (1, 1, 1, 1)), nn.BatchNorm2d(6))
    t = tester(model, IMAGE)
    with torch.no_grad():
        model.norm.running_mean.zero_()
        model.norm.bias.fill_(0.75)
    t.run(FoldBatchNorm()).check_count(**{BN: 0}).check_close()
    (pad,) = [node for node in t.program.graph.nodes if "pad" in str(node.target)]
    assert pad.args[3] == 0.75


NOT_BEFORE = {
    "valid-conv": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), IMAGE),
    "grouped": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, bias=False), IMAGE),
    "linear": (nn.BatchNorm1d(5), nn.Linear(5, 7, bias=False), torch.randn(2, 5)),
}


@pytest.mark.parametrize("case", NOT_BEFORE)
def test_folds_into_the_layer_after_when_nothing_is_before(tester: Callable, case: str) -> None:
    norm, layer, x = NOT_BEFORE[case]
    tester(nn.Sequential(norm, layer), x).run(FoldBatchNorm()).check_count(**{BN: 0}).check_close()


def test_unshifting_norm_folds_into_a_padding_layer_after(tester: Callable) -> None:
    for layer in (nn.Conv2d(4, 6, 3, padding=1), nn.ConvTranspose2d(4, 6, 3, padding=1)):
        model = nn.Sequential(nn.BatchNorm2d(4), layer)
        t = tester(model, IMAGE)
        with torch.no_grad():
            model[0].running_mean.zero_()
            model[0].bias.zero_()
        t.run(FoldBatchNorm()).check_count(**{BN: 0}).check_close()


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.a(y) * self.b(y)


def test_folds_into_all_layers_after(tester: Callable) -> None:
    t = tester(Fork(), IMAGE).run(FoldBatchNorm()).check_count(**{BN: 0}).check_close()
    assert t.applied[0].detail == "norm into a, b"


class SharedOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class ComputedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(functional.conv2d(x, self.conv.weight * x.mean(), self.conv.bias))


class ComputedScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        return functional.batch_norm(self.conv(x), n.running_mean, n.running_var, n.weight * x.mean(), n.bias)


BLOCKED = {
    "shared output": (SharedOutput(), IMAGE, "conv2d (conv) before it is also used by add"),
    "batch statistics": (
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        IMAGE,
        "statistics of each batch (training mode)",
    ),
    "computed weight": (ComputedWeight(), IMAGE, "the weight of conv2d is not a constant"),
    "computed scale": (ComputedScale(), IMAGE, "its weight is not a constant"),
    "activation on both sides": (
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)),
        IMAGE,
        "relu (1) before it is neither a convolution nor a linear layer, and after it relu_1 (3) is neither",
    ),
    "zero pad between": (
        Between(nn.Conv2d(4, 4, 3), lambda x: functional.pad(x, (1, 1, 1, 1)), nn.BatchNorm2d(4)),
        IMAGE,
        "pad before it pads all channels with 0, which would have to differ by channel",
    ),
    "other channels": (
        Between(nn.Linear(7, 7), lambda x: x, nn.BatchNorm2d(4)),
        IMAGE,
        "dimension 1 is not the channels of linear (layer) before it",
    ),
    "split channels": (
        Between(nn.Linear(5, 12), lambda x: x.view(-1, 4, 3), nn.BatchNorm1d(4)),
        torch.randn(2, 5),
        "view before it is neither",
    ),
    "padding layer after": (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)), IMAGE, "pads with zeros"),
    "an output": (nn.BatchNorm2d(4), IMAGE, "after it the output is neither"),
}


@pytest.mark.parametrize("case", BLOCKED)
def test_says_why_not(tester: Callable, case: str) -> None:
    model, x, reason = BLOCKED[case]
    tester(model, x).run(FoldBatchNorm()).check_untouched().check_skipped("fold-batch-norm", reason)
