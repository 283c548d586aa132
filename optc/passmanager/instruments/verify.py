"""Verification: after each pass the program is run and compared with the captured model."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from optc.batches import at_batch
from optc.errors import VerificationError
from optc.passmanager.compare import Comparison, Outputs, compare, nan_in, rounding_sqnr_db
from optc.passmanager.contract import Instrument, Pass, PassContext, PassRecord
from optc.passmanager.reproducer import write_reproducer
from optc.program import Program
from optc.rewrite import is_random, label
from optc.stages import run_stages, split, stage_count


class Verify(Instrument):
    """Stops the run when a pass moves the outputs beyond what it declared.

    An exact pass is compared with the program before it and may cost float rounding only; an approximate one is
    compared with the captured model and may add the noise that it declared to what there was. Both distances are
    recorded. Several lists of passes may run on the captured program, or on what another list began with, under one
    instrument.

    Args:
        captured: the program as captured; it is run once and not kept.
        inputs: batches to run, each a tuple of tensors. Where all have as many samples as passes see, and the program
            takes any number, the first sample is run by itself as well: a pass may have taken that number for granted.
        folder: where a reproducer is left when a pass fails.
        context: the target, instruction sets and calibration data that passes are given, for the reproducer.

    Attributes:
        remarks: what of the model's own outputs there is nothing to compare with, for people.

    Raises:
        VerificationError: an output of the model itself is NaN throughout, or the model draws random numbers.
    """

    name = "verify"

    def __init__(
        self,
        captured: Program,
        inputs: Sequence[tuple[Tensor, ...]],
        folder: Path,
        context: PassContext | None = None,
    ) -> None:
        if drawn := [label(node) for node in captured.graph.nodes if is_random(node)]:
            raise VerificationError(
                f"the model draws random numbers ({', '.join(drawn)}), so that no two runs of it can be compared",
                "let it compute the same each time, as dropout does in evaluation mode",
            )
        self._alone = captured.dynamic_batch and (
            {len(batch[0]) for batch in inputs} == {len(captured.example_inputs[0])} - {1}
        )
        self._inputs = [*inputs, at_batch(inputs[0], captured, 1)] if self._alone else inputs
        self._folder = folder
        self._context = context or PassContext()
        self._reference = [captured.run(*batch) for batch in self._inputs]
        self.remarks = _remarks(self._reference)
        self._outputs = {_path(captured): self._reference}
        self._records: list[PassRecord] = []  # kept alive, so that no other gets the id of one

    def after_pass(self, pass_: Pass, before: Program, after: Program, record: PassRecord) -> dict[str, Any] | None:
        path = _path(before)
        self._records.append(record)
        last = self._outputs.get(path, self._reference)
        if not record.modified:
            self._outputs[(*path, id(record))] = last
            return None
        start = time.perf_counter()
        outputs = _run(after, self._inputs)
        step, total = compare(last, outputs), compare(self._reference, outputs)
        exact = pass_.numerics.exact
        reason = _exceeded(pass_, after, step if exact else total, math.inf if exact else self._noise_db(last))
        if reason:
            noisy = not exact and total.finite
            judged = zip(last if exact else self._reference, outputs, strict=True)
            noise = math.inf if exact else self._noise_db(last)
            parts = (_exceeded(pass_, after, compare([wanted], [got]), noise) for wanted, got in judged)
            batch = next((batch for batch, part in zip(self._inputs, parts, strict=True) if part), self._inputs[0])
            least = pass_.numerics.min_sqnr_db if noisy else None
            raise self._failure(pass_, before, after, record, reason, batch, least)
        self._outputs[(*path, id(record))] = outputs
        return {
            "exact": exact,
            "from_previous": asdict(step),
            "from_captured": asdict(total),
            "seconds": time.perf_counter() - start,
        }

    def _noise_db(self, outputs: list[tuple[Tensor, ...]]) -> float:
        """SQNR in dB of the outputs before a pass; infinite for the captured program's."""
        return math.inf if outputs is self._reference else compare(self._reference, outputs).sqnr_db

    def _failure(
        self,
        pass_: Pass,
        before: Program,
        after: Program,
        record: PassRecord,
        reason: str,
        batch: tuple[Tensor, ...],
        min_sqnr_db: float | None,
    ) -> VerificationError:
        where = first_divergence(before, after, batch)
        if self._alone and batch is self._inputs[-1]:
            where += f"; a sample by itself shows it: was a batch of {len(self._inputs[0][0])} taken for granted?"
        path = None
        try:
            told = f"{reason}; {where}"
            path = write_reproducer(self._folder, pass_, before, after, batch, told, self._context)
            measured = any(row.get("backend") for row in record.notes.get("account", ()))
            hint = f"a reproducer is in {path}{', but it cannot measure layers as this run did' if measured else ''}"
        except Exception as error:
            hint = f"a reproducer could not be written: {type(error).__name__}: {error}"
        predecessors = ", ".join(r.name for r in before.history if r.modified) or "none"
        return VerificationError(
            f"pass '{pass_.name}' (from {pass_.origin}) changed what the model computes: {reason};"
            f" {where}; passes before it: {predecessors}",
            hint,
            min_sqnr_db,
            path,
        )


