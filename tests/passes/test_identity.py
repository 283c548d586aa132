"""remove-identity: each operator that does nothing goes; its look-alikes stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from optc_passes.identity import RemoveIdentity

IMAGE = torch.randn(2, 4, 6, 6)
Compute = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """``compute`` between two operators that stay."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.compute = compute
        self.one = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x.relu()).sigmoid()


NOTHING: dict[str, Compute] = {
    "dropout": lambda x: functional.dropout(x, 0.5, training=False),
    "dropout of nothing": lambda x: functional.dropout(x, 0.0, training=True),
    "channel dropout": lambda x: functional.dropout2d(x, 0.5, training=False),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "cast to its type": lambda x: torch.ops.aten._to_copy(x, dtype=torch.float64),
    "view of its shape": lambda x: x.view(-1, 4, 6, 6),
    "reshape of its shape": lambda x: x.reshape(x.shape),
    "expand to its shape": lambda x: x.expand(-1, -1, -1, -1),
    "permute": lambda x: x.permute(0, 1, 2, 3),
    "transpose": lambda x: x.transpose(-1, 3),
    "whole slice": lambda x: x[:, :, 0:6],
    "pad by nothing": lambda x: functional.pad(x, (0, 0, 0, 0)),
    "roll by nothing": lambda x: torch.roll(x, (0, 0), (2, 3)),
    "times one": lambda x: x * 1,
    "over one": lambda x: x / 1.0,
    "plus zero": lambda x: x + 0,
    "minus zero": lambda x: x - 0.0,
    "pool to its size": lambda x: functional.adaptive_avg_pool2d(x, (6, 6)),
    "pool of single pixels": lambda x: functional.avg_pool2d(x, 1),
    "maximum of single pixels": lambda x: functional.max_pool2d(x, 1),
    "several": lambda x: functional.dropout(x.view(-1, 4, 6, 6) * 1, training=False) + 0,
}


@pytest.mark.parametrize("case", NOTHING)
def test_removes(tester: Callable, case: str) -> None:
    t = tester(Between(NOTHING[case]), IMAGE).run(RemoveIdentity()).check_close()
    assert (
        sum(
            node.op == "call_function" and node.target is not torch.ops.aten.sym_size.int
            for node in t.program.graph.nodes
        )
        == 2
    )


def test_multiplication_by_a_constant_one(tester: Callable) -> None:
    model = Between(lambda x: x * model.one)
    tester(model, IMAGE).run(RemoveIdentity()).check_count(mul=0).check_close()


SOMETHING: dict[str, Compute] = {
    "cast": lambda x: x.to(torch.float32),
    "view of another shape": lambda x: x.view(-1, 4, 36),
    "expand": lambda x: x.mean(1, keepdim=True).expand(-1, 4, -1, -1),
    "permute": lambda x: x.permute(0, 1, 3, 2),
    "slice": lambda x: x.narrow(2, 1, 5),
    "every second": lambda x: torch.ops.aten.slice(x, 2, 0, 6, 2),
    "pad": lambda x: functional.pad(x, (0, 1)),
    "crop by padding": lambda x: functional.pad(x, (-1, 1)),
    "times two": lambda x: x * 2,
    "plus one": lambda x: x + 1,
    "zero less x": lambda x: 0 - x,
    "pool": lambda x: functional.adaptive_avg_pool2d(x, (3, 3)),
    "strided pixels": lambda x: functional.max_pool2d(x, 1, stride=2),
    "another memory format": lambda x: x.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("case", SOMETHING)
def test_keeps_look_alikes(tester: Callable, case: str) -> None:
    tester(Between(SOMETHING[case]), IMAGE).run(RemoveIdentity()).check_untouched()


@pytest.mark.parametrize("dims", [None, (2, "2*s0", 6, 6)])
def test_sizes_equal_at_the_example_batch_alone_are_not_equal(tester: Callable, dims: tuple | None) -> None:
    """What holds at the example's batch of 2 may not at another, or where it is not known what varies."""
    t = tester(Between(lambda x: x.view(-1, 4, 6, 6)), IMAGE)
    (view,) = t.program.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)
    view.meta["dims"] = dims
    t.run(RemoveIdentity()).check_untouched()


class Outputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.clone(), x.relu()


def test_an_output_never_becomes_the_input_itself(tester: Callable) -> None:
    t = tester(Outputs(), IMAGE).run(RemoveIdentity()).check_untouched()
    t.check_skipped("remove-identity", "an output would be the same tensor as x")


class Mask(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        kept, mask = torch.native_dropout(x.relu(), 0.5, False)
        return kept * mask


def test_dropout_whose_mask_is_used_stays(tester: Callable) -> None:
    t = tester(Mask(), IMAGE).run(RemoveIdentity()).check_untouched()
    t.check_skipped("remove-identity", "its mask is used")


def test_view_behind_a_removed_copy_still_works(tester: Callable) -> None:
    """A copy of a slice is dense and can be viewed flat; the slice itself cannot."""
    model = Between(lambda x: torch.ops.aten.slice(x, 2, 0, 6, 2).clone().view(-1, 72))
    tester(model, IMAGE).run(RemoveIdentity()).check_count(clone=0, view=0, reshape=1).check_close()


@pytest.mark.parametrize(("fill", "left"), [(0.0, 0), (0.5, 2)])
def test_biases_of_zeros(tester: Callable, fill: float, left: int) -> None:
    model = nn.Sequential(nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(48, 5))
    for layer in (model[0], model[2]):
        nn.init.constant_(layer.bias, fill)
    t = tester(model, IMAGE).run(RemoveIdentity()).check_close()
    assert sum(name.endswith("bias") for name, _ in t.program.constants()) == left
