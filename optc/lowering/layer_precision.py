"""How a runner says what its layers compute in."""

from __future__ import annotations

from collections.abc import Mapping


def layer_precision(counts: Mapping[str, int]) -> str:
    """The layers' types on one line: ``"float32"`` or ``"int8 (7 of 8 layers, 1 float32)"``.

    Args:
        counts: how many layers compute in each type. int4 comes first, then int8, then what most compute in.
    """
    if not counts:
        return "no arithmetic"
    ranked = sorted(counts, key=lambda kind: -counts[kind])
    first = next((kind for kind in ("int4", "int8") if kind in counts), ranked[0])
    if first not in ("int4", "int8") and len(counts) == 1:
        return first
    rest = "".join(f", {counts[kind]} {kind}" for kind in ranked if kind != first)
    return f"{first} ({counts[first]} of {sum(counts.values())} layers{rest})"
