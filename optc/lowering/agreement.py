"""Whether a runtime computes what the graph computes: output by output, on example inputs, in the target's batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from optc.batches import at_batch
from optc.errors import BackendError
from optc.lowering.backend import Array
from optc.program import Program
from optc.rewrite import is_random, label
from optc.sqnr import decides, decisions_db, sqnr_db

FLOAT_DB = 60.0
"""Least SQNR of a float32 model. Two correct libraries differ by their order of summation alone: 115 to 135 dB on
AlexNet, ResNet-50 and ViT; a wrong axis, epsilon or approximation costs far more than half of that."""
HALF_DB = 30.0
"""Least SQNR of a model with float16 or bfloat16 arithmetic."""
QUANTIZED_DB = 20.0
"""Least SQNR of a quantized model. A value at the edge between two steps may round either way, and a deep network
amplifies it: with random weights AlexNet keeps 48 dB, Swin-T 36, EfficientNet-B0 26, MobileNetV3 25, and ViT-Tiny 31 dB
even where ONNX Runtime computes the same quantize/dequantize graph in float. A wrong scale, zero point or saturating
kernel leaves less than 10 dB."""
LEAST_QUANTIZED_DB = 10.0
_CLOSE_DB = 3.0
_ROUNDING = 2.0**-20
"""What inputs are shaken by, relative to their size, to see what roundings alone do: some float32 steps."""


@dataclass(frozen=True)
class Agreement:
    """How close the runtime came, over all outputs (the worst where they differ).

    Attributes:
        sqnr_db: 10·log10(Σ graph² / Σ (runtime − graph)²) in dB; infinite when equal. Of whole numbers and booleans
            (decisions, such as classes) by the share that differs.
        max_abs: largest absolute error.
        bound_db: least SQNR that was asked for.
        batches: samples in each query that was compared.
    """

    sqnr_db: float
    max_abs: float
    bound_db: float
    batches: tuple[int, ...] = ()

    def details(self) -> dict[str, Any]:
        """The check as it goes into ``Lowered.details["check"]``, ready for JSON."""
        return {
            "against": "the optimized graph on the example inputs",
            "sqnr_db": self.sqnr_db if math.isfinite(self.sqnr_db) else "inf",
            "max_abs": self.max_abs,
            "bound_db": self.bound_db,
            "batches": list(self.batches),
        }


def check_agreement(
    runtime: str, program: Program, run: Callable[..., Sequence[Array]], batch: int | None = None
) -> Agreement:
    """Run what a program was lowered to on the program's example inputs and compare with the graph itself.

    Args:
        runtime: its name, for the message.
        program: the program as it was given to the backend.
        run: takes one array per input and returns one array per output, in the program's order; a
            :class:`optc.Runner` is one.
        batch: images in a query of the target's. Where the program takes any number, that many are compared as well:
            a runtime may compile each batch size by itself, or take a size of 1 for something special.

    Raises:
        BackendError: names the first output that differs in shape, is not finite where the graph is, or has a lower
            SQNR than a correct runtime keeps for the coarsest arithmetic in the graph (float32 60 dB, float16 and
            bfloat16 30 dB, quantized 20 dB), with the numbers.
    """
    if drawn := [label(node) for node in program.graph.nodes if is_random(node)]:
        raise BackendError(f"the graph draws random numbers ({', '.join(drawn)}), so that no runtime can be held to it")
    examples = program.example_inputs
    graph, outputs = _outputs(program, examples), run(*map(as_array, examples))
    names = ["output"] if len(outputs) == 1 else [f"output_{index}" for index in range(len(outputs))]
    found = _compare(runtime, names, program, examples, graph, outputs)
    if not program.dynamic_batch:
        return replace(found, batches=tuple(examples[0].shape[:1]))
    if batch is None or batch == len(examples[0]):
        return replace(found, batches=(len(examples[0]),))
    query = at_batch(examples, program, batch)
    outputs = run(*map(as_array, query))
    try:  # at first as if no sample depended on another: a large batch takes long in the graph
        repeated = [array[np.arange(batch) % len(array)] for array in graph]
        other = compare_outputs(runtime, names, repeated, outputs, found.bound_db)
    except (BackendError, TypeError, IndexError):
        other = compare_with_graph(f"{runtime}, of a batch of {batch},", names, program, query, outputs)
    worse = min(found, other, key=lambda each: each.sqnr_db)
    return replace(worse, max_abs=max(found.max_abs, other.max_abs), batches=(len(examples[0]), batch))


def compare_with_graph(
    runtime: str, names: Sequence[str], program: Program, inputs: Sequence[torch.Tensor], outputs: Sequence[Array]
) -> Agreement:
    """Run a program on some inputs and compare what it was lowered to with it: ``outputs`` are of the same inputs.

    Raises:
        BackendError: as :func:`check_agreement`.
    """
    return _compare(runtime, names, program, inputs, _outputs(program, inputs), outputs)


def _outputs(program: Program, inputs: Sequence[torch.Tensor]) -> list[Array]:
    return [as_array(output) for output in program.run(*inputs)]


def _compare(
    runtime: str,
    names: Sequence[str],
    program: Program,
    inputs: Sequence[torch.Tensor],
    graph: Sequence[Array],
    outputs: Sequence[Array],
) -> Agreement:
    """Compare outputs with the graph's of the same inputs, with the bound that the program allows."""
    bound = bound_db(program)
    try:
        return compare_outputs(runtime, names, graph, outputs, bound)
    except BackendError:
        if bound != QUANTIZED_DB:
            raise
    # Some quantized graphs amplify any rounding: MobileNetV3 with random weights keeps 16 dB of its own outputs when
    # its inputs move by one millionth. No runtime can then be held to more. Nor need it be held to much less noise than
    # quantization itself has made.
    own = min(bound, _steadiness_db(program, inputs, graph) - _CLOSE_DB, _from_captured_db(program) + _CLOSE_DB)
    return compare_outputs(runtime, names, graph, outputs, max(LEAST_QUANTIZED_DB, own))


