"""A format for each layer: least measured latency within a budget of noise, as an integer program."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor, fx

from optc import PassContext, Program
from optc.rewrite import argument, shape
from optc_passes.quant_account import Entry, Pair
from optc_passes.quant_budget import MIN_SQNR_DB, ROOM_DB, over_budget
from optc_passes.quant_formats import FLOAT, INT8, Attempt, LayerFormats
from optc_passes.quant_local import Half
from optc_passes.quant_plan import Layer

_TRIES = 12
"""Most times the budget of noise is tightened, by half each, where the sum of the layers' noise was too optimistic."""

_SETTLING_SECONDS = 3.0
"""How long whole models of about the same latency are measured on: one of them is kept."""
_measured: WeakKeyDictionary[Callable[..., list[float]], dict[str, dict[str, float]]] = WeakKeyDictionary()
"""Seconds by what measures, kind of layer and format: a second trial of the same run measures nothing again."""


@dataclass(frozen=True)
class Choice:
    """The formats chosen from a table, the program with them, and its predicted latency: the sum over its layers."""

    table: Sequence[Entry]
    formats: Mapping[str, str]
    attempt: Attempt
    seconds: float

    def why(self, name: str) -> str:
        """Why a layer has its format, with the numbers of the table."""
        rows = {entry.form: entry for entry in self.table if entry.layer == name}
        quickest, own = min(rows.values(), key=_cost), rows[self.formats[name]]
        if own is quickest:
            return f"its fastest format on {own.backend}"
        return (
            f"{quickest.form} would take {quickest.seconds * 1e6:.0f} µs instead of {own.seconds * 1e6:.0f} µs,"
            f" but {quickest.noise_in_words}: more noise than the budget has left"
        )


def possible_formats(layers: LayerFormats, context: PassContext) -> dict[str, tuple[str, ...]]:
    """By layer, the formats it can have, float first; half precision only where the CPU does not emulate it."""
    local = [name for name, form in layers.local.items() if not (context.emulates_half and isinstance(form, Half))]
    forms = (FLOAT, INT8, *local)
    return {name: tuple(form for form in forms if not layers.refusal(name, form)) for name in layers.names}


def measure_layers(
    layers: LayerFormats, forms: Mapping[str, Sequence[str]], context: PassContext
) -> dict[str, dict[Pair, float]]:
    """Seconds that each layer takes by itself in each of its formats, by backend. Those of a kind are measured once.

    A format that a backend cannot run for one layer is not tried for others of the same operator, depthwise ones apart.
    Backends that cannot run some layer in float are left out, and noted.
    """
    seconds: dict[str, dict[Pair, float]] = {backend: {} for backend in context.latency}
    refused: set[tuple[str, object, str]] = set()
    for number, layer in enumerate(layers.plan.layers, 1):
        name, kind = layer.node.name, f"{_kind(layer)}, blocks of {layers.block}"
        operator = layer.node.target, shape(argument(layer.node, "weight"))[1] == 1
        programs: dict[str, Program] = {}  # one for all backends, which then share its export
        for backend in list(seconds):
            measured = _measured.setdefault(context.latency[backend], {})
            if kind not in measured:
                context.progress(f"measuring layer {number}/{len(layers.names)} on {backend}")
                tried = [form for form in forms[name] if (backend, operator, form) not in refused]
                for form in tried:
                    programs[form] = programs.get(form) or layers.alone(layer, form, context.target.batch)
                taken = context.latency[backend]([programs[form] for form in tried])
                measured[kind] = dict.fromkeys(forms[name], math.nan) | dict(zip(tried, taken, strict=True))
                refused |= {(backend, operator, form) for form, each in measured[kind].items() if math.isnan(each)}
            if math.isnan(measured[kind][FLOAT]):
                del seconds[backend]
                context.note(f"{backend} cannot run layer {name} by itself in float: no formats are chosen for it")
            else:
                seconds[backend] |= {(name, form): taken for form, taken in measured[kind].items()}
    return seconds


def worth_having(noise: Mapping[Pair, float], seconds: Mapping[str, Mapping[Pair, float]]) -> dict[Pair, float]:
    """The noise of those pairs of layer and format that are faster than float on some backend.

    Args:
        seconds: by backend, what :func:`measure_layers` found.
    """

    def faster(pair: Pair) -> bool:
        return any(each.get(pair, math.nan) < each[pair[0], FLOAT] for each in seconds.values())

    return {pair: level for pair, level in noise.items() if faster(pair)}


