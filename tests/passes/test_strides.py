"""Operators that want particular strides: they are given them, or what they read keeps its layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from optc_passes.batch_norm import FoldBatchNorm
from optc_passes.channels_last import ChannelsLast
from optc_passes.fuse import Fuse
from optc_passes.identity import RemoveIdentity
from optc_passes.layer_scale import FoldLayerScale
from optc_passes.parallel_linears import MergeParallelLinears
from optc_passes.residual_fusion import FuseResidual
from optc_passes.views import MergeViews

IMAGE = torch.randn(2, 4, 8, 8)


class Model(nn.Module):
    """``compute(module, x)`` with layers at hand."""

    def __init__(self, compute: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.wide, self.narrow = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm, self.gamma, self.mix = nn.BatchNorm2d(4), nn.Parameter(torch.randn(8)), nn.Linear(4, 4)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def rotated(pairs: Tensor) -> Tensor:
    """What rotary position embeddings do: pairs of numbers times a complex one."""
    return torch.view_as_real(torch.view_as_complex(pairs) * (0.6 + 0.8j)).flatten(3)


def pairs(x: Tensor) -> Tensor:
    return x.view(x.shape[0], 4, 8, 4, 2)


DENSE: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "view of a copy": lambda m, x: rotated(pairs(x.transpose(2, 3).contiguous())),
    "view of a reshape": lambda m, x: rotated(pairs(x.transpose(2, 3).reshape(-1, 256))),
    "copy of a slice": lambda m, x: rotated(pairs(torch.cat([x, x], 3)[..., ::2].clone())),
    "copy itself": lambda m, x: rotated(pairs(x.relu()).clone()),
    "view of a later sum": lambda m, x: rotated(pairs(x.transpose(2, 3).contiguous().view(-1, 4, 64).relu())),
    "part of a merged layer": lambda m, x: rotated(pairs(m.wide(x))) + m.narrow(x).sum(),
    "bits": lambda m, x: (
        (x.permute(0, 2, 3, 1).contiguous().view(-1, 64, 4).float().view(torch.int16) % 7).double() + x.sum()
    ),
    "bits of a merged layer": lambda m, x: (m.wide(x).view(torch.complex128) * 1j).real + m.narrow(x).sum(),
    "convolution": lambda m, x: rotated(pairs(m.conv(x))),
    "rectified convolution": lambda m, x: rotated(pairs(m.conv(x).relu())),
}


@pytest.mark.parametrize("case", DENSE)
@pytest.mark.parametrize("passes", [(Fuse,), (ChannelsLast, Fuse)], ids=["fuse", "channels-last"])
def test_dense_readers_are_given_dense_values(tester: Callable, passes: tuple[type, ...], case: str) -> None:
    tester(Model(DENSE[case]), IMAGE).run(*(pass_() for pass_ in passes)).check_close()


def test_a_copy_that_a_dense_reader_needs_is_not_taken_in(tester: Callable) -> None:
    tester(Model(DENSE["view of a copy"]), IMAGE).run(MergeViews()).check_untouched()


def added(m: nn.Module, x: Tensor) -> Tensor:
    """A sum that is laid out as what is added to the layer: the other way round."""
    tokens = x.flatten(2).transpose(1, 2)
    return (tokens + m.mix(tokens)).transpose(1, 2).flatten(1)


RELAID: dict[str, tuple[type, Callable[[nn.Module, Tensor], Tensor]]] = {
    "norm": (FoldBatchNorm, lambda m, x: m.norm(m.conv(x)[:, :, :-1, :-1]).flatten(1)),
    "scale": (FoldLayerScale, lambda m, x: (m.wide(x)[:, :, 1:] * m.gamma).flatten(1)),
    "residual": (FuseResidual, added),
}


@pytest.mark.parametrize("case", RELAID)
def test_views_of_what_is_laid_out_otherwise_copy(tester: Callable, case: str) -> None:
    pass_, compute = RELAID[case]
    assert tester(Model(compute), IMAGE).run(pass_()).check_close().modified


STRIDED: dict[str, tuple[type, Callable[[nn.Module, Tensor], Tensor]]] = {
    "copy": (RemoveIdentity, lambda m, x: x.transpose(2, 3).clone().as_strided((4, 4), (8, 1), 0).sum() + x),
    "number": (RemoveIdentity, lambda m, x: (x.relu()[:, 1:] * 1).exp().as_strided((2, 4), (8, 1), 0).sum() + x),
    "layer": (MergeParallelLinears, lambda m, x: m.wide(x).relu().as_strided((4, 4), (8, 1), 0).sum() + m.narrow(x)),
    "convolution": (ChannelsLast, lambda m, x: m.conv(x).exp().as_strided((4, 8), (8, 1), 0).sum() + x),
    "norm": (FoldBatchNorm, lambda m, x: m.norm(m.conv(x)).exp().as_strided((4, 8), (8, 1), 0).sum() + x),
    "scale": (FoldLayerScale, lambda m, x: (m.wide(x) * m.gamma).exp().as_strided((4, 8), (8, 1), 0).sum() + x),
    "residual": (FuseResidual, lambda m, x: (m.conv(x) + x).exp().as_strided((4, 8), (8, 1), 0).sum() + x),
}


@pytest.mark.parametrize("case", STRIDED)
def test_what_as_strided_takes_apart_keeps_its_strides(tester: Callable, case: str) -> None:
    pass_, compute = STRIDED[case]
    t = tester(Model(compute), IMAGE, dynamic_batch=False).run(pass_()).check_untouched()
    assert {skip.reason for skip in t.skipped} == {"an as_strided takes it apart by the strides it was captured with"}
    t.run(Fuse(), ChannelsLast()).check_close()


def test_views_of_a_copy_that_as_strided_takes_apart_stay(tester: Callable) -> None:
    model = Model(lambda m, x: x.transpose(2, 3).contiguous().view(-1, 256).exp().as_strided((4, 4), (8, 1), 0))
    tester(model, IMAGE, dynamic_batch=False).run(MergeViews()).check_untouched().run(Fuse()).check_close()
