"""Other ways to run what a backend wrote, each held against the way that was checked against the graph."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from optc.lowering.agreement import LEAST_QUANTIZED_DB, QUANTIZED_DB, bound_db, compare_outputs
from optc.lowering.backend import Array, Backend, Lowered
from optc.lowering.lowering import Lowering, kept
from optc.program import Program

Variant = tuple[Mapping[str, Any], Lowered]
Refused = list[tuple[Mapping[str, Any], str]]


def offers_variants(backend: Backend) -> bool:
    """Whether a backend may offer other ways to run what it wrote."""
    return type(backend).variants is not Backend.variants


def variants(
    made: Lowering, offered: Sequence[Variant], program: Program, query: Sequence[Array]
) -> tuple[list[Lowering], Refused]:
    """Other ways to run what was lowered, loaded once each.

    They run on a query whose samples differ, even if those given are all the same: then it shows in the outputs if they
    depend on one another and may not be divided.

    Args:
        offered: what :meth:`optc.Backend.variants` returned; at least one.
        program: what was lowered.
        query: one array per input, of the target's batch.

    Returns:
        Those that compute what ``made`` does, and the options of others with the reason why they do not.
    """
    found: list[Lowering] = []
    refused: Refused = []
    bound = bound_db(program)
    distinct = [_distinct(array) for array in query]
    with closing(made.load()) as runner:
        outputs = runner(*distinct)
    names = [f"output_{index}" for index in range(len(outputs))]
    for options, lowered in offered:
        start = time.perf_counter()
        target = made.target.with_options(made.backend.name, options)
        other = replace(made, lowered=lowered, target=target, options=options)
        reasons: dict[str, str] = {}
        with kept(reasons, made.backend.name, made.backend.origin, key=other.title), closing(other.load()) as runner:
            least = LEAST_QUANTIZED_DB if bound == QUANTIZED_DB else bound
            compare_outputs(other.title, names, outputs, runner(*distinct), least)
            seconds = made.seconds + time.perf_counter() - start
            found.append(replace(other, provider=runner.provider, precision=runner.precision, seconds=seconds))
        refused += [(options, reason) for reason in reasons.values()]
    return found, refused


def _distinct(array: Array) -> Array:
    """A query's floats with noise half their size; indices and the like as they are."""
    if not np.issubdtype(array.dtype, np.floating):
        return array
    noise = np.random.default_rng(0).standard_normal(array.shape)
    return (array + noise * (float(array.std()) or 1.0) / 2).astype(array.dtype)