CHOSEN = "the formats chosen"
"""Name of the chosen mix among the whole models that are measured."""


def whole_seconds(wholes: Mapping[str, Program], backend: str, context: PassContext) -> dict[str, float]:
    """Seconds of a query for whole models, NaN for what the backend cannot run.

    What layers take by themselves leaves out the conversions between them.
    """
    context.progress(f"measuring {len(wholes)} whole models on {backend}")
    return dict(zip(wholes, context.latency[backend](list(wholes.values()), _SETTLING_SECONDS), strict=True))


def in_words(seconds: Mapping[str, float], backend: str) -> str:
    """What whole models take, the fastest first."""
    ranked = sorted((taken, name) for name, taken in seconds.items() if math.isfinite(taken))
    return f"on {backend} the whole model takes " + ", ".join(f"{s * 1e6:.0f} µs in {name}" for s, name in ranked)


def choose(layers: LayerFormats, table: Sequence[Entry], context: PassContext) -> Choice:
    """Solve, make the program, and tighten the budget of noise until the program as a whole is within its budget."""
    noise_budget = 10 ** (-(MIN_SQNR_DB + ROOM_DB) / 10)
    for _ in range(_TRIES):
        formats = solve(table, noise_budget)
        attempt = layers.attempt(_quantized(formats))
        context.progress(f"outputs at {attempt.sqnr:.1f} dB with {len(attempt.layers)} layers quantized")
        problem = over_budget(attempt, context)
        if problem and INT8 in formats.values() and layers.give_back_attention():
            attempt = layers.attempt(_quantized(formats))
            problem = over_budget(attempt, context)
        own_noise = sum(entry.noise for entry in table if formats[entry.layer] == entry.form)
        if problem is None:
            return Choice(table, formats, attempt, _seconds(table, formats))
        if not own_noise:
            break  # nothing is quantized any more
        noise_budget = min(noise_budget, own_noise) / 2
    formats = dict.fromkeys(layers.names, FLOAT)
    return Choice(table, formats, layers.attempt({}), _seconds(table, formats))


def _seconds(table: Sequence[Entry], formats: Mapping[str, str]) -> float:
    return sum(_cost(entry) for entry in table if formats[entry.layer] == entry.form)


def _quantized(formats: Mapping[str, str]) -> dict[str, str]:
    return {name: form for name, form in formats.items() if form != FLOAT}


def solve(table: Sequence[Entry], noise_budget: float) -> dict[str, str]:
    """The format of each layer that minimises the sum of latencies while the sum of noise stays within the budget.

    Solved exactly as a 0-1 program with HiGHS (Huangfu and Hall, "Parallelizing the dual revised simplex method", 2018)
    through ``scipy.optimize.milp``.

    Args:
        noise_budget: most noise in all, above 0; layers in float add none, so that there is always a solution.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    names = list(dict.fromkeys(entry.layer for entry in table))
    one_each = np.array([[float(entry.layer == name) for entry in table] for name in names])
    noise = np.array([[entry.noise / noise_budget for entry in table]])
    cost = np.array([_cost(entry) for entry in table])
    runs = np.isfinite(cost) & (noise[0] <= 1)
    result = milp(
        np.where(runs, cost, 0) / cost[runs].max(),
        integrality=np.ones(len(table), dtype=int),
        bounds=Bounds(0, runs.astype(float)),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(np.where(runs, noise, 0), -np.inf, 1)],
    )
    assert result.x is not None, "all layers in float is a solution"
    return {entry.layer: entry.form for entry, chosen in zip(table, result.x, strict=True) if chosen > 0.5}


def _cost(entry: Entry) -> float:
    return entry.seconds if math.isfinite(entry.seconds) else math.inf


def _kind(layer: Layer) -> str:
    """What a layer's latency depends on: operators, arguments and shapes."""

    def describe(node: fx.Node) -> str:
        shapes = [tuple(n.meta["val"].shape) for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        rest = fx.map_arg((node.args, node.kwargs), lambda n: "tensor")
        return f"{node.target} {rest} {shapes}"

    return " ".join(describe(node) for node in dict.fromkeys((layer.node, layer.tail)))
