"""fold-constants: what depends on constants alone is evaluated, within bounds."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from torch import Tensor, nn

from optc_passes.constants import FREE_BYTES, FoldConstants


class Uses(nn.Module):
    """``compute(module, x)`` with constants at hand."""

    def __init__(self, compute: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(8))
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("index", torch.arange(4).repeat(2))
        self.large = nn.Parameter(torch.randn(1, FREE_BYTES // 8))
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


X = torch.randn(2, 8)


def test_folds_whole_expressions_into_one_constant(tester: Callable) -> None:
    """As Swin's relative position bias: a table, indexed, rearranged."""
    model = Uses(lambda m, x: x + (m.weight[m.index] * m.gamma.view(1, -1)).permute(1, 0).contiguous().mean(0))
    t = tester(model, X).run(FoldConstants()).check_applied("fold-constants", 1).check_close()
    t.check_count(add=1, mul=0, index=0, permute=0, view=0, clone=0, mean=0)
    assert [tuple(tensor.shape) for name, tensor in t.program.constants() if name != "large"] == [(8,)]


def test_folds_several_results_and_factories(tester: Callable) -> None:
    model = Uses(
        lambda m, x: sum(part * x for part in m.weight.mean(0, keepdim=True).expand(2, -1).unbind(0)) + torch.ones(8)
    )
    tester(model, X).run(FoldConstants()).check_count(unbind=0, expand=0, mean=0, ones=0, full=0).check_close()


def test_numbers_take_their_place_in_arguments(tester: Callable) -> None:
    model = Uses(lambda m, x: x * m.weight.sum(0).view(8))
    t = tester(model, X).run(FoldConstants()).check_close()
    assert not t.program.graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList)


def test_tensors_are_never_written(tester: Callable) -> None:
    model = Uses(lambda m, x: x * m.gamma.view(1, 8))
    t = tester(model, X).run(FoldConstants())
    (folded,) = (tensor for name, tensor in t.program.constants() if name.startswith("folded"))
    assert folded.data_ptr() != model.gamma.data_ptr()
    assert not folded.requires_grad


def test_a_value_that_would_grow_the_weights_stays(tester: Callable) -> None:
    model = Uses(lambda m, x: x.sum() + m.large.expand(16, -1))
    t = tester(model, X, dynamic_batch=False).run(FoldConstants()).check_untouched()
    t.check_skipped("fold-constants", "its value would add 15.0 MiB of constants")


def test_large_value_of_a_constant_used_elsewhere_stays(tester: Callable) -> None:
    """A transposed copy of a weight that is itself still needed would be a second one."""
    model = Uses(lambda m, x: (x.sum() + m.large.repeat(1, 2).cos()).sum() + (m.large * x.sum()).sum())
    t = tester(model, X, dynamic_batch=False).run(FoldConstants()).check_untouched()
    t.check_skipped("fold-constants", "its value would add 2.0 MiB of constants")


def test_large_value_that_replaces_its_operand_is_folded(tester: Callable) -> None:
    class Larger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.larger = nn.Parameter(torch.randn(1, FREE_BYTES // 4))

        def forward(self, x: Tensor) -> Tensor:
            return x.sum() + self.larger.cos()

    t = tester(Larger(), X, dynamic_batch=False).run(FoldConstants()).check_applied("fold-constants", 1).check_close()
    assert t.program.constant_bytes() == t.before.constant_bytes() > FREE_BYTES


def test_a_value_on_the_way_that_is_too_large_stays(tester: Callable) -> None:
    model = Uses(lambda m, x: x.sum() + m.large.repeat(2, 1)[:1].cos().flip(1))
    t = tester(model, X, dynamic_batch=False).run(FoldConstants()).check_untouched()
    t.check_skipped("fold-constants", "its value would add 1.0 MiB of constants")


def test_an_output_is_no_constant_of_the_program(tester: Callable) -> None:
    """Callers may write into what they are given; a view of a constant would be written into with it."""

    class Returns(Uses):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            return x + self.gamma.exp(), self.gamma.exp().exp().view(2, 4)

    t = tester(Returns(lambda m, x: x), X, dynamic_batch=False).run(FoldConstants()).check_close()
    assert {skip.reason for skip in t.skipped} == {"an output would be the same tensor as a constant"}
    t.program.run(X.double())[1].zero_()
    t.check_close()


def test_random_values_stay(tester: Callable) -> None:
    t = tester(Uses(lambda m, x: x + torch.rand(8)), X).run(FoldConstants()).check_untouched()
    t.check_skipped("fold-constants", "its value is not determined")


class Dequantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 127, (8, 8), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.ops.quantized_decomposed.dequantize_per_tensor(self.weight, 0.1, 0, -128, 127, torch.int8)
        return nn.functional.linear(x.float(), weight)


def test_a_quantization_is_not_undone(tester: Callable) -> None:
    t = tester(Dequantized(), X).run(FoldConstants()).check_untouched()
    t.check_skipped("fold-constants", "would undo a quantization")


def test_what_depends_on_the_batch_stays(tester: Callable) -> None:
    model = Uses(lambda m, x: torch.cat([x, m.gamma.expand(x.shape[0], -1)]))
    assert not tester(model, X).run(FoldConstants()).check_untouched().skipped
