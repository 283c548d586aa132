"""Cutting a program into stages: each computes from what the one before sent, and together what the whole did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import optc
from optc.errors import OptcError
from optc.passmanager.manager import build_passes
from optc.program import Program
from optc.stages import Stage, run_stages, split, stage_count
from optc.torchvision_ops import declare_torchvision_ops

Cut = Callable[[Program, int], Program]


def same(program: Program, cut_program: Program, *inputs: Tensor) -> None:
    whole = program.run(*inputs)
    parts = run_stages(split(cut_program), *inputs)
    assert len(whole) == len(parts)
    for expected, found in zip(whole, parts, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def every_cut(program: Program, most: int = 1000) -> list[Program]:
    """The program cut in two behind each of its operators, or behind about ``most`` of them."""
    nodes = [node.name for node in program.graph.nodes if node.op == "call_function"]
    found = []
    for behind in range(1, len(nodes), max(1, (len(nodes) - 1) // most)):
        forked = program.fork()
        for index, node in enumerate(node for node in forked.graph.nodes if node.op == "call_function"):
            node.meta["stage"] = int(index >= behind)
        found.append(forked)
    return found


def split_or_reason(program: Program) -> tuple[Stage, ...] | str:
    try:
        return split(program)
    except OptcError as error:
        return str(error)


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_residuals_cross_several_cuts_at_any_batch(residual_model: nn.Module, cut: Cut, stages: int) -> None:
    program = optc.capture(residual_model, (torch.randn(2, 8),))
    parts = split(cut(program, stages))
    assert stage_count(cut(program, stages)) == len(parts) == stages
    assert all(part.program.dynamic_batch for part in parts)
    assert sum(part.program.operator_count() for part in parts) == program.operator_count()
    for batch in (1, 2, 7):
        same(program, cut(program, stages), torch.randn(batch, 8))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "patch_size": 8}),
        ("resnet18", {}),
        ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (2,), "num_heads": (3,), "embed_dim": 24}),
    ],
)
def test_every_cut_of_a_real_model_computes_what_it_did_or_is_refused(name: str, options: dict[str, object]) -> None:
    declare_torchvision_ops()  # before timm imports torchvision
    import timm

    model = timm.create_model(name, num_classes=5, **options).eval()
    size = int(options.get("img_size", 32))  # type: ignore[call-overload]
    program = optc.capture(model, (torch.randn(2, 3, size, size),))
    x = torch.randn(3, 3, size, size)
    whole = program.run(x)[0]
    refused = 0
    for each in every_cut(program, most=12):
        parts = split_or_reason(each)
        if isinstance(parts, str):
            assert "grow with the batch" in parts or "no operator" in parts
            refused += 1
            continue
        torch.testing.assert_close(run_stages(parts, x)[0], whole, rtol=1e-4, atol=1e-5)
    assert refused <= 2


class Tied(nn.Module):
    """One weight at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.middle = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.middle(torch.relu(self.shared(x))))


def test_a_tied_weight_is_in_each_stage_that_reads_it_and_nothing_else_is(cut: Cut) -> None:
    model = Tied()
    program = optc.capture(model, (torch.randn(2, 8),))
    first, middle, last = split(cut(program, 4))[0], split(cut(program, 4))[2], split(cut(program, 4))[3]
    addresses = {tensor.data_ptr() for _, tensor in first.program.constants()}
    assert {tensor.data_ptr() for _, tensor in last.program.constants()} == addresses
    assert addresses == {model.shared.weight.data_ptr(), model.shared.bias.data_ptr()}
    assert {tensor.data_ptr() for _, tensor in middle.program.constants()} == {
        model.middle.weight.data_ptr(),
        model.middle.bias.data_ptr(),
    }
    same(program, cut(program, 4), torch.randn(3, 8))


