"""The exporter's table of operators, made once in a process instead of once in each export."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from optc.lowering.replaced import replaced

_made: dict[int, Any] = {}


@contextmanager
def registry_kept() -> Iterator[None]:
    """Exports in this context share what torch.onnx finds out about its operators, each with a table of its own.

    It parses the source of its 500 translation functions in every export (torch 2.11 to 2.13: half a second), and has
    no option to hand a table in. A torch that makes its table elsewhere does so as it always does.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        yield
        return
    original = ONNXRegistry.__dict__.get("from_torchlib")
    if not isinstance(original, classmethod):
        yield
        return

    def from_torchlib(cls: type[Any], opset_version: int = 0) -> Any:
        if opset_version not in _made:
            given = (opset_version,) if opset_version else ()
            _made[opset_version] = original.__func__(cls, *given)
        mine = copy.copy(_made[opset_version])
        mine.functions = {target: list(found) for target, found in mine.functions.items()}
        return mine

    with replaced(ONNXRegistry, "from_torchlib", classmethod(from_torchlib)):
        yield
