"""What the pass ``partition`` planned, for people: the stages, a drawing of a batch on its way, and what to expect."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from optc.passmanager.contract import PassRecord
from optc.report.words import megabytes, milliseconds, short
from optc.schedule import Schedule, Slot, schedule

_MOST = 16
"""Stages that are drawn, and cuts that are listed, one by one."""
_VALUES_NAMED = 3
_SHADES = "·░▒▓█"
_WIDTH = 96
"""Letters that a batch's time is drawn in at most."""


@dataclass(frozen=True)
class Prediction:
    """What a plan promises for one batch.

    Attributes:
        account: the pass's rows, one for each stage; times and sizes are those of a microbatch.
        schedule: the batch on its way through the stages.
        images: in a batch.
        alone_seconds, alone_device: the same microbatches one after the other on one of the devices, the fastest.
        alone_fits: whether the whole model fits into that device's memory, none of which other stages have then.
        timing: ``"measured"``, ``"roofline"``, or both where stages differ.
    """

    account: tuple[Mapping[str, Any], ...]
    schedule: Schedule
    images: int
    alone_seconds: float
    alone_device: str
    alone_fits: bool
    timing: str

    @classmethod
    def of(cls, history: Sequence[PassRecord]) -> Prediction:
        """The prediction of the last partition in a program's history."""
        account = next(record.notes["account"] for record in reversed(history) if record.name == "partition")
        microbatches = int(account[0]["microbatches"])
        alone = min(account, key=lambda row: row["whole_seconds"])
        return cls(
            account=tuple(account),
            schedule=schedule(
                [row["compute_seconds"] for row in account],
                [row["send_seconds"] for row in account[:-1]],
                microbatches,
            ),
            images=microbatches * int(account[0]["microbatch"]),
            alone_seconds=microbatches * alone["whole_seconds"],
            alone_device=alone["device"],
            alone_fits=alone["whole_memory_bytes"] is None or alone["whole_bytes"] <= alone["whole_memory_bytes"],
            timing=" and ".join(sorted({row["timing"] for row in account})),
        )

    @property
    def speedup(self) -> float:
        """How many times the throughput of one device."""
        return self.alone_seconds / self.schedule.seconds if self.schedule.seconds else 1.0

    @property
    def slowest(self) -> int:
        """The stage that sets the pace."""
        return max(range(len(self.account)), key=lambda stage: busy_seconds(self.account[stage]))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; times in seconds, throughput in images a second."""
        plan = self.schedule
        return {
            "stages": [dict(row) for row in self.account],
            "images": self.images,
            "microbatches": len(plan.slots[0]),
            "latency_seconds": plan.seconds,
            "throughput": self.images / plan.seconds if plan.seconds else None,
            "period_seconds": plan.period,
            "bubble": plan.bubble,
            "ideal_bubble": plan.ideal_bubble,
            "one_device": {
                "device": self.alone_device,
                "latency_seconds": self.alone_seconds,
                "fits": self.alone_fits,
            },
            "speedup": self.speedup,
            "timing": self.timing,
        }


def busy_seconds(row: Mapping[str, Any]) -> float:
    """How long a stage is busy with one microbatch."""
    return float(row["receive_seconds"] + row["compute_seconds"] + row["send_seconds"])


def render(prediction: Prediction) -> Group:
    """The stages, what they hand on, the drawing and the prediction."""
    parts = [stages_table(prediction), *([Text(), handed_on_table(prediction)] if len(prediction.account) > 1 else ())]
    return Group(*parts, Text(), _Drawing(prediction.schedule), Text(), *map(Text, words(prediction)))


def stages_table(prediction: Prediction) -> Table:
    """One row for each stage, the slowest one in bold."""
    table = Table(
        *STAGE_COLUMNS, title="Stages, for one microbatch", title_justify="left", box=None, pad_edge=False,
        header_style="bold",
    )  # fmt: skip
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    for row in stage_rows(prediction):
        table.add_row(*map(Text, row), style="bold" if row[0] == str(prediction.slowest) else None)
    return table


def handed_on_table(prediction: Prediction) -> Table:
    """What goes through each cut; of many cuts the first and the last ones."""
    table = Table(
        "cut", "size", "handed on", title="Between stages", title_justify="left", box=None, pad_edge=False,
        header_style="bold",
    )  # fmt: skip
    table.columns[1].justify, table.columns[1].no_wrap = "right", True
    rows = handed_on_rows(prediction)
    for index in _first_and_last(len(rows)):
        table.add_row(*(map(Text, rows[index]) if index is not None else ("…",)))
    return table


STAGE_COLUMNS = ("stage", "device", "nodes", "compute", "transfer", "share", "weights", "activations")


def stage_rows(prediction: Prediction) -> list[tuple[str, ...]]:
    """The cells of the table of stages; ``share`` is of all the stages' computing."""
    whole = sum(row["compute_seconds"] for row in prediction.account) or 1.0
    return [
        (
            str(row["stage"]),
            row["device"],
            str(row["nodes"]),
            milliseconds(row["compute_seconds"]),
            milliseconds(row["receive_seconds"] + row["send_seconds"]),
            f"{row['compute_seconds'] / whole:.1%}",
            megabytes(row["weight_bytes"]),
            megabytes(row["activation_bytes"]),
        )
        for row in prediction.account
    ]