def _remarks(reference: Outputs) -> list[str]:
    found = nan_in(reference)
    if whole := [position for position, share in found if share == 1.0]:
        raise VerificationError(
            f"output {whole[0]} of the model itself is NaN throughout on the verification inputs",
            "check its weights and the range of its inputs; there is nothing to compare with",
        )
    return [
        f"{share:.1%} of output {position} of the model itself are NaN on the verification inputs;"
        " what they become is not compared"
        for position, share in found
    ]


def _path(program: Program) -> tuple[int, ...]:
    """What tells a program from others made of the same one: the records of its history."""
    return tuple(map(id, program.history))


def _run(program: Program, inputs: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Run the batches; a program with stages stage by stage, each on nothing but what the one before it sent."""
    if stage_count(program) == 1:
        return [program.run(*batch) for batch in inputs]
    stages = split(program)
    return [run_stages(stages, *batch) for batch in inputs]


def _exceeded(pass_: Pass, after: Program, distance: Comparison, before_db: float) -> str | None:
    """What about ``distance`` breaks the pass's promise, or ``None``. Without the pass SQNR was ``before_db``."""
    promise = pass_.numerics
    if not distance.finite:
        return "the outputs are no longer finite"
    if promise.exact:
        bound = rounding_sqnr_db(after)
        if distance.sqnr_db < bound:
            return (
                f"an exact pass, but SQNR fell to {distance.sqnr_db:.1f} dB (rounding alone stays above {bound:.0f} dB)"
            )
        return None
    if promise.min_sqnr_db is not None and distance.sqnr_db < _with_noise(before_db, promise.min_sqnr_db):
        before = f", and passes before it left {before_db:.1f} dB" if math.isfinite(before_db) else ""
        return f"SQNR {distance.sqnr_db:.1f} dB is below its budget of {promise.min_sqnr_db:g} dB{before}"
    agreement = distance.top1_agreement
    if promise.min_top1_agreement is not None and agreement is not None and agreement < promise.min_top1_agreement:
        return f"top-1 agreement {agreement:.1%} is below its budget of {promise.min_top1_agreement:.1%}"
    return None


def _with_noise(*sqnr_db: float) -> float:
    """SQNR in dB where independent noises come together: their powers add up."""
    return -10.0 * math.log10(sum(10.0 ** (-db / 10.0) for db in sqnr_db))


def first_divergence(before: Program, after: Program, inputs: tuple[Tensor, ...]) -> str:
    """The first node, in graph order, whose value differs from its counterpart's in the program before the pass.

    A node's counterpart has the same name, or is the one :func:`optc.rewrite.replace` recorded.
    """
    values = _node_values(before, inputs)
    bound = rounding_sqnr_db(after)
    for node, value in _iterate_values(after, inputs):
        counterpart = node.name if node.name in values else node.meta.get("replaces")
        expected = values.get(counterpart) if counterpart else None
        if expected is None or expected.shape != value.shape:
            continue
        distance = compare([(expected,)], [(value,)])
        if distance.sqnr_db < bound:
            return f"first node that diverges: {node.name} ({node.target}), SQNR {distance.sqnr_db:.1f} dB"
    return "no single node diverges, only the outputs"


def _node_values(program: Program, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {node.name: value for node, value in _iterate_values(program, inputs)}


@torch.no_grad()
def _iterate_values(program: Program, inputs: tuple[Tensor, ...]) -> list[tuple[fx.Node, Tensor]]:
    recorded: list[tuple[fx.Node, Tensor]] = []

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_function" and isinstance(value, Tensor):
                recorded.append((n, value))
            return value

    Recorder(program.module).run(*inputs)
    return recorded
