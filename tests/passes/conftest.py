"""What the tests of passes share: one fluent tester that checks structure and numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

import optc
from optc.program import Program


class Tester:
    """Captures a model in float64, runs passes over it, and checks what came of it.

    Norms get random statistics, weights and biases first: those they are born with (zero mean, unit variance) would
    hide most mistakes. Every pass is run twice; the second run must change nothing.

    Args:
        model: changed in place: put into eval mode and float64.
        randomized: ``False`` leaves norms and layer scales as they are.
        inputs: example inputs, batch first.
    """

    __test__ = False

    def __init__(self, model: nn.Module, *inputs: Tensor, dynamic_batch: bool = True, randomized: bool = True) -> None:
        self.model = model.eval().double()
        if randomized:
            randomize(self.model)
        self.inputs = tuple(t.double() if t.is_floating_point() else t for t in inputs)
        self.dynamic_batch = dynamic_batch
        self.before = self.program = optc.capture(self.model, self.inputs, dynamic_batch=dynamic_batch)
        self.applied: tuple[optc.Change, ...] = ()
        self.skipped: tuple[optc.Skip, ...] = ()
        self.modified = False

    def run(self, *passes: optc.Pass) -> Self:
        """Run passes in order, each twice."""
        for pass_ in passes:
            result = pass_(self.program)
            again = pass_(result.program)
            assert not again.modified, f"a second {pass_.name} still changed {again.applied}"
            self.program = result.program
            self.applied += result.applied
            self.skipped += result.skipped
            self.modified |= result.modified
        return self

    def check_count(self, **expected: int) -> Self:
        """How many operators of each name there are now: ``check_count(conv2d=1, relu=0)``."""
        found = operators(self.program)
        assert {name: found[name] for name in expected} == expected
        return self

    def check_applied(self, rule: str, count: int) -> Self:
        assert Counter(change.rule for change in self.applied)[rule] == count
        return self

    def check_skipped(self, rule: str, reason: str) -> Self:
        """Exactly one rewrite was considered and not made, for this reason (a part of it)."""
        assert [skip.rule for skip in self.skipped] == [rule], self.skipped
        assert reason in self.skipped[0].reason
        return self

    def check_untouched(self) -> Self:
        assert not self.modified
        assert not self.applied
        assert self.program.fingerprint() == self.before.fingerprint()
        return self

    def check_close(self, tolerance: float = 1e-10) -> Self:
        """Outputs equal the model's, at batch 1 and 3 too where the batch is dynamic, on inputs never seen before."""
        for batch in (1, 2, 3) if self.dynamic_batch else (self.inputs[0].shape[0],):
            inputs = [_sample(t, batch) for t in self.inputs]
            with torch.no_grad():
                expected = self.model(*inputs)
            expected = expected if isinstance(expected, tuple) else (expected,)
            for got, want in zip(self.program.run(*inputs), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        return self


def _sample(like: Tensor, batch: int) -> Tensor:
    size = (batch, *like.shape[1:])
    return torch.randn(size, dtype=like.dtype) if like.is_floating_point() else torch.randint(0, 4, size)


def randomize(model: nn.Module) -> nn.Module:
    """Give norms random statistics and affine parameters, and layer scales a visible size."""
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr, operator]
                module.running_var.uniform_(0.3, 2)  # type: ignore[union-attr, operator]
            if isinstance(module, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)) and module.weight is not None:
                module.weight.uniform_(-1.5, 1.5)
                module.bias.normal_(0, 0.3)
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.2, 1.5)
    return model


def operators(program: Program) -> Counter[str]:
    """How often each operator is called, by its name without namespace and overload."""
    return Counter(
        str(getattr(node.target, "_opname", getattr(node.target, "__name__", "")))
        for node in program.graph.nodes
        if node.op == "call_function"
    )


@pytest.fixture
def tester() -> type[Tester]:
    return Tester


class Batches:
    """Calibration data made of given batches."""

    description = "test batches"

    def __init__(self, *batches: tuple[Tensor, ...]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter(self._batches)


class Quantized:
    """A float32 program, what ``quant`` made of it, and how to look at the result.

    Args:
        model: an ``nn.Module``, or a program already captured.
        inputs: example inputs, batch first; calibration is on four batches of noise like them,
            more where these have fewer than eight samples.
    """

    def __init__(
        self, model: nn.Module | Program, *inputs: Tensor, batches: Sequence[tuple[Tensor, ...]] = (), **options: Any
    ):
        from optc_passes.quant import Quant

        self.before = model if isinstance(model, Program) else optc.capture(model, inputs)
        self.inputs = self.before.example_inputs
        count = max(4, -(-8 // len(self.inputs[0])))
        self.batches = batches or [tuple(torch.randn_like(t) for t in self.inputs) for _ in range(count)]
        context = optc.PassContext(calibration=Batches(*self.batches))
        self.result = Quant(**options)(self.before, context)
        self.program = self.result.program

    @property
    def sqnr_db(self) -> float:
        """SQNR of the first output in dB on inputs calibration has not seen."""
        inputs = [torch.randn_like(t) for t in self.inputs]
        wanted, got = (program.run(*inputs)[0].double() for program in (self.before, self.program))
        return float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()))

    @property
    def reasons(self) -> dict[str, str]:
        return {skip.node: skip.reason for skip in self.result.skipped}

    def chain(self) -> str:
        """The operators that compute, in order, with q and d for quantize and dequantize of activations."""
        short = {"quantize_per_tensor": "q", "dequantize_per_tensor": "d", "dequantize_per_channel": "", "sym_size": ""}
        names = [getattr(node.target, "_opname", "") for node in self.program.graph.nodes if node.op == "call_function"]
        return " ".join(filter(None, (short.get(name, name) for name in names)))


@pytest.fixture
def quantized() -> type[Quantized]:
    return Quantized