def as_array(tensor: torch.Tensor) -> Array:
    """A tensor as an array; types numpy has not (bfloat16, float8) as float32."""
    if tensor.dtype.is_floating_point and tensor.dtype not in (torch.float64, torch.float32, torch.float16):
        tensor = tensor.float()
    array: Array = tensor.detach().cpu().contiguous().resolve_conj().numpy()
    return array


def _steadiness_db(program: Program, inputs: Sequence[torch.Tensor], outputs: Sequence[Array]) -> float:
    """Least SQNR of the graph's own outputs when its float inputs are shaken by a few roundings."""
    generator = torch.Generator().manual_seed(0)
    shaken = [
        tensor * (1 + _ROUNDING * torch.randn(tensor.shape, generator=generator).to(tensor))
        if tensor.is_floating_point()
        else tensor
        for tensor in inputs
    ]
    moved = [as_array(output) for output in program.run(*shaken)]
    pairs = (_as_reals(a, b) for a, b in zip(outputs, moved, strict=True))
    return min(_distance_db(a, b, np.isfinite(a)) for a, b in pairs)


def _from_captured_db(program: Program) -> float:
    """SQNR of the graph's outputs against the captured model's, as last verified; infinite where nobody did."""
    for record in reversed(program.history):
        found = record.notes.get("verify")
        if found:
            return float(found["from_captured"]["sqnr_db"])
    return math.inf


def bound_db(program: Program) -> float:
    """The least SQNR a correct runtime keeps for ``program``, given the coarsest arithmetic in its graph.

    Integer weights count: a runtime may multiply them with activations it rounds to 8 bits, block by block.
    """
    dtypes = {getattr(node.meta.get("val"), "dtype", None) for node in program.graph.nodes if node.op != "placeholder"}
    if dtypes & {torch.int8, torch.uint8}:
        return QUANTIZED_DB
    return HALF_DB if dtypes & {torch.float16, torch.bfloat16} else FLOAT_DB


def compare_outputs(
    runtime: str, names: Sequence[str], graph: Sequence[Array], outputs: Sequence[Array], bound: float
) -> Agreement:
    """Compare a runtime's outputs with the graph's.

    Args:
        runtime: its name, for the message.
        names: names of the outputs.
        graph, outputs: arrays of equal shapes, one per output, of the graph and of the runtime.
        bound: least SQNR in dB.

    Raises:
        BackendError: names the first output that differs in shape, is not finite where the graph is, or falls below
            the bound, with the numbers.
    """
    worst = Agreement(math.inf, 0.0, bound)
    for name, reference, output in zip(names, graph, outputs, strict=True):
        if reference.shape != output.shape:
            raise _diverges(runtime, name, f"its shape is {output.shape}, the graph's {reference.shape}")
        reference, output = _as_reals(reference, output)
        expected, found = reference.astype(np.float64), output.astype(np.float64)
        finite = np.isfinite(expected)
        if not np.isfinite(found[finite]).all():
            raise _diverges(runtime, name, "it is not finite where the graph's is")
        infinite = np.isinf(expected)
        if not np.array_equal(found[infinite], expected[infinite]):
            raise _diverges(runtime, name, "it is not infinite where the graph's is")
        max_abs = float(np.abs(found[finite] - expected[finite]).max(initial=0.0))
        sqnr = _distance_db(reference, output, finite)
        if sqnr < bound:
            raise _diverges(
                runtime, name, f"SQNR {sqnr:.1f} dB (at least {bound:g} dB expected), largest error {max_abs:.3g}"
            )
        worst = Agreement(min(worst.sqnr_db, sqnr), max(worst.max_abs, max_abs), bound)
    return worst


def _diverges(runtime: str, name: str, how: str) -> BackendError:
    return BackendError(f"{runtime} computes output '{name}' differently from the optimized graph: {how}")


def _as_reals(reference: Array, output: Array) -> tuple[Array, Array]:
    """The same arrays; of complex ones the real parts, then the imaginary parts."""
    if not (np.iscomplexobj(reference) or np.iscomplexobj(output)):
        return reference, output
    return np.stack([reference.real, reference.imag]), np.stack([output.real, output.imag])


def _distance_db(reference: Array, output: Array, finite: np.ndarray[Any, np.dtype[np.bool_]]) -> float:
    """The SQNR of an output where the reference is finite."""
    if decides(reference.dtype):
        return decisions_db(reference, output)
    expected = reference[finite].astype(np.float64)
    error = output[finite].astype(np.float64) - expected
    return sqnr_db(float(np.square(expected).sum()), float(np.square(error).sum()))