def handed_on_rows(prediction: Prediction) -> list[tuple[str, ...]]:
    """For each cut the stages, the size and the tensors."""
    rows: list[tuple[str, ...]] = []
    for row in prediction.account[:-1]:
        named = [f"{each['name']} {each['shape']} {each['dtype']}" for each in row["cut"][:_VALUES_NAMED]]
        more = f" and {len(row['cut']) - len(named)} more" if len(row["cut"]) > len(named) else ""
        rows.append((f"{row['stage']} → {row['stage'] + 1}", megabytes(row["send_bytes"]), f"{', '.join(named)}{more}"))
    return rows


def words(prediction: Prediction) -> list[str]:
    """What to expect of one batch, in sentences."""
    plan, images, alone = prediction.schedule, prediction.images, prediction.alone_seconds
    stages, count = len(plan.slots), len(plan.slots[0])
    batch = (
        f"A batch of {images} in {count} microbatches: {milliseconds(plan.seconds)}, {_rate(images, plan.seconds)}"
        f" images/s; with batches without end {_rate(images, count * plan.period)} images/s."
    )
    fits = "" if prediction.alone_fits else ", into whose memory the model does not fit"
    device = (
        f"One {prediction.alone_device}{fits}: {milliseconds(alone)}, {_rate(images, alone)} images/s. The pipeline has"
        f" {short(prediction.speedup)} times that; {stages} equal stages that send for nothing would have"
        f" {short(stages * (1 - plan.ideal_bubble))} times."
    )
    bubble = f"Bubble: {plan.bubble:.1%} of their time stages do not compute; those equal ones {plan.ideal_bubble:.1%}."
    return [batch, device, bubble, _TIMING.get(prediction.timing, " ".join(_TIMING.values()))]


_TIMING = {
    "measured": "Times are measured here, node by node, in the eager backend.",
    "roofline": "Times are rooflines, the least that the devices' data sheets allow: small operators take more.",
}


def _rate(images: int, seconds: float) -> str:
    return short(images / seconds) if seconds else "any number of"


class _Drawing:
    """The timeline in the width that there is."""

    def __init__(self, plan: Schedule) -> None:
        self._plan = plan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from timeline(self._plan, min(_WIDTH, options.max_width - len(str(len(self._plan.slots))) - 1))


def timeline(plan: Schedule, width: int) -> list[Text]:
    """A line for each stage: the microbatch it computes, ``-`` while it sends or receives, ``·`` while it waits.

    Where a microbatch is not two letters wide, shades instead: how much of a letter's time the stage computes.

    Args:
        width: letters that the batch's time is drawn in.
    """
    label = len(str(len(plan.slots) - 1))
    letter = plan.seconds / width
    dense = 2 * letter > plan.period
    legend = "the darker, the more it computes" if dense else "digits: microbatch computed, -: transfer, ·: waiting"
    lines = [Text(f"One batch, {milliseconds(plan.seconds)} ({legend})", style="bold")]
    for stage in _first_and_last(len(plan.slots)):
        if stage is None:
            lines.append(Text(f"{'…':>{label}}", style="dim"))
            continue
        line = Text(f"{stage:>{label}} ", no_wrap=True)
        for column in range(width):
            if dense:
                line.append(_shade(plan.slots[stage], column * letter, (column + 1) * letter))
            else:
                line.append(*_letter(plan.slots[stage], (column + 0.5) * letter))
        lines.append(line)
    return lines


def _first_and_last(count: int) -> list[int | None]:
    """Indices to show: all of a few, else the first and the last ones with ``None`` between."""
    half = _MOST // 2
    return list(range(count)) if count <= _MOST else [*range(half), None, *range(count - half, count)]


def _shade(slots: Sequence[Slot], begin: float, end: float) -> str:
    """How much of the time between two moments a stage computes."""
    first = max(bisect_right(slots, begin, key=lambda slot: slot.receive) - 1, 0)
    inside = itertools.takewhile(lambda slot: slot.receive < end, slots[first:])
    busy = sum(max(0.0, min(slot.computed, end) - max(slot.compute, begin)) for slot in inside)
    return _SHADES[round(busy / (end - begin) * (len(_SHADES) - 1))] if end > begin else _SHADES[0]


def _letter(slots: Sequence[Slot], moment: float) -> tuple[str, str]:
    """What a stage does at a moment, and the style to show it in."""
    found = bisect_right(slots, moment, key=lambda slot: slot.receive) - 1
    slot = slots[max(found, 0)]
    if slot.compute <= moment < slot.computed:
        return str(slot.microbatch % 10), "black on cyan" if slot.microbatch % 2 else "black on green"
    if slot.receive <= moment < slot.compute or slot.send <= moment < slot.end:
        return "-", "yellow"
    return "·", "dim"
