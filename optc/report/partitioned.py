"""The report of ``optc partition`` as a document: the stages, a batch on its way, what to expect."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import optc
from optc.report.document import Chart, Code, Document, Section, Table
from optc.report.stages import STAGE_COLUMNS, Prediction, handed_on_rows, stage_rows, words
from optc.report.svg import MUTED, SERIES, element, figure
from optc.report.words import milliseconds, short
from optc.schedule import Schedule


def partitioned_document(model: str, prediction: Prediction, commands: Sequence[str]) -> Document:
    """What was planned, for people.

    Args:
        commands: lines that make the same again.
    """
    count = len(prediction.account)
    stages = Table(
        "Stages, for one microbatch", STAGE_COLUMNS, tuple(stage_rows(prediction)), range(2, 8), prediction.slowest
    )
    cuts = Table("Between stages", ("cut", "size", "handed on"), tuple(handed_on_rows(prediction)), (1,))
    return Document(
        title=f"{model} in {count} stages",
        verdict=f"{count} stages are expected to do {short(prediction.speedup)} times the work of one device.",
        good=None,
        summary=tuple(words(prediction)),
        sections=(
            Section("A batch on its way", (timeline_chart(prediction.schedule),)),
            Section("The stages", (stages, cuts) if cuts.rows else (stages,)),
            Section("Make it again", (Code("The same plan", tuple(commands)),)),
        ),
        made=f"Made by optc {optc.__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
    )


def timeline_chart(plan: Schedule) -> Chart:
    """Stages over time: computing in two colours by turns, transfers, and the bubble where nothing is."""
    stages = len(plan.slots)
    with figure(0.8 + min(0.3 * stages, 6.0)) as drawn:
        axes = drawn.add_subplot()
        for stage, slots in enumerate(plan.slots):
            row = (stage - 0.4, 0.8)
            for parity in (0, 1):
                turns = [(s.compute * 1e3, (s.computed - s.compute) * 1e3) for s in slots if s.microbatch % 2 == parity]
                axes.broken_barh(turns, row, color=SERIES[1 + parity], linewidth=0)
            received = [(s.receive * 1e3, (s.compute - s.receive) * 1e3) for s in slots]
            sent = [(s.send * 1e3, (s.end - s.send) * 1e3) for s in slots]
            axes.broken_barh([each for each in received + sent if each[1] > 0], row, color=MUTED, linewidth=0)
        axes.set_ylim(stages - 0.4, -0.6)
        axes.set_xlim(0, plan.seconds * 1e3 or 1)
        axes.set_yticks(range(0, stages, 1 + stages // 17))
        axes.set(xlabel="ms", ylabel="stage")
        title = "What each stage does over one batch (ms)"
        alt = (
            f"{stages} stages work on {len(plan.slots[0])} microbatches for {milliseconds(plan.seconds)}; for"
            f" {plan.bubble:.0%} of their time they do not compute."
        )
        note = "Colours alternate between microbatches, grey is transfer, and where nothing is drawn a stage waits."
        return Chart(title, alt, element(drawn, title, alt), note)
