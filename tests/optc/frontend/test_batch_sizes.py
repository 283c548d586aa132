"""A graph with a batch that varies computes what the model does for every batch size, or is captured for one."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import optc
from optc import capture
from optc.errors import CaptureError
from optc.frontend.pt2_source import Pt2Source

Forward = Callable[[nn.Module, Tensor], Tensor]


class Written(nn.Module):
    """A linear layer, and what ``forward`` makes of it."""

    def __init__(self, forward: Forward, outputs: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, outputs)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self.layer, x)


CASES: dict[str, tuple[Forward, str]] = {
    "more than three": (lambda f, x: f(x) if x.shape[0] > 3 else x * 2, r"unless batch \S+ [34]$"),
    "odd": (lambda f, x: f(x) if x.shape[0] % 2 else x * 2, r"unless \w+\(Mod\(batch, 2\), 0\)"),
    "the first four": (lambda f, x: f(x)[:4], r"unless batch \S+ [34]$"),
    "a single one": (lambda f, x: f(x) if x.shape[0] == 1 else x * 2, "output 0 of the graph differs for a batch of 1"),
    "squeeze": (lambda f, x: f(x).squeeze(), r"squeeze\(\) drops the batch dimension of a single sample"),
    "squeeze of the batch": (lambda f, x: f(x).squeeze(0), r"squeeze\(\) drops the batch dimension"),
}


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("case", CASES)
def test_code_that_asks_for_the_batch_size_is_captured_for_one(case: str, batch: int) -> None:
    forward, reason = CASES[case]
    model, x = Written(forward).eval(), torch.randn(batch, 6)
    program = capture(model, (x,))
    assert not program.dynamic_batch
    (note,) = program.info.notes
    assert note.startswith(f"captured for batch size {batch} only, the batch cannot vary: ")
    assert re.search(reason, note), note
    torch.testing.assert_close(program.run(x)[0], model(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda f, x: f(x).relu(),
        lambda f, x: f(x) / x.shape[0],
        lambda f, x: f(x).view(x.shape[0], 2, 3).transpose(1, 2).reshape(x.shape[0], -1),
        lambda f, x: f(x).unsqueeze(-1).squeeze(-1),
        lambda f, x: torch.cat([f(x), x])[: x.shape[0]],
        lambda f, x: nn.functional.dropout(f(x), training=True),
    ],
    ids=["plain", "mean", "views", "named squeeze", "slice of the batch", "random"],
)
def test_other_code_is_captured_for_any(forward: Forward) -> None:
    program = capture(Written(forward), (torch.randn(2, 6),))
    assert program.dynamic_batch
    assert program.info.notes == ()


def test_two_inputs_of_one_batch_size_may_vary_together() -> None:
    program = capture(nn.Bilinear(3, 4, 2), (torch.randn(2, 3), torch.randn(2, 4)))
    assert program.dynamic_batch


def test_the_batch_of_the_examples_decides_what_is_optimized() -> None:
    model, x = Written(CASES["more than three"][0]).eval(), torch.randn(5, 6)
    optimized = optc.optimize(
        model, (x,), "fuse", backend="onnxruntime", measure=False, target=optc.Target(threads=1, batch=5)
    )
    torch.testing.assert_close(optimized(x), model(x))
    with pytest.raises(CaptureError, match="the model takes a batch of 5 only, not of 2"):
        optc.optimize(model, (x,), "fuse", backend="onnxruntime", measure=False, target=optc.Target(batch=2))


class Guesses(nn.Module):
    """Its outputs depend on what no graph holds."""

    def forward(self, x: Tensor) -> Tensor:
        return x * random.random()


def test_a_graph_that_differs_from_the_model_is_refused() -> None:
    with pytest.raises(CaptureError, match="cannot capture Guesses: output 0 of the graph differs for the example"):
        capture(Guesses(), (torch.randn(2, 3),))


@pytest.mark.parametrize(
    ("limit", "forward", "reason"),
    [
        ((2, 4), lambda f, x: f(x), "it was exported for batches from 2 to 4"),
        ((2, 64), lambda f, x: f(x) if x.shape[0] % 2 == 0 else x, "it was exported for batches with"),
    ],
    ids=["range", "condition"],
)
def test_what_a_file_says_of_its_batch_is_kept_to(
    tmp_path: Path, limit: tuple[int, int], forward: Forward, reason: str
) -> None:
    model, x = Written(forward).eval(), torch.randn(4, 6)
    batch = torch.export.Dim("batch", min=limit[0], max=limit[1]) if "from" in reason else torch.export.Dim.DYNAMIC
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: batch},)), tmp_path / "model.pt2")
    built = Pt2Source().build(str(tmp_path / "model.pt2"), pretrained=True, num_classes=None, seed=0)
    assert built.example_inputs is not None
    program = capture(built.module, built.example_inputs)
    assert not program.dynamic_batch
    assert reason in program.info.notes[0]


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (lambda x: x, (torch.ones(2, 3),), "the model is a function — give a torch.nn.Module"),
        (nn.ReLU(), torch.ones(2, 3).numpy(), "the example inputs are a ndarray — give a tuple of tensors"),
        (nn.ReLU(), {"x": torch.ones(2, 3)}, "the example inputs are a dict"),
        (nn.ReLU(), None, "the example inputs are a NoneType"),
        (nn.ReLU(), ([1, 2],), "input 1 is a list — give one tensor per argument"),
        (nn.ReLU(), (torch.ones(0, 3),), "input 1 is an empty batch — give at least one sample"),
    ],
    ids=["function", "numpy", "dict", "none", "list", "empty"],
)
def test_what_is_no_model_or_no_inputs_is_told(model: nn.Module, inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(CaptureError) as caught:
        optc.optimize(model, inputs, "fuse", measure=False)
    assert message in str(caught.value)


class CountsItsBatch(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x * 2, x.shape[0]


def test_a_number_among_the_outputs_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"its output 1 is \w+, not a tensor"):
        capture(CountsItsBatch(), (torch.randn(2, 3),))


def test_a_file_for_more_than_optc_puts_together_varies_and_says_so(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", max=64)
    exported = torch.export.export(nn.Linear(6, 3), (torch.randn(2, 6),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, tmp_path / "model.pt2")
    built = Pt2Source().build(str(tmp_path / "model.pt2"), pretrained=True, num_classes=None, seed=0)
    assert "was exported for batches up to 64" in built.notes[1]
    assert built.example_inputs is not None
    assert capture(built.module, built.example_inputs).dynamic_batch


@pytest.mark.parametrize(
    "take",
    [lambda x: x[:, 0], lambda x: x[:, :, ::2], lambda x: x.transpose(1, 2), lambda x: x[::2]],
    ids=["slice", "steps", "transposed", "every other sample"],
)
def test_the_strides_of_an_input_fix_no_batch(take: Callable[[Tensor], Tensor]) -> None:
    x = take(torch.randn(4, 4, 8, 8))
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 8), nn.ReLU()).eval()
    program = capture(model, (x,))
    assert program.dynamic_batch, program.info.notes
    torch.testing.assert_close(program.run(x)[0], model(x))


@functools.lru_cache
def positions(count: int) -> Tensor:
    return torch.arange(count) / count


class KeepsATable(nn.Module):
    """What it computes from its input's width it keeps, outside of itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x + positions(x.shape[1])


