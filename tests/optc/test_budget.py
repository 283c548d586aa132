"""The accuracy budget: metrics, their drop, and what ``optimize`` gives up to keep it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optc
from optc import api
from optc.batches import in_batches_of
from optc.budget import AGREEMENT, Budget, Metric, agreement
from optc.errors import BackendError, OptcError, VerificationError
from optc.lowering.backend import Lowered
from optc.lowering.eager import EagerBackend
from optc.rewrite import add_constant, calls, constant_of

IMAGES = [torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
OPTIONS: dict[str, Any] = {"backend": "onnxruntime", "calibration": IMAGES, "measure": False}


class Mixed(nn.Module):
    """Its middle layer loses everything in int8 (1e5 and ordinary values share its input), the others little."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(9, 8, 1), nn.Linear(8, 10)
        with torch.no_grad():
            self.b.weight[:, 8] = 0

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.gelu(self.a(x))
        y = self.b(torch.cat([y, 1e5 * y[:, :1]], 1))
        return self.c(y.mean((2, 3)))


class Clean(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def same_as(model: nn.Module, tolerance: float) -> Callable[[Any], float]:
    """A metric: share of images whose scores are the model's own within a tolerance."""
    with torch.no_grad():
        wanted = [model.eval()(images) for images in IMAGES]

    def score(call: Any) -> float:
        with torch.no_grad():
            near = [(call(x) - y).abs().amax(1) <= tolerance for x, y in zip(IMAGES, wanted, strict=True)]
        return float(torch.cat(near).float().mean())

    return score


def test_agreement_is_the_share_of_samples_whose_largest_output_stays() -> None:
    one, other = torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]
    metric = agreement(lambda x: {"scores": one}, [(torch.zeros(4, 1),)])
    assert metric.name == AGREEMENT
    assert metric.data == "4 samples"
    assert metric(lambda x: {"scores": one}) == 1.0
    assert metric(lambda x: {"scores": other}) == 0.5


def test_an_output_that_became_nan_does_not_agree() -> None:
    batches = [(torch.eye(3),)]
    metric = agreement(nn.Identity(), batches)
    assert metric(nn.Identity()) == 1.0
    assert metric(lambda x: x * float("nan")) == 0.0


def test_a_drop_of_just_the_budget_is_within_it() -> None:
    budget = Budget(Metric("accuracy", lambda call: call(), "ten images"), 0.9, 10.0)
    assert budget.excess(lambda: 0.8) is None
    assert budget.excess(lambda: 0.95) is None
    assert budget.excess(lambda: 0.7) == "accuracy falls by 20.00 points on ten images, more than 10"
    assert budget.excess(lambda: float("nan")) is not None


def test_calls_in_batches_of_the_size_a_model_takes() -> None:
    sizes: list[int] = []

    def call(x: Tensor) -> dict[str, Tensor]:
        sizes.append(len(x))
        return {"doubled": 2 * x}

    x = torch.arange(7.0)
    assert torch.equal(in_batches_of(3, call)(x)["doubled"], 2 * x)
    assert sizes == [3, 3, 3]
    assert in_batches_of(None, call) is call


def test_layers_stay_in_float_until_the_budget_holds() -> None:
    model = Mixed()
    metric = agreement(model.eval(), [(images,) for images in IMAGES])
    optimized = optc.optimize(model, IMAGES[0][:1], "quant", evaluate=metric, max_drop=0, **OPTIONS)
    report = optimized.report
    assert report.budget is not None
    assert report.accuracy.metric == AGREEMENT
    assert report.accuracy.drop == 0.0
    assert report.budget.quantized
    record = report.passes[-1]
    assert "conv2d_1" in [skip.node for skip in record.skipped]
    assert record.applied
    assert "0.00 points of top-1 agreement lost, 0 allowed (32 samples)" in report.verdict


def test_where_nothing_holds_only_exact_passes_are_kept_and_the_last_line_says_so() -> None:
    model = Clean()
    optimized = optc.optimize(
        model, IMAGES[0][:1], "fuse,quant", evaluate=same_as(model, 1e-5), max_drop=1.0, **OPTIONS
    )
    report = optimized.report
    assert report.precision == "float32"
    assert report.accuracy.after == 1.0
    assert report.verdict.split("Budget: ")[1].startswith("NOT quantized: nothing that quant can do keeps the budget")
    reasons = [skip.reason for record in report.passes if record.name == "quant" for skip in record.skipped]
    assert any("accuracy falls by 100.00 points" in reason for reason in reasons)


