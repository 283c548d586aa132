"""Capturing modules: shared weights, batch sizes, and failures that point at the model's own code."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from optc import capture
from optc.errors import CaptureError
from optc.frontend.factory_source import FactorySource


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout()
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu_(self.norm(self.conv(x))).mean((2, 3))
        return {"scores": self.head(self.drop(y)), "features": y}


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([image * 2 for image in x])


def written_model(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> nn.Module:
    """A model whose ``forward`` is ``body``, in a file of its own."""
    monkeypatch.chdir(folder)
    module = "written_" + folder.name
    lines = ["from torch import nn", "import torch", "class Model(nn.Module):", "    def forward(self, x):"]
    (folder / f"{module}.py").write_text("\n".join(lines) + "\n" + textwrap.indent(textwrap.dedent(body), " " * 8))
    return FactorySource().build(f"{module}:Model", pretrained=False, num_classes=None, seed=0).module


def test_graph_computes_what_the_model_does_at_any_batch_size() -> None:
    model = Small().eval()
    program = capture(model, (torch.randn(1, 3, 8, 8),))
    assert program.dynamic_batch
    assert len(program.example_inputs[0]) == 2
    for batch in (1, 3):
        x = torch.randn(batch, 3, 8, 8)
        expected = model(x)
        scores, features = program.run(x)
        torch.testing.assert_close(scores, expected["scores"])
        torch.testing.assert_close(features, expected["features"])


def test_parameters_are_shared_not_copied() -> None:
    model = Small()
    program = capture(model, (torch.randn(1, 3, 8, 8),))
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values()}
    floating = [tensor for _, tensor in program.constants() if tensor.is_floating_point()]
    assert len(floating) == 8
    assert all(tensor.data_ptr() in theirs for tensor in floating)


def test_training_flags_are_restored_also_after_a_failure() -> None:
    model = Small().train()
    model.norm.eval()
    flags = [module.training for module in model.modules()]
    capture(model, (torch.randn(1, 3, 8, 8),))
    assert [module.training for module in model.modules()] == flags
    with pytest.raises(CaptureError):
        capture(model, (torch.randn(1, 7, 8, 8),))
    assert [module.training for module in model.modules()] == flags


def test_model_that_fixes_its_batch_is_captured_for_it_with_a_note() -> None:
    x = torch.randn(3, 2)
    program = capture(FixedBatch(), (x,))
    assert not program.dynamic_batch
    assert len(program.example_inputs[0]) == 3
    assert program.info.notes == (
        "captured for batch size 3 only, the batch cannot vary: the model's code fixes its size",
    )
    torch.testing.assert_close(program.run(x)[0], x * 2)


def test_an_input_without_a_batch_is_named() -> None:
    with pytest.raises(CaptureError, match="input 2 has no batch dimension"):
        capture(nn.Bilinear(4, 4, 2), (torch.randn(2, 4), torch.tensor(0.5)))


def test_static_batch_when_asked_for_needs_no_note() -> None:
    program = capture(Small(), (torch.randn(1, 3, 8, 8),), dynamic_batch=False)
    assert not program.dynamic_batch
    assert program.info.notes == ()
    assert len(program.example_inputs[0]) == 1


def test_data_dependent_control_flow_names_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = written_model(tmp_path, monkeypatch, "y = x * 2\nif y.sum() > 0:\n    return y\nreturn x\n")
    with pytest.raises(CaptureError) as caught:
        capture(model, (torch.randn(1, 3),))
    message = str(caught.value)
    assert message.startswith("cannot capture Model: its control flow or shapes depend on tensor values")
    assert f"{tmp_path}/written_{tmp_path.name}.py:6: if y.sum() > 0:" in message
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return torch.cat([x, None])", "expected Tensor as element 1"),
        ("return torch.from_numpy(x.numpy())", "numpy"),
        ("return x @ torch.ones(7, 2)", "shapes cannot be multiplied"),
    ],
)
def test_failures_carry_reason_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, reason: str
) -> None:
    model = written_model(tmp_path, monkeypatch, body)
    with pytest.raises(CaptureError) as caught:
        capture(model, (torch.randn(2, 3),))
    assert reason in str(caught.value)
    assert f".py:5: {body}" in str(caught.value)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("convolution", "rank"), [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)])
def test_paddings_in_words_are_captured_in_numbers(convolution: type[nn.Module], rank: int, padding: str) -> None:
    model = nn.Sequential(convolution(3, 4, 3, padding=padding, dilation=2), convolution(4, 5, 2, padding=padding))
    program = capture(model, (torch.randn(2, 3, *[7] * rank),))
    calls = [node for node in program.graph.nodes if node.op == "call_function" and "conv" in str(node.target)]
    # In words there is only what pads one side more than the other.
    assert [node.target._overloadname for node in calls] == ["default", "padding" if padding == "same" else "default"]
    x = torch.randn(3, 3, *[7] * rank)
    torch.testing.assert_close(program.run(x)[0], model(x))


class WritesToItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x -= 1
        x *= 2
        return x.relu()


def test_what_a_model_writes_into_its_input_stays_in_the_graph() -> None:
    x = torch.randn(2, 3)
    program = capture(WritesToItsInput(), (x.clone(),))
    before = x.clone()
    torch.testing.assert_close(program.run(x)[0], ((x - 1) * 2).relu())
    assert torch.equal(x, before)
    assert not any(node.target._schema.is_mutable for node in program.graph.nodes if node.op == "call_function")


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x + self.seen


def test_a_model_that_keeps_state_is_refused() -> None:
    model = Counts()
    with pytest.raises(CaptureError, match=r"each call changes its state \(seen\)"):
        capture(model, (torch.randn(2, 3),))
    assert not model.seen.any(), "its state is as it was"


class SometimesNothing(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x.relu(), None


def test_outputs_that_are_no_tensors_are_refused() -> None:
    with pytest.raises(CaptureError, match="its output 1 is None, not a tensor"):
        capture(SometimesNothing(), (torch.randn(2, 3),))
