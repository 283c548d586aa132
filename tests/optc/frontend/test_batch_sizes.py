"""A graph with a batch that varies computes what the model does for every batch size, or is captured for one."""

from __future__ import annotations

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
    "more than three": (lambda f, x: f(x) if x.shape[0] > 3 else x * 2, "for batches beyond"),
    "odd": (lambda f, x: f(x) if x.shape[0] % 2 else x * 2, r"unless \w+\(Mod\(batch, 2\), 0\)"),
    "the first four": (lambda f, x: f(x)[:4], "for batches beyond"),
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
        ((2, 4), lambda f, x: f(x), "for batches beyond 2 to 4"),
        ((2, 64), lambda f, x: f(x) if x.shape[0] % 2 == 0 else x, "it was exported for batches with"),
    ],
    ids=["range", "condition"],
)
def test_what_a_file_says_of_its_batch_is_kept_to(
    tmp_path: Path, limit: tuple[int, int], forward: Forward, reason: str
) -> None:
    model, x = Written(forward).eval(), torch.randn(4, 6)
    batch = torch.export.Dim("batch", min=limit[0], max=limit[1]) if "beyond" in reason else torch.export.Dim.DYNAMIC
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