def test_what_only_shows_in_the_end_is_mended_too() -> None:
    model = Clean()
    asked: list[object] = []

    def blind(call: object) -> float:
        asked.append(call)
        return 1.0

    optimized = optc.optimize(
        model, IMAGES[0][:1], "quant", evaluate=same_as(model, 1e-5), validate=blind, max_drop=1.0, **OPTIONS
    )
    budget = optimized.report.budget
    assert asked
    assert budget is not None
    trials = ("the passes", "half the budget", "a quarter of the budget")
    # Each trial has to come 3 dB closer than the one before, which may leave no layer for the last one.
    assert len(budget.tried) in (2, 3)
    assert budget.tried == tuple(f"{trial} lost 100.00 points" for trial in trials[: len(budget.tried)])
    assert not budget.quantized
    assert optimized.report.accuracy.after == 1.0
    assert "half the budget lost 100.00 points" in optimized.report.verdict


def test_without_a_metric_the_largest_output_must_stay() -> None:
    optimized = optc.optimize(
        Mixed(), IMAGES[0][:1], "quant", max_drop=0, verification=[(images,) for images in IMAGES], **OPTIONS
    )
    assert optimized.report.accuracy.metric == AGREEMENT
    assert optimized.report.accuracy.after == 1.0


@pytest.mark.parametrize("labels", [True, False])
def test_a_fixed_batch_has_a_metric_too(labels: bool) -> None:
    class Fixed(Clean):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(2, 3, 16, 16))

    model = Fixed().eval()
    plain = Clean().eval()
    metric = agreement(plain, [(images[:5],) for images in IMAGES]) if labels else None
    optimized = optc.optimize(model, IMAGES[0][:2], "quant", evaluate=metric, max_drop=20, **OPTIONS)
    assert not optimized.program.dynamic_batch
    assert optimized.report.accuracy.after is not None
    assert optimized.report.accuracy.after >= 0.8


def test_a_budget_that_cannot_be_checked_is_not_said_to_be_kept() -> None:
    optimized = optc.optimize(
        Clean(),
        IMAGES[0][:1],
        "quant",
        evaluate=lambda call: 1.0,
        max_drop=1,
        info=optc.ModelInfo("clean", weights="random"),
        **OPTIONS,
    )
    assert "Budget: NOT checked: accuracy not measurable: random weights" in optimized.report.verdict


def test_the_search_looks_at_the_unquantized_model_once() -> None:
    model, seen = Clean(), []

    def metric(call: object) -> float:
        seen.append(call)
        return 1.0

    optc.optimize(model, IMAGES[0][:1], "quant", evaluate=same_as(model, 1e-5), validate=metric, max_drop=1, **OPTIONS)
    assert sum(call is model for call in seen) == 1


def test_another_trial_comes_closer_to_the_model() -> None:
    model = Clean()
    calls: list[int] = []
    runtime: list[float] = []

    def only_once_close(call: object) -> float:
        """Full marks for all but the first runtime that is asked."""
        calls.append(1)
        with torch.no_grad():
            outputs, wanted = call(IMAGES[0]), model(IMAGES[0])  # type: ignore[operator]
        runtime.append(sqnr_db(wanted, outputs))
        return 0.5 if len(calls) == 2 else 1.0

    optimized = optc.optimize(
        model, IMAGES[0][:1], "quant", evaluate=only_once_close, validate=lambda call: 1.0, max_drop=1.0, **OPTIONS
    )
    budget = optimized.report.budget
    assert budget is not None
    assert budget.tried == ("the passes lost 50.00 points",)
    assert runtime[-1] > runtime[1] + 2.5


class FloatAlone(EagerBackend):
    """A runtime without integers."""

    def lower(self, program: optc.Program, target: optc.Target, folder: Path) -> Lowered:
        if any("::quantize_" in str(getattr(node.target, "_schema", "")) for node in program.graph.nodes):
            raise BackendError("float-alone has no integers")
        return super().lower(program, target, folder)


def test_a_runtime_that_refuses_what_a_trial_made_gets_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "backends", lambda name, target: ([FloatAlone()], {}))
    model = Clean()
    asked: dict[str, Any] = {**OPTIONS, "backend": "eager", "evaluate": same_as(model, 1e-3)}
    optimized = optc.optimize(model, IMAGES[0][:1], "fuse,quant", max_drop=100.0, **asked)
    assert optimized.report.precision == "float32"
    assert "the passes: float-alone has no integers" in optimized.report.verdict
    with pytest.raises(BackendError, match="float-alone has no integers"):
        optc.optimize(model, IMAGES[0][:1], "fuse,quant", **asked)


