"""The task's metric of a model before and after, and the budget of it that passes must keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from optc.batches import fixed_batch, in_batches_of
from optc.budget import ACCURACY, Budget, Call, Metric, agreement
from optc.evaluation import evaluation_mode
from optc.program import Program
from optc.progress import Run
from optc.report.report import Accuracy


def metric_of(
    given: Callable[[Call], float] | None,
    captured: Program,
    batches: Sequence[tuple[Tensor, ...]] | None,
    argument: str = "evaluate",
) -> Metric | None:
    """The caller's metric by its name; without one, agreement with the captured model on ``batches``, if there are.

    Args:
        argument: what the caller's metric was given as.
    """
    if given is None:
        return None if batches is None else agreement(captured.call, batches)
    return given if isinstance(given, Metric) else Metric(ACCURACY, given, f"the data of '{argument}'")


def _meaningless(metric: Metric | None, program: Program) -> str:
    """Why there is no metric to report; the accuracy of random weights would be a number without a meaning."""
    if program.info.weights == "random" and (metric is None or metric.name == ACCURACY):
        return "not measurable: random weights"
    return "" if metric is not None else "not measured: no labelled data was given"


def before_of(run: Run, metric: Metric | None, model: nn.Module, captured: Program) -> Accuracy:
    """The metric of the model itself."""
    if (reason := _meaningless(metric, captured)) or metric is None:
        return Accuracy(reason=reason)
    with run.step("Evaluating the captured model") as step, torch.no_grad(), evaluation_mode(model):
        before = metric(in_batches_of(fixed_batch(captured), model))
        step.done(f"{metric.name} {before:.2%}")
    return Accuracy(before, None, metric.data, metric=metric.name)


def after_of(run: Run, metric: Metric | None, before: Accuracy, program: Program, call: Call) -> Accuracy:
    """The metric of the optimized model beside that of the model itself."""
    if metric is None or before.reason:
        return before
    with run.step("Evaluating the optimized model") as step:
        after = metric(in_batches_of(fixed_batch(program), call))
        step.done(f"{metric.name} {after:.2%}")
    return replace(before, after=after)


def budget_of(metric: Metric | None, model: nn.Module, captured: Program, max_drop: float | None) -> Budget | None:
    """What passes may lose of the metric; nothing is asked of them without one, or without a limit.

    Runs the model over the metric's data once.
    """
    if metric is None or max_drop is None or _meaningless(metric, captured):
        return None
    fitted = replace(metric, score=lambda call: metric(in_batches_of(fixed_batch(captured), call)))
    with torch.no_grad(), evaluation_mode(model):
        return Budget(fitted, fitted(model), max_drop)
