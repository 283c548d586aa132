"""Formats chosen by measured latency: the integer program, and the pass on a real runtime."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

import optc
from optc.budget import Budget, Metric
from optc.machine import emulates_bf16, isa
from optc_passes.observers import ActivationObserver
from optc_passes.quant import Quant
from optc_passes.quant_account import Entry, entries
from optc_passes.quant_auto import choose, solve, worth_having
from optc_passes.quant_formats import LayerFormats

SECONDS = {"a": (5.0, 2.0, 1.0), "b": (3.0, 1.0, math.nan), "c": (4.0, 6.0, 2.0)}
DECIBEL = {"float": math.inf, "int8": 40.0, "int4-weights": 18.0}
ENTRIES = [
    Entry("test", name, "", form, DECIBEL[form], seconds, 0)
    for name, row in SECONDS.items()
    for form, seconds in zip(DECIBEL, row, strict=True)
]


def cost(formats: dict[str, str]) -> float:
    return sum(entry.seconds for entry in ENTRIES if formats[entry.layer] == entry.form)


def noise(formats: dict[str, str]) -> float:
    return sum(10 ** (-DECIBEL[form] / 10) for form in formats.values())


@pytest.mark.parametrize("least_db", [10.0, 17.5, 19.0, 38.0, 45.0])
def test_the_integer_program_finds_what_trying_all_finds(least_db: float) -> None:
    budget = 10 ** (-least_db / 10)
    found = solve(ENTRIES, budget)
    every = [dict(zip(SECONDS, forms, strict=True)) for forms in product(DECIBEL, repeat=3)]
    allowed = [formats for formats in every if noise(formats) <= budget and math.isfinite(cost(formats))]
    assert noise(found) <= budget
    assert cost(found) == min(map(cost, allowed))


class Residual(nn.Module):
    """Its last layer adds a residual, which is an input of that layer when it is measured."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 196, 512))
        self.last = nn.Linear(512, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        return x + self.last(x.relu())


def test_auto_measures_every_layer_and_says_what_it_chose() -> None:
    torch.manual_seed(0)
    model = Residual()
    batches = [torch.randn(8, 3, 16, 16)]
    optimized = optc.optimize(
        model,
        batches[0][:1],
        "fuse,quant",
        pass_options={"quant": {"formats": "auto"}},
        backend="onnxruntime",
        calibration=batches,
        measure=False,
        target=optc.Target(threads=1),
    )
    (fused,) = [each for each in optimized.report.passes if each.name == "fuse-residual"]
    assert fused.modified
    record = optimized.report.passes[-1]
    account = record.notes["account"]
    layers = {row["layer"] for row in account}
    assert {row["module"] for row in account} == {"features.0", "features.3", "last"}
    assert len(layers) == 3
    half = set() if emulates_bf16(isa()) else {"fp16", "bf16"}
    forms = {"float", "int8", "int8-dynamic", "int8-weights", "int4-weights"}
    assert {row["form"] for row in account} == forms | half
    assert [row["layer"] for row in account if row["chosen"]] == sorted(layers)
    assert all(row["seconds"] > 0 for row in account if row["form"] not in ("bf16", "fp16"))
    assert not any(row["chosen"] for row in account if row["seconds"] is None)
    chosen = {row["layer"]: row["form"] for row in account if row["chosen"] and row["form"] != "float"}
    assert {change.node: change.rule for change in record.applied} == chosen
    big = {row["form"]: row for row in account if row["bytes"] and row["layer"] == "linear"}
    assert big["int4-weights"]["bytes"] < 0.6 * big["int8"]["bytes"] < 0.2 * big["float"]["bytes"]
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        want = model(x)
    assert 20 * torch.log10(want.norm() / (optimized(x) - want).norm()) > 10


@pytest.mark.parametrize(
    ("seconds", "form"), [((1.0, 1.5, 2.0), "float"), ((2.0, 1.5, 1.0), "int8"), ((2.0, 1.0, 1.5), "int4-weights")]
)
def test_what_is_fastest_as_a_whole_is_kept(seconds: tuple[float, ...], form: str) -> None:
    torch.manual_seed(0)
    program = optc.capture(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval(), (torch.randn(2, 64),))
    wholes: list[int] = []

    def latency(programs: Sequence[optc.Program], seconds_more: float = 0.0) -> list[float]:
        """Each layer is fastest in its last format by itself; whole models take what they are said to."""
        if programs[0].operator_count() == 1:
            return [1.0 / (1 + rank) for rank in range(len(programs))]
        wholes.append(len(programs))
        assert all(each.dynamic_batch for each in programs)
        return list(seconds)

    class Batches:
        description = "noise"

        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter([(torch.randn(8, 64),)])

    result = Quant(formats="auto")(program, optc.PassContext(calibration=Batches(), latency={"slow": latency}))
    assert wholes == [3]
    assert {row["form"] for row in result.account if row["chosen"]} == {form}
    assert {change.rule for change in result.applied} == ({form} if form != "float" else set())
    if form != "int4-weights":
        whole = [
            f"{seconds[i] * 1e6:.0f} µs in {name}" for i, name in enumerate(("float", "the formats chosen", "int8"))
        ]
        reasons = {row["why"] for row in result.account if row["chosen"]}
        assert len(reasons) == 1
        assert all(text in reasons.copy().pop() for text in whole)


@pytest.mark.parametrize("above_db", [-20.0, 0.5], ids=["all layers", "some given back"])
def test_int8_that_is_faster_as_a_whole_alone_is_kept(above_db: float) -> None:
    torch.manual_seed(0)
    program = optc.capture(nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))).eval(), (torch.randn(2, 64),))
    batches = [(torch.randn(8, 64),)]
    measured: list[list[int]] = []

    def latency(programs: Sequence[optc.Program], seconds_more: float = 0.0) -> list[float]:
        """By itself each layer is fastest in float; of whole models the more they are quantized the faster."""
        if programs[0].operator_count() == 1:
            return [1.0 + rank for rank in range(len(programs))]
        integers = [
            sum(value.dtype is torch.int8 and value.dim() == 2 for _, value in each.constants()) for each in programs
        ]
        measured.append(integers)
        return [1.0 / (1 + count) for count in integers]

    class Batches:
        description = "noise"

        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter(batches)

    context = optc.PassContext(calibration=Batches(), latency={"whole": latency})
    layers = LayerFormats(program, context, ActivationObserver)
    layers.calibrate(context)
    formats = dict.fromkeys(layers.names, "int8")
    layers.noise(dict.fromkeys(formats, ("int8",)))
    whole = layers.with_better_bias(formats, layers.attempt(formats)).sqnr
    budget = Budget(Metric("always 1", lambda call: 1.0), 1.0, 0.0, min_sqnr_db=whole + above_db)
    result = Quant(formats="auto")(program, replace(context, budget=budget))
    ((plain, kept),) = measured
    assert plain == 0
    assert kept == len(result.applied)
    assert kept == 3 if above_db < 0 else 1 <= kept <= 2
    assert {change.rule for change in result.applied} == {"int8"}


