"""The ``null`` backend: zeros of the right shape at once, to measure what the harness itself costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from optc.errors import BackendError
from optc.lowering.backend import Array, Backend, Lowered, Runner
from optc.rewrite import dims, shape
from optc.target import Target

if TYPE_CHECKING:
    from optc.program import Program

SHAPES = "shapes.json"


class NullBackend(Backend):
    """Runs no model. What LoadGen reports for it is the overhead in every other figure."""

    name = "null"
    summary = "Runs nothing and returns zeros: measures the harness's own overhead."
    automatic = False

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        """Write the outputs' shapes, with null where the batch goes."""
        shapes = []
        for node in program.graph.output_node().all_input_nodes:
            sizes: list[int | None] = list(shape(node))
            known = dims(node)
            varies = not isinstance(known[0], int) if known else sizes[:1] == [program.example_inputs[0].shape[0]]
            if sizes and program.dynamic_batch and varies:
                sizes[0] = None
            shapes.append(sizes)
        (folder / SHAPES).write_text(json.dumps(shapes), encoding="utf-8")
        check = {"against": "nothing: no model runs"}
        return Lowered((SHAPES,), {"no_run_script": "there is nothing to run", "check": check})

    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> Runner:
        """Read the shapes.

        Raises:
            BackendError: the file is not readable.
        """
        try:
            return NullRunner(json.loads((folder / files[0]).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise BackendError(f"cannot read '{folder / files[0]}': {error}", "optimize the model again") from error


class NullRunner(Runner):
    """Hands out the same read-only zeros for every query of a batch size."""

    provider = "null (no model runs)"
    precision = "none"

    def __init__(self, shapes: list[list[int | None]]) -> None:
        self._shapes = shapes
        self._zeros: dict[int, tuple[Array, ...]] = {}

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        batch = len(inputs[0])
        if batch not in self._zeros:
            self._zeros[batch] = tuple(_zeros(sizes, batch) for sizes in self._shapes)
        return self._zeros[batch]


def _zeros(sizes: list[int | None], batch: int) -> Array:
    zeros = np.zeros([batch if size is None else size for size in sizes], np.float32)
    zeros.flags.writeable = False
    return zeros
