"""What the target's CPU has no instructions for."""

from __future__ import annotations

from optc import PassContext

_HALF_ARITHMETIC = {"avx512_bf16", "amx_bf16"}
"""Instruction sets one of which every x86 CPU has that computes in bfloat16 or float16."""


def emulates_half(context: PassContext) -> bool:
    """Whether bfloat16 and float16 are converted to float32 and back for each operator."""
    on_cpu = context.target.device == "cpu" and context.isa is not None
    return on_cpu and _HALF_ARITHMETIC.isdisjoint(context.isa or ())
