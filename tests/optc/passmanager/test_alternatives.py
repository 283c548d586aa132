"""Lists of passes that are all run: how they are written, what they share, what is left out and why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optc
from optc.errors import DataError, OptcError, UnknownNameError, VerificationError
from optc.passmanager.alternatives import AUTO_PASSES, MIXED, Alternatives
from optc.passmanager.contract import Change, Pass, PassResult
from optc.passmanager.instruments import Verify
from optc.rewrite import add_constant, calls, get_constant

BF16 = ("avx2", "avx512_bf16")


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, 3, 16, 16) for _ in range(4)]


@pytest.fixture(scope="module")
def captured(images: list[torch.Tensor]) -> optc.Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 14 * 14, 10))
    return optc.capture(model.eval(), (images[0],))


def context(images: list[torch.Tensor] | None, **more: Any) -> optc.PassContext:
    given = {"isa": BF16, **more}
    return optc.PassContext(optc.Target(threads=1), None if images is None else Batches(images), **given)


class Batches:
    """Calibration from a list of tensors."""

    description = "noise"

    def __init__(self, images: list[torch.Tensor]) -> None:
        self._images = images

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        yield from ((each,) for each in self._images)


def test_auto_makes_one_program_for_each_precision(captured: optc.Program, images: list[torch.Tensor]) -> None:
    made = Alternatives.of("auto").run(captured, context(images))
    assert set(made.programs) | set(made.dropped) == {each for each in AUTO_PASSES if "fp16" not in each}
    assert made.given == {"calibration": "noise", "budget": None}
    records = {text: [r.name for r in p.history if r.modified] for text, p in made.programs.items()}
    assert "quant" in records["fuse,quant"]
    assert "bf16" in records["fuse,bf16"]
    assert set(records["fuse"]) == set(records["fuse,quant"]) - {"quant"}


def test_what_lists_begin_with_runs_once(captured: optc.Program) -> None:
    runs: list[str] = []

    class Counted(optc.Instrument):
        name = "counted"

        def before_pass(self, pass_: Pass, program: optc.Program) -> None:
            runs.append(pass_.name)

    asked = Alternatives.of("fold-batch-norm | fold-batch-norm,fuse-activation")
    made = asked.run(captured, context(None, instruments=(Counted(),)))
    assert list(made.programs) == ["fold-batch-norm", "fold-batch-norm,fuse-activation"]
    assert runs == ["fold-batch-norm", "fuse-activation"]


def test_verification_compares_each_with_what_came_before_it(
    captured: optc.Program, images: list[torch.Tensor], tmp_path: Path
) -> None:
    verify = Verify(captured, [(images[0],)], tmp_path)
    asked = Alternatives.of("fold-batch-norm,quant | fold-batch-norm,fuse-activation")
    made = asked.run(captured, context(images, instruments=(verify,)))
    quantized, exact = (made.programs[text].history for text in asked.lists)
    assert quantized[-1].notes["verify"]["from_previous"]["sqnr_db"] < 80
    assert exact[-1].notes["verify"]["from_previous"]["sqnr_db"] > 100, "compared with the quantized program"


class Spoil(Pass):
    """Declares itself exact and is not."""

    name, summary = "spoil", "Halve the weights of convolutions."

    def run(self, program: optc.Program, context: optc.PassContext) -> PassResult:
        for node in calls(program, torch.ops.aten.conv2d.default):
            weight = node.args[1]
            halved = add_constant(program, node, "halved", get_constant(program.module, str(weight.target)) / 2)
            halved.meta["val"] = weight.meta["val"]
            node.update_arg(1, halved)
        return PassResult(program, True, (Change("spoil", "conv2d"),))


def test_a_list_that_fails_verification_is_left_out_with_the_reason(
    captured: optc.Program, images: list[torch.Tensor], tmp_path: Path
) -> None:
    spoiled, sound = optc.PassManager([Spoil()]), Alternatives.of("fuse").first
    watched = context(images, instruments=(Verify(captured, [(images[0],)], tmp_path),))
    made = Alternatives({"spoil": spoiled, "fuse": sound}).run(captured, watched)
    assert list(made.programs) == ["fuse"]
    assert "pass 'spoil'" in made.dropped["spoil"]
    with pytest.raises(VerificationError, match="pass 'spoil'"):
        Alternatives({"a": spoiled, "b": optc.PassManager([Spoil()])}).run(captured, watched)


def test_lists_without_quantization() -> None:
    def named(passes: str) -> dict[str, list[str]]:
        lists = Alternatives.of(passes).unquantized().lists
        return {text: [each.name for each in manager.passes] for text, manager in lists.items()}

    assert named("fuse,quant | fuse,quant<formats=auto>,bf16 | fuse") == {
        "fuse": ["fuse"],
        "fuse,bf16": ["fuse", "bf16"],
    }
    assert named("fuse,quant") == {"": ["fuse"]}
    both = {"fuse,bf16": ["fuse", "bf16"], "fuse,fp16": ["fuse", "fp16"]}
    assert named("auto") == {"fuse": ["fuse"], **both}
    assert Alternatives.of("auto").unquantized().automatic


def test_without_calibration_data_auto_leaves_int8_out(captured: optc.Program) -> None:
    made = Alternatives.of("auto").run(captured, context(None))
    assert set(made.programs) == {"fuse,bf16", "fuse"}
    assert "calibration" in made.dropped["fuse,quant"]


def test_bad_calibration_data_is_an_error_all_the_same(captured: optc.Program, images: list[torch.Tensor]) -> None:
    with pytest.raises(DataError):
        Alternatives.of("auto").run(captured, context([images[0] * float("nan")] * 4))


def test_auto_leaves_bf16_out_where_it_is_emulated(captured: optc.Program, images: list[torch.Tensor]) -> None:
    plain = context(images, isa=("avx2",))
    made = Alternatives.of("auto").run(captured, plain)
    assert made.dropped["fuse,bf16"] == "this CPU has no bfloat16 arithmetic"
    assert "fuse,bf16" in Alternatives.of("fuse,bf16 | fuse").run(captured, plain).programs, "asked for by name"


def test_a_list_that_does_what_another_does_is_left_out(captured: optc.Program) -> None:
    made = Alternatives.of("fold-batch-norm | fold-batch-norm,fold-layer-norm").run(captured, context(None))
    assert made.dropped == {"fold-batch-norm,fold-layer-norm": "does the same as fold-batch-norm here"}


def test_lists_that_differ_in_options_alone_are_both_kept(captured: optc.Program, images: list[torch.Tensor]) -> None:
    made = Alternatives.of("quant | quant<observer=percentile;percentile=90>").run(captured, context(images))
    assert made.dropped == {}
    changes = [program.history[-1].applied for program in made.programs.values()]
    assert changes[0] == changes[1], "or the test says nothing"


def test_options_go_to_every_list_that_has_the_pass() -> None:
    asked = Alternatives.of("auto", {"quant": {"observer": "mse"}})
    observers = [each.options.observer for m in asked.lists.values() for each in m.passes if each.name == "quant"]
    assert observers == ["mse"] * 4


def test_options_for_passes_that_are_made_already_are_refused() -> None:
    made = Alternatives.of("quant")
    for passes in (made, made.first):
        with pytest.raises(OptcError, match="options for 'quant' come too late"):
            Alternatives.of(passes, {"quant": {"observer": "mse"}})


def test_a_list_has_options_of_its_own_beside_those_for_all() -> None:
    asked = Alternatives.of("quant | quant<formats=int4-weights; block=32>", {"quant": {"block": 64}})
    options = [each.options for manager in asked.lists.values() for each in manager.passes]
    assert [(each.formats, each.block) for each in options] == [("int8", 64), ("int4-weights", 32)]


@pytest.mark.usefixtures("briefly")
def test_auto_looks_at_each_layer_only_where_reading_weights_takes_the_time(
    images: list[torch.Tensor], tmp_path: Path
) -> None:
    batch = images[0]
    heavy = nn.Sequential(nn.Flatten(), nn.Linear(batch[0].numel(), 512), nn.ReLU(), nn.Linear(512, 64)).eval()
    light = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
    outcomes = {}
    for model in (heavy, light):
        made = optc.optimize(
            model,
            batch[:1],
            "auto",
            backend="onnxruntime",
            calibration=images,
            measure=False,
            target=optc.Target(threads=1),
        )
        (outcomes[model],) = [each for each in made.report.backends if each.passes == MIXED]
    assert outcomes[heavy].p50_ms is not None or "does the same as" in outcomes[heavy].reason
    assert outcomes[light].p50_ms is None
    assert "weights of fewer bits save little" in outcomes[light].reason
    with pytest.raises(UnknownNameError, match="equalize"):
        Alternatives.of("auto", {"equalize": {}})


def test_stages_have_one_list() -> None:
    with pytest.raises(OptcError, match="one list"):
        Alternatives.of("fuse,partition | fuse")


def test_the_exact_passes_of_several_lists() -> None:
    assert all(each.numerics.exact for each in Alternatives.of("auto").exact().first.leaves())


@pytest.mark.parametrize(("device", "half"), [("cpu", "bf16"), ("cuda", "fp16")])
def test_auto_tries_the_half_precision_of_the_device(captured: optc.Program, device: str, half: str) -> None:
    given = optc.PassContext(target=optc.Target(device=device, threads=1), isa=("avx512_bf16",))
    made = Alternatives.of("auto").run(captured, given)
    assert {f"fuse,{half}", "fuse"} <= set(made.programs)
    other = {"bf16": "fp16", "fp16": "bf16"}[half]
    assert not any(other in each for each in made.programs)


def test_on_a_gpu_bf16_stands_in_for_fp16_that_overflows(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(1000)
    captured = optc.capture(model, (torch.randn(2, 8),))
    verify = Verify(captured, [(torch.randn(4, 8),)], tmp_path)
    given = optc.PassContext(target=optc.Target(device="cuda", threads=1), instruments=[verify], isa=None)
    made = Alternatives.of("auto").run(captured, given)
    assert "fuse,bf16" in made.programs
    assert "fuse,fp16" in made.dropped
