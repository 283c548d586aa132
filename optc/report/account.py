"""The account a pass keeps of its choices: what each layer costs in each format, and why it has the one it has."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table
from rich.text import Text

from optc.report.write import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOAT = "float"
_BAR = 8
"""Characters of the longest bar."""
Row = Mapping[str, Any]
_NUMBER = (int, float)
_UNKNOWN = (*_NUMBER, type(None))
KEYS: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("backend", "layer", "module", "form", "why"), str),
    **dict.fromkeys(("sqnr_db", "model_sqnr_db", "drop", "seconds"), _UNKNOWN),
    "bytes": _NUMBER,
    "chosen": bool,
}
"""What a row holds, and the types of that, as :mod:`optc_passes.quant_account` writes it."""


def is_account(rows: object) -> bool:
    """Whether rows from a manifest are an account that can be shown: a plugin's pass may keep one of its own kind."""
    if not isinstance(rows, list) or not rows:
        return False
    if not all(isinstance(row, dict) and row.keys() >= KEYS.keys() for row in rows):
        return False
    if not all(isinstance(row[key], types) for row in rows for key, types in KEYS.items()):
        return False
    layers = {row["layer"] for row in rows}
    return (
        layers
        == {row["layer"] for row in rows if row["chosen"]}
        == {row["layer"] for row in rows if row["form"] == FLOAT}
    )


@dataclass(frozen=True)
class LayerAccount:
    """One layer: its row in float, in the format it has, and in every format that was looked at."""

    name: str
    module: str
    chosen: Row
    rows: Sequence[Row]

    @property
    def label(self) -> str:
        """The module's path in the original model, or the node's name."""
        return self.module or self.name

    @property
    def unquantized(self) -> Row:
        """The row in float."""
        return next(row for row in self.rows if row["form"] == FLOAT)


def by_layer(account: Sequence[Row]) -> list[LayerAccount]:
    """The rows of an account, layer by layer, in their order."""
    layers: dict[str, list[Row]] = {}
    for row in account:
        layers.setdefault(row["layer"], []).append(row)
    return [
        LayerAccount(name, rows[0]["module"], next(row for row in rows if row["chosen"]), rows)
        for name, rows in layers.items()
    ]


def account_table(account: Sequence[Row], title: str, every: bool = False) -> Table:
    """One row a layer, with a bar for its latency in the format it has, or for its noise where latency is unknown.

    Args:
        every: a row for each format that was looked at.
    """
    layers = by_layer(account)
    timed = any(row["seconds"] is not None for row in account)
    whole = any(row["model_sqnr_db"] is not None for row in account)
    metric = any(row["drop"] is not None for row in account)
    columns: list[Column | str] = [Column("layer", no_wrap=True), Column("format", no_wrap=True), "own SQNR dB"]
    columns += ["model SQNR dB"] * whole + ["points lost"] * metric + ["µs in float", "µs", ""] * timed
    table = Table(
        *columns, "MB in float", "MB", title=title, title_justify="left", box=None, pad_edge=False, header_style="bold",
    )  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right" if column.header else "left"
    longest = max((row["seconds"] or 0.0 for row in account if row["chosen"]), default=0.0)
    for layer in layers:
        shown = layer.rows if every else [layer.chosen]
        for row in shown:
            cells = [layer.label, row["form"], _cell(row["sqnr_db"], ".1f", "exact" if row["form"] == FLOAT else "–")]
            cells += [_about(row) + _cell(row["model_sqnr_db"], ".1f")] * whole + [_cell(row["drop"], ".2f")] * metric
            if timed:
                bar = "█" * max(1, round(_BAR * row["seconds"] / longest)) if row["seconds"] and row["chosen"] else ""
                cells += [_cell(_micro(layer.unquantized), ".0f"), _cell(_micro(row), ".0f"), bar]
            cells += [_megabytes(layer.unquantized), _megabytes(row)]
            table.add_row(*map(Text, cells), style="bold" if every and row["chosen"] else None)
    return table


