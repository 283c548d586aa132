"""What a model takes, and the refusal of anything else: compiled code would read beyond an array that is too small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from optc.errors import BackendError
from optc.lowering.backend import Array
from optc.program import Program


def described(program: Program) -> list[dict[str, Any]]:
    """``name``, ``shape`` (``None`` where the batch goes) and ``dtype`` of each input, ready for JSON."""
    return [
        {
            "name": node.name,
            "shape": [None if program.dynamic_batch and axis == 0 else size for axis, size in enumerate(example.shape)],
            "dtype": str(example.dtype).removeprefix("torch."),
        }
        for node, example in zip(program.graph.find_nodes(op="placeholder"), program.example_inputs, strict=True)
    ]


def check_inputs(inputs: Sequence[Array | Tensor], expected: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what the model does not take.

    Args:
        expected: ``name`` and ``shape`` of each input, as :func:`described` has them.

    Raises:
        BackendError: says what was given and what the model takes.
    """
    if len(inputs) != len(expected):
        raise BackendError(f"the model takes {len(expected)} inputs, not {len(inputs)}")
    batch = inputs[0].shape[0] if inputs and inputs[0].ndim else 1
    for each, entry in zip(inputs, expected, strict=True):
        given = tuple(each.shape)
        if given != tuple(batch if size is None else size for size in entry["shape"]):
            takes = ", ".join("batch" if size is None else str(size) for size in entry["shape"])
            raise BackendError(f"input '{entry['name']}' has the shape {given}, the model takes ({takes})")