class Several(nn.Module):
    """Two inputs, the second read at the end; outputs from different places, one of them an input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        early = self.one(x)
        late = self.three(torch.relu(self.two(early))) + y
        return early, late, x


def test_outputs_leave_at_the_last_stage_and_late_inputs_are_relayed(cut: Cut) -> None:
    program = optc.capture(Several(), (torch.randn(2, 4), torch.randn(2, 4)))
    first, second, third = split(cut(program, 3))
    assert [wire.name for wire in third.sends] == ["output_0", "output_1", "output_2"]
    assert {"x", "y", "linear"} <= {wire.name for wire in second.sends}
    assert first.sends == second.receives
    assert second.receives[0].bytes(5) == 5 * 4 * 4
    same(program, cut(program, 3), torch.randn(5, 4), torch.randn(5, 4))


class Windows(nn.Module):
    """The batch multiplied, then moved to the second place: what is handed on is batch first all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        windows = torch.relu(self.inner(x.reshape(batch * 6, 4)))
        moved = torch.relu(windows.reshape(batch, 6, 4).transpose(0, 1))
        joined = torch.cat([self.token.expand(1, batch, 4), moved])
        return self.outer(joined).transpose(0, 1).reshape(batch, 14)


def test_what_is_handed_on_is_batch_first() -> None:
    program = optc.capture(Windows(), (torch.randn(2, 6, 4),))
    shapes = set()
    for each in every_cut(program):
        parts = split_or_reason(each)
        if isinstance(parts, str):
            assert "no operator" in parts  # sizes and constants alone are no stage
            continue
        sent = parts[0].sends
        same(program, each, torch.randn(3, 6, 4))
        assert all(wire.shape[0] is None for wire in sent)
        shapes.update(wire.shape for wire in sent)
    assert (None, 6, 4) in shapes


def test_fused_and_quantized_programs_are_cut(residual_model: nn.Module, cut: Cut) -> None:
    program = optc.capture(residual_model, (torch.randn(2, 8),))
    context = optc.PassContext(calibration=Batches([torch.randn(4, 8) for _ in range(4)]))
    quantized = build_passes("fuse,quant")(program, context).program
    assert any("quantize" in str(node.target) for node in quantized.graph.nodes)
    for stages in (2, 3):
        same(quantized, cut(quantized, stages), torch.randn(5, 8))


class Batches:
    """Calibration batches."""

    description = "noise"

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([(tensor,) for tensor in self._tensors])


def test_a_fixed_batch_stays_fixed(residual_model: nn.Module, cut: Cut) -> None:
    program = optc.capture(residual_model, (torch.randn(3, 8),), dynamic_batch=False)
    parts = split(cut(program, 2))
    assert parts[0].sends[0].shape[0] == 3
    same(program, cut(program, 2), torch.randn(3, 8))


def test_what_cannot_be_cut_is_refused(residual_model: nn.Module, cut: Cut) -> None:
    program = optc.capture(residual_model, (torch.randn(2, 8),))
    operators = [node.name for node in program.graph.nodes if node.op == "call_function"]

    unmarked = cut(program, 2)
    next(node for node in unmarked.graph.nodes if node.name == operators[3]).meta.pop("stage")
    with pytest.raises(OptcError, match=f"'{operators[3]}'.* has no stage.*last pass"):
        split(unmarked)

    backwards = cut(program, 2)
    next(node for node in backwards.graph.nodes if node.name == operators[0]).meta["stage"] = 1
    with pytest.raises(OptcError, match=f"'{operators[1]}' is in stage 0 but reads '{operators[0]}' of stage 1"):
        split(backwards)

    empty = cut(program, 2)
    for node in empty.graph.nodes:
        if "stage" in node.meta:
            node.meta["stage"] *= 2
    with pytest.raises(OptcError, match="stage 1 has no operator"):
        split(empty)


def test_marking_stages_is_a_change_of_the_program(residual_model: nn.Module, cut: Cut) -> None:
    program = optc.capture(residual_model, (torch.randn(2, 8),))
    assert program.fork().fingerprint() == program.fingerprint()
    assert cut(program, 2).fingerprint() != program.fingerprint()
    assert stage_count(replace(program)) == 1