def test_what_a_model_keeps_in_a_cache_are_no_tensors_of_the_exporter() -> None:
    positions.cache_clear()
    x = torch.randn(2, 5)
    assert capture(KeepsATable(), (x,)).dynamic_batch
    torch.testing.assert_close(KeepsATable()(x), x + torch.arange(5) / 5)


class ReturnsWhatItChanged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        changed = x.relu_()
        return changed, self.layer(changed)


def test_an_input_that_was_changed_may_be_an_output() -> None:
    model, x = ReturnsWhatItChanged().eval(), torch.randn(2, 3)
    program = capture(model, (x.clone(),))
    for got, wanted in zip(program.run(x.clone()), model(x.clone()), strict=True):
        torch.testing.assert_close(got, wanted)


class Attends(nn.Module):
    """Its masked-out tokens PyTorch writes zeros for where it does not export."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_attention_is_compared_as_it_is_exported() -> None:
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[:, 3:] = True
    fast = torch.backends.mha.get_fastpath_enabled()
    program = capture(Attends(), (torch.randn(2, 5, 8), padding))
    assert program.dynamic_batch, program.info.notes
    assert torch.backends.mha.get_fastpath_enabled() == fast


class AttendsOtherwise(nn.Module):
    """Takes another way for a single sample, which only values tell, and has attention, which draws nothing here."""

    def forward(self, x: Tensor) -> Tensor:
        attended = nn.functional.scaled_dot_product_attention(x, x, x)
        return attended * 3 if x.shape[0] == 1 else attended


def test_attention_without_dropout_is_not_random() -> None:
    program = capture(AttendsOtherwise(), (torch.randn(2, 2, 4, 8),))
    assert not program.dynamic_batch
    assert "differs for a batch of 1" in program.info.notes[0]