def tabled(least: float) -> tuple[LayerFormats, list[Entry], optc.PassContext]:
    """Three linear layers, quicker the fewer bits, with a table that takes noise for a tenth of what it is.

    Args:
        least: SQNR in dB that the outputs must keep.
    """
    torch.manual_seed(0)
    program = optc.capture(nn.Sequential(*(nn.Linear(256, 256) for _ in range(3))).eval(), (torch.randn(2, 256),))

    class Batches:
        description = "noise"

        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter([(torch.randn(16, 256, generator=torch.Generator().manual_seed(1)),)])

    budget = Budget(Metric("always 1", lambda call: 1.0), 1.0, 0.0, min_sqnr_db=least)
    context = optc.PassContext(calibration=Batches(), budget=budget)
    layers = LayerFormats(program, context, ActivationObserver)
    layers.calibrate(context)
    forms = dict.fromkeys(layers.names, ("float", "int8", "int4-weights"))
    noise = layers.noise(dict.fromkeys(layers.names, ("int8", "int4-weights")))
    seconds = {(name, form): 3.0 - rank for name in forms for rank, form in enumerate(forms[name])}
    table = entries(layers, forms, {pair: level + 10 for pair, level in noise.items()}, {}, "test", seconds)
    return layers, table, context


def test_a_sum_that_was_too_optimistic_is_tightened_until_the_whole_holds() -> None:
    layers, table, context = tabled(least=25.0)
    first = layers.attempt(solve(table, 0.1))
    assert first.sqnr < 25, "or there is nothing to tighten"
    choice = choose(layers, table, context)
    assert choice.attempt.sqnr >= 25
    assert set(choice.formats.values()) & {"int8", "int4-weights"}, "not everything had to go"
    assert choice.seconds == sum(entry.seconds for entry in table if choice.formats[entry.layer] == entry.form)


def test_where_nothing_holds_all_layers_are_in_float() -> None:
    layers, table, context = tabled(least=25.0)
    refuse = Budget(Metric("always 0", lambda call: 0.0, "three images"), 1.0, 0.0)
    choice = choose(layers, table, replace(context, budget=refuse))
    assert set(choice.formats.values()) == {"float"}
    assert choice.attempt.layers == ()


def test_only_what_is_faster_than_float_somewhere_is_worth_a_look() -> None:
    noise = {("a", "int8"): 30.0, ("a", "int4-weights"): 20.0, ("b", "int8"): 40.0}
    a, b = {("a", "float"): 2.0, ("b", "float"): 1.0}, {("a", "float"): 2.0, ("b", "float"): 3.0}
    slow = a | {("a", "int8"): 3.0, ("a", "int4-weights"): math.nan, ("b", "int8"): 1.0}
    quick = b | {("a", "int8"): 1.0, ("a", "int4-weights"): 2.5, ("b", "int8"): 4.0}
    assert worth_having(noise, {"slow": slow}) == {}
    assert worth_having(noise, {"slow": slow, "quick": quick}) == {("a", "int8"): 30.0}


def test_auto_without_a_backend_is_one_line() -> None:
    program = optc.capture(nn.Linear(32, 4), (torch.randn(2, 32),))

    class Batches:
        description = "noise"

        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter([(torch.randn(8, 32),)])

    with pytest.raises(optc.OptcError, match="needs a backend to measure layers on"):
        Quant(formats="auto")(program, optc.PassContext(calibration=Batches()))


def test_a_format_that_another_layer_of_the_kind_cannot_have_is_not_worth_having() -> None:
    """Whether weights fit float16 depends on their values; layers are measured by kind."""
    seconds = {"test": {("a", "float"): 2.0, ("a", "int8"): 1.0}}
    assert worth_having({("a", "int8"): 30.0, ("a", "fp16"): 60.0}, seconds) == {("a", "int8"): 30.0}