def account_reasons(account: Sequence[Row]) -> list[str]:
    """Why layers have their formats: a line for each reason, behind the layers that have it."""
    layers: dict[str, list[str]] = {}
    for layer in by_layer(account):
        layers.setdefault(layer.chosen["why"], []).append(layer.label)
    everyone = len(layers) == 1
    return [f"{'all layers' if everyone else ', '.join(names)}: {why}" for why, names in layers.items() if why]


def account_summary(account: Sequence[Row]) -> str:
    """How many layers have which format, and what they take together."""
    layers = by_layer(account)
    forms = [layer.chosen["form"] for layer in layers]
    counts = ", ".join(f"{forms.count(form)} in {form}" for form in dict.fromkeys(forms))
    megabytes = [sum(row["bytes"] for row in rows) / 1e6 for rows in _before_and_after(layers)]
    text = f"{len(layers)} layers: {counts}; {megabytes[0]:.1f} MB in float, {megabytes[1]:.1f} MB as chosen"
    if all(row["seconds"] for rows in _before_and_after(layers) for row in rows):
        taken = [sum(row["seconds"] for row in rows) * 1e3 for rows in _before_and_after(layers)]
        backend = layers[0].chosen["backend"]
        text += f"; by themselves on {backend} {taken[0]:.2f} ms in float, {taken[1]:.2f} ms as chosen"
    return text


def account_figure(account: Sequence[Row], title: str) -> Figure:
    """Bars per layer, float beside the chosen format: latency (where measured), size, and SQNR: the model's with that
    layer alone quantized, or where that is not known the layer's own.
    """
    from matplotlib.figure import Figure

    layers = by_layer(account)
    timed = all(row["seconds"] for rows in _before_and_after(layers) for row in rows)
    panels = ([("latency by itself (µs)", "seconds", 1e6)] if timed else []) + [("size (MB)", "bytes", 1e-6)]
    figure = Figure(figsize=(4.0 * (len(panels) + 1) + 2, 1.4 + 0.34 * len(layers)), layout="constrained")
    axes = figure.subplots(1, len(panels) + 1, sharey=True, squeeze=False)[0]
    places = list(range(len(layers)))
    for axis, (label, key, unit) in zip(axes, panels, strict=False):
        for offset, colour, what, rows in zip(
            (-0.19, 0.19), ("#9aa5b1", "#1f6fb2"), ("float", "as chosen"), _before_and_after(layers), strict=True
        ):
            widths = [row[key] * unit for row in rows]
            axis.barh([place + offset for place in places], widths, 0.36, color=colour, label=what)
        axis.set_xlabel(label)
    axes[0].legend(loc="lower right")
    known = any(layer.chosen["model_sqnr_db"] is not None for layer in layers)
    noise = [layer.chosen["model_sqnr_db" if known else "sqnr_db"] for layer in layers]
    axes[-1].barh(places, [value or 0.0 for value in noise], 0.6, color="#c2662d")
    for place, value, layer in zip(places, noise, layers, strict=True):
        missing = "exact" if layer.chosen["form"] == FLOAT else "–"
        axes[-1].annotate(missing if value is None else f"{value:.0f}", (value or 0.0, place), (3, 0),
                          textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    what = "the model's outputs, this layer alone" if known else "the layer's own output"
    axes[-1].set_xlabel(f"SQNR of {what} (dB)")
    axes[0].set_yticks(places, [f"{layer.label}  {layer.chosen['form']}" for layer in layers], parse_math=False)
    axes[0].invert_yaxis()
    figure.suptitle(title, parse_math=False)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format its name ends in, whole or not at all.

    Raises:
        OptcError: the file cannot be written.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix("."), dpi=150)
    write_whole(path, drawn.getvalue(), "the picture")


def _before_and_after(layers: Sequence[LayerAccount]) -> tuple[list[Row], list[Row]]:
    return [layer.unquantized for layer in layers], [layer.chosen for layer in layers]


def _micro(row: Row) -> float | None:
    return None if row["seconds"] is None else row["seconds"] * 1e6


def _megabytes(row: Row) -> str:
    return f"{row['bytes'] / 1e6:.{0 if row['bytes'] >= 1e8 else 2}f}"


def _about(row: Row) -> str:
    return "~" if row.get("estimated") else ""


def _cell(value: float | None, form: str, missing: str = "–") -> str:
    return missing if value is None else format(value, form)
