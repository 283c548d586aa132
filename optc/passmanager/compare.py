"""How far two runs of a model are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from optc.program import Program
from optc.sqnr import decides, decisions_db, sqnr_db


@dataclass(frozen=True)
class Comparison:
    """Distance of outputs from reference outputs, over all outputs and samples (the worst where they differ).

    Attributes:
        max_abs: largest absolute error.
        max_rel: largest absolute error over the largest absolute reference value of the same output.
        sqnr_db: 10·log10(Σ ref² / Σ (out − ref)²), in dB; infinite when equal. Of whole numbers and booleans
            (decisions, such as classes) by the share that differs.
        cosine: cosine similarity of the flattened outputs; those of decisions are left out.
        top1_agreement: share of samples with the same arg-max, or the same class where the output is that; ``None``
            where no output is (batch, classes) or (batch,) decisions.
        finite: whether the outputs are finite wherever the reference is.
    """

    max_abs: float
    max_rel: float
    sqnr_db: float
    cosine: float
    top1_agreement: float | None
    samples: int
    finite: bool = True


Outputs = Sequence[tuple[Tensor, ...]]


def compare(reference: Outputs, outputs: Outputs) -> Comparison:
    """Compare outputs of the same batches: one tuple of tensors per batch. Sums are taken in float64.

    Where the reference is infinite the outputs have to be the same; where it is NaN they may be anything.
    """
    worst = Comparison(0.0, 0.0, math.inf, 1.0, None, 0)
    agree = samples = 0
    for position in range(len(reference[0])):
        pairs = [(ref[position], out[position]) for ref, out in zip(reference, outputs, strict=True)]
        for ref, out in pairs:
            if ref.shape != out.shape:
                raise ValueError(f"output {position} has shape {tuple(out.shape)}, the reference {tuple(ref.shape)}")
        ref, out = _joined(reference, position), _joined(outputs, position)
        known, infinite = torch.isfinite(ref), torch.isinf(ref)
        wanted, got = ref[known], out[known]
        finite = bool(torch.isfinite(got).all())
        error = (got - wanted).nan_to_num(nan=math.inf)
        signal, noise = float(wanted.square().sum()), float(error.square().sum())
        if not torch.equal(ref[infinite], out[infinite]):
            noise = math.inf
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        peak = float(error.abs().max()) if error.numel() else 0.0
        decision = decides(reference[0][position].dtype)
        cosine = 1.0 if decision or not noise else float(torch.nn.functional.cosine_similarity(wanted, got, dim=0))
        worst = Comparison(
            max_abs=max(worst.max_abs, peak),
            max_rel=max(worst.max_rel, peak / scale if scale else math.inf if peak else 0.0),
            sqnr_db=min(worst.sqnr_db, decisions_db(ref.numpy(), out.numpy()) if decision else sqnr_db(signal, noise)),
            cosine=min(worst.cosine, cosine),
            top1_agreement=None,
            samples=max(worst.samples, sum(len(ref) if ref.ndim else 1 for ref, _ in pairs)),
            finite=worst.finite and finite,
        )
        for ref, out in pairs:
            if decision and ref.ndim <= 1:
                agree, samples = agree + int((ref == out).sum()), samples + ref.numel()
            elif not decision and not ref.is_complex() and ref.ndim == 2 and ref.shape[1] > 1:
                agree, samples = agree + int((ref.argmax(1) == out.argmax(1)).sum()), samples + len(ref)
    top1 = agree / samples if samples else None
    return Comparison(**{**worst.__dict__, "top1_agreement": top1})


def nan_in(outputs: Outputs) -> list[tuple[int, float]]:
    """Of each output that holds NaN, its position and the share of its values that are."""
    shares = [
        (position, float(_joined(outputs, position).isnan().double().mean())) for position in range(len(outputs[0]))
    ]
    return [(position, share) for position, share in shares if share > 0]


def _joined(batches: Outputs, position: int) -> Tensor:
    """All values of an output in all batches in float64, of complex ones both parts."""
    parts = [batch[position].detach().cpu() for batch in batches]
    parts = [torch.view_as_real(part.resolve_conj()) if part.is_complex() else part for part in parts]
    return torch.cat([part.flatten() for part in parts]).double()


def rounding_sqnr_db(program: Program) -> float:
    """The SQNR an exact rewrite must keep: what float rounding alone may cost, given the coarsest type in the graph.

    One rounding step costs a relative error of eps; a deep network multiplies it. The bound is 1024·eps for float32
    (78 dB), and 0.3·√eps for coarser types, where the former would allow anything: float16 40 dB, bfloat16 32 dB and
    8-bit integers 34 dB (a rewrite may tip a value over a quantization step).
    """
    eps = max((_eps(node) for node in program.graph.nodes if node.op != "placeholder"), default=0.0)
    eps = max(eps, torch.finfo(torch.float32).eps)
    return -20.0 * math.log10(min(1024.0 * eps, 0.3 * math.sqrt(eps)))


def _eps(node: fx.Node) -> float:
    """The relative step of a value's type; integers are such steps where something was quantized, not as masks."""
    dtype = getattr(node.meta.get("val"), "dtype", None)
    if dtype in (torch.int8, torch.uint8):
        return 2.0**-8 if any("quantize" in str(each.target) for each in (node, *node.users)) else 0.0
    return torch.finfo(dtype).eps if isinstance(dtype, torch.dtype) and dtype.is_floating_point else 0.0