class Noisy(optc.Pass):
    """Keeps 0 dB, and what it promised only where more than that is asked for."""

    name, summary = "noisy", "Add noise to the last layer's weight."
    numerics = optc.Numerics(exact=False, min_sqnr_db=20.0)

    def run(self, program: optc.Program, context: optc.PassContext) -> optc.PassResult:
        asked = context.budget.min_sqnr_db if context.budget else 0.0
        (layer,) = calls(program, torch.ops.aten.linear.default)
        weight = constant_of(program, layer.args[1])
        moved = weight * (1 + (1e-3 if asked > 20 else 1.0))
        layer.update_arg(1, add_constant(program, layer, "moved", moved))
        return optc.PassResult(program, True, (optc.Change("noisy", layer.name, str(asked)),))


def test_a_pass_that_is_noisier_than_it_promised_is_asked_for_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where reproducers go
    model = Clean()
    asked = {**OPTIONS, "evaluate": lambda call: 1.0}
    optimized = optc.optimize(model, IMAGES[0][:1], [Noisy()], max_drop=1.0, **asked)
    budget = optimized.report.budget
    assert budget is not None
    (first,) = budget.tried
    assert first.startswith("the passes: pass 'noisy'")
    assert "is below its budget of 20 dB" in first
    assert not list(tmp_path.iterdir()), "the model's weights stay nowhere"
    assert optimized.report.passes[-1].applied[0].detail == "23.0"
    with pytest.raises(VerificationError, match="pass 'noisy'"):
        optc.optimize(model, IMAGES[0][:1], [Noisy()], **asked)


def test_where_quantization_costs_too_much_bfloat16_may_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 10))
    options, int4 = {**OPTIONS, "backend": "eager"}, "quant<formats=int4-weights>"
    worst: dict[str, float] = {}
    for passes in (int4, "bf16"):
        made = optc.optimize(model, IMAGES[0][:1], passes, **options)
        with torch.no_grad():
            worst[passes] = max(float((made(images) - model(images)).abs().max()) for images in IMAGES)
    assert worst[int4] > 2 * worst["bf16"], "or the test says nothing"
    within = same_as(model, 1.5 * worst["bf16"])
    optimized = optc.optimize(
        model,
        IMAGES[0][:1],
        f"{int4},bf16",
        evaluate=lambda call: within(call),
        validate=lambda call: 1.0,
        max_drop=1.0,
        **options,
    )
    report = optimized.report
    assert report.budget is not None
    assert report.precision == "bfloat16"
    assert report.verdict.split("Budget: ")[1].startswith("NOT quantized: nothing that quant can do keeps the budget")


def test_a_trial_that_makes_the_same_again_is_passed_over() -> None:
    lowered: list[str] = []

    class Counts(EagerBackend):
        def lower(self, program: optc.Program, target: optc.Target, folder: Path) -> Lowered:
            lowered.append(program.history[-1].name)
            return super().lower(program, target, folder)

    model = Clean()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "backends", lambda name, target: ([Counts()], {}))
        optimized = optc.optimize(
            model,
            IMAGES[0][:1],
            "fuse,bf16",
            evaluate=same_as(model, 1e-7),
            max_drop=1.0,
            **{**OPTIONS, "backend": "eager"},
        )
    assert lowered.count("bf16") == 1
    assert optimized.report.precision == "float32"


def sqnr_db(reference: torch.Tensor, outputs: torch.Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - outputs).square().sum()))


def test_decisions_agree_each_for_itself() -> None:
    classes = agreement(lambda x: torch.tensor([0, 1, 2, 9]), [(torch.zeros(4, 1),)])
    assert classes(lambda x: torch.tensor([5, 5, 5, 9])) == 0.25
    masks = agreement(lambda x: x > 0, [(torch.tensor([[1.0, -1.0], [1.0, -1.0]]),)])
    assert masks(lambda x: x > -2) == 0.5


@pytest.mark.parametrize("shape", [(8, 1), (8,)])
def test_outputs_without_a_largest_one_are_refused(shape: tuple[int, ...]) -> None:
    metric = agreement(lambda x: torch.ones(shape), [(torch.zeros(8, 3),)])
    with pytest.raises(OptcError, match=r"outputs of torch.float32 and shape .* have no largest one"):
        metric(lambda x: -torch.ones(shape))


def test_a_metric_of_the_search_is_told_from_that_of_the_result() -> None:
    given = {**OPTIONS, "backend": "eager", "evaluate": lambda call: 0.5, "max_drop": 1.0}
    scores = iter((1.0, *[0.0] * 50))
    made = optc.optimize(Clean(), IMAGES[0], "quant", validate=lambda call: next(scores), **given)
    reasons = {skip.reason for record in made.report.passes for skip in record.skipped}
    assert any("accuracy falls by 100.00 points on the data of 'validate'" in reason for reason in reasons), reasons
