"""The account of quantization: what each layer costs in each format, and why it has the one it has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optc import PassContext
from optc.rewrite import module_path, shape
from optc_passes.quant_budget import drop
from optc_passes.quant_formats import FLOAT, INT8, LayerFormats
from optc_passes.quant_plan import Layer

DOUBTFUL = 8
"""Pairs of layer and format that are tried in the whole model: those by which its outputs seem to move most."""
JUDGED = 3
"""Of those, how many have their effect on the task's metric looked at, which takes a run over all of its data each."""


@dataclass(frozen=True)
class Entry:
    """One layer in one format.

    Attributes:
        layer, module: name of its node, and path of its module in the original model.
        sqnr_db: of the layer's output when it alone has the format; infinite in float.
        model_sqnr_db: of the model's outputs likewise; ``None`` if that is not known.
        drop: percentage points of the task's metric that are lost likewise; ``None`` without a budget.
        seconds: median latency of the layer by itself on ``backend``; NaN where that was not measured or cannot run.
        bytes: of weight and bias as stored.
        estimated: whether ``model_sqnr_db`` is an estimate (:mod:`optc_passes.quant_reach`), and not tried.
    """

    backend: str
    layer: str
    module: str
    form: str
    sqnr_db: float
    seconds: float
    bytes: int
    model_sqnr_db: float | None = None
    drop: float | None = None
    estimated: bool = False

    @property
    def noise(self) -> float:
        """Share of noise in the model's outputs, by the best estimate there is; that of independent layers adds up."""
        return 10 ** (-(self.sqnr_db if self.model_sqnr_db is None else self.model_sqnr_db) / 10)

    @property
    def noise_in_words(self) -> str:
        """The same as SQNR, and of what it is."""
        if self.model_sqnr_db is None:
            return f"its own output has {self.sqnr_db:.1f} dB SQNR"
        return f"alone it leaves the model {'about ' * self.estimated}{self.model_sqnr_db:.1f} dB SQNR"


Pair = tuple[str, str]
"""A layer's name and a format."""


def noisiest(
    layers: LayerFormats, noise: Mapping[Pair, float], context: PassContext
) -> dict[Pair, tuple[float, float | None]]:
    """What the doubtful pairs do to the whole model, each alone: SQNR of its outputs, and points lost of the metric."""
    found = {}
    reaching = {**noise, **layers.output_noise}
    doubtful = sorted(noise, key=lambda pair: reaching[pair])[:DOUBTFUL]
    for number, (name, form) in enumerate(doubtful, 1):
        context.progress(f"trying {name} alone in {form}, {number}/{len(doubtful)}")
        attempt = layers.attempt({name: form}, attention=False)
        found[name, form] = attempt.sqnr, drop(attempt, context) if number <= JUDGED else None
    return found


def entries(
    layers: LayerFormats,
    forms: Mapping[str, Sequence[str]],
    noise: Mapping[Pair, float],
    wholes: Mapping[Pair, tuple[float, float | None]],
    backend: str = "",
    seconds: Mapping[Pair, float] | None = None,
) -> list[Entry]:
    """An entry for every layer in float and in each of its formats, in graph order.

    Args:
        forms: the formats, by name of the layer.
        noise: SQNR in dB of the layer's own output.
        wholes: what :func:`noisiest` found.
        seconds: latencies on ``backend``.
    """
    found = []
    for layer in layers.plan.layers:
        name = layer.node.name
        for form in dict.fromkeys((FLOAT, *forms.get(name, ()))):
            own = (seconds or {}).get((name, form), math.nan)
            estimate = layers.output_noise.get((name, form))
            model_sqnr, lost = wholes.get((name, form), (estimate, None))
            found.append(
                Entry(
                    backend,
                    name,
                    module_path(layer.node),
                    form,
                    noise.get((name, form), math.inf),
                    own,
                    stored_bytes(layers, layer, form),
                    model_sqnr,
                    lost,
                    estimate is not None and (name, form) not in wholes,
                )
            )
    return found


def account(table: Sequence[Entry], formats: Mapping[str, str], why: Mapping[str, str]) -> tuple[dict[str, Any], ...]:
    """The table as JSON-ready rows, with what was chosen and why (non-finite numbers as ``None``).

    Args:
        formats: the format of each layer that is not in float.
        why: by layer, the reason for its format.
    """

    def known(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    rows = []
    for entry in table:
        chosen = formats.get(entry.layer, FLOAT) == entry.form
        row = {key: known(value) for key, value in asdict(entry).items()}
        rows.append({**row, "chosen": chosen, "why": why.get(entry.layer, "") if chosen else ""})
    return tuple(rows)


def stored_bytes(layers: LayerFormats, layer: Layer, form: str) -> int:
    """Bytes of a layer's weight and bias in a format, with the scales and zero points that it needs."""
    weight = shape(layer.weight)
    bias = 4 * weight[0] if layer.bias is not None else 0
    if form in layers.local:
        return layers.local[form].stored_bytes(weight) + bias
    if form == INT8:
        per_channel = 4 + 1  # scale and zero point of the weight; those of the bias follow from it
        return math.prod(weight) + per_channel * weight[0] + bias
    return 4 * math.prod(weight) + bias
