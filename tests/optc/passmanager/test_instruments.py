"""Instruments see every leaf pass: verification stops a wrong one, bisection finds it, the rest record and print."""

from __future__ import annotations

import dataclasses
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import optc
from optc.batches import as_calibration
from optc.errors import PluginError, VerificationError
from optc.passmanager.compare import compare
from optc.passmanager.instruments import Bisect, PrintAfter, Statistics, Timing, Verify
from optc.passmanager.manager import PassManager
from optc.plugins.registry import registry
from optc.program import Program
from optc.rewrite import add_constant, calls, constant_of, replace

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


class Rescale(optc.Pass):
    """Multiplies the second convolution's weight: exact for a factor of 1, wrong for others."""

    name = "rescale"
    summary = "Multiply a weight."

    class Options(optc.PassOptions):
        factor: float = 1.0

    def run(self, program: Program, context: optc.PassContext) -> optc.PassResult:
        node = list(calls(program, aten.conv2d.default))[1]
        weight = constant_of(program, node.args[1])
        assert weight is not None
        new_weight = add_constant(program, node, "scaled", weight * self.options.factor)  # type: ignore[attr-defined]
        with program.graph.inserting_before(node):
            new = program.graph.call_function(node.target, (node.args[0], new_weight, *node.args[2:]))
        replace(node, new)
        return optc.PassResult(program, True, (optc.Change("rescale", node.name),))


class Approximate(Rescale):
    name = "approximate"
    numerics = optc.Numerics(exact=False, min_sqnr_db=20.0, min_top1_agreement=0.5)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return optc.capture(Net(), (torch.randn(1, 3, 8, 8),))


@pytest.fixture(scope="module")
def inputs() -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 8, 8, generator=generator),) for _ in range(2)]


def verified(program: Program, inputs: list[tuple[torch.Tensor, ...]], folder: Path) -> optc.PassContext:
    return optc.PassContext(instruments=(Timing(), Statistics(), Verify(program, inputs, folder)))


def test_a_correct_pass_is_recorded_with_its_distance(program: Program, inputs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    result = Rescale(factor=1.0)(program, verified(program, inputs, tmp_path))
    (record,) = result.program.history
    assert record.notes["verify"]["from_captured"]["max_abs"] == 0.0
    assert record.notes["verify"]["from_captured"]["samples"] == 8
    assert record.notes["timing"]["seconds"] > 0
    assert record.notes["statistics"]["applied"] == {"rescale": 1}
    assert list(tmp_path.iterdir()) == []


def test_a_second_pipeline_on_the_captured_program_is_compared_with_that(
    program: Program, inputs, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    context = verified(program, inputs, tmp_path)
    Approximate(factor=1.05)(program, context)
    (record,) = Rescale(factor=1.0)(program, context).program.history
    assert record.notes["verify"]["from_previous"]["max_abs"] == 0.0
    with pytest.raises(VerificationError):
        Rescale(factor=1.05)(program, context)


def test_a_wrong_exact_pass_stops_the_run_and_names_everything(program: Program, inputs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    passes = PassManager([Rescale(factor=1.0), Rescale(factor=1.01)])
    with pytest.raises(VerificationError) as caught:
        passes(program, verified(program, inputs, tmp_path))
    message = str(caught.value)
    assert "pass 'rescale'" in message
    assert "passes before it: rescale" in message
    assert "first node that diverges: conv2d_" in message
    assert "aten.conv2d.default" in message
    assert "\n" not in message
    assert (tmp_path / "optc-reproducer-rescale" / "reproduce.py").exists()


def test_the_reproducer_runs_on_its_own(program: Program, inputs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The reproducer finds its pass by name, so a registered one is made to fail: verified against another model."""
    with_dead_code = program.fork()
    first = next(calls(with_dead_code, aten.conv2d.default))
    with with_dead_code.graph.inserting_after(first):
        with_dead_code.graph.call_function(aten.sin.default, (first,)).meta = dict(first.meta)
    other = Rescale(factor=2.0)(program).program
    pass_ = registry().load("pass", "remove-dead-code")()
    with pytest.raises(VerificationError):
        pass_(with_dead_code, optc.PassContext(instruments=(Verify(other, inputs, tmp_path),)))
    script = tmp_path / "optc-reproducer-remove-dead-code" / "reproduce.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Comparison(max_abs=0.0")


def test_the_reproducer_of_a_calibrated_pass_does_what_it_did(
    inputs: list[tuple[torch.Tensor, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``quant`` is made to fail by comparing it with another model."""
    program = optc.capture(Net(), inputs[0], dynamic_batch=False)
    calibration = as_calibration([batch for (batch,) in inputs], program)
    given = optc.PassContext(optc.Target(threads=2), calibration, isa=("avx2", "avx512_vnni"))
    quant = registry().load("pass", "quant")(observer="mse")
    result = quant(program, given).program
    verify = Verify(Rescale(factor=-2.0)(program).program, inputs, tmp_path, given)
    with pytest.raises(VerificationError, match="a reproducer is in"):
        quant(program, dataclasses.replace(given, instruments=(verify,)))
    runpy.run_path(str(tmp_path / "optc-reproducer-quant" / "reproduce.py"))
    assert capsys.readouterr().out.strip() == str(compare([program.run(*inputs[0])], [result.run(*inputs[0])]))


class TakesTheBatchForGranted(optc.Pass):
    """Right for the number of samples that it sees."""

    name = "takes-the-batch-for-granted"
    summary = "Views with the number of samples it sees."

    def run(self, program: optc.Program, context: optc.PassContext) -> optc.PassResult:
        output: torch.fx.Node = program.graph.output_node().all_input_nodes[0]
        size = list(output.meta["val"].shape)
        with program.graph.inserting_after(output):
            flat = program.graph.call_function(torch.ops.aten.reshape.default, (output, [size[0], -1]))
        output.replace_all_uses_with(flat, delete_user_cb=lambda user: user is not flat)
        return optc.PassResult(program, modified=True)


def test_a_pass_that_is_right_for_one_number_of_samples_alone_is_caught(tmp_path: Path) -> None:
    captured = optc.capture(nn.Linear(4, 6), (torch.randn(1, 4),))
    batches = [(torch.randn(2, 4),)]
    context = optc.PassContext(instruments=[Verify(captured, batches, tmp_path)])
    with pytest.raises(PluginError, match=r"takes-the-batch-for-granted.*output 0 has shape \(2, 3\)"):
        TakesTheBatchForGranted()(captured, context)


def test_a_model_that_draws_random_numbers_is_refused(tmp_path: Path) -> None:
    class Drops(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(x, 0.5, training=True)

    captured = optc.capture(Drops(), (torch.randn(1, 4),))
    with pytest.raises(VerificationError, match=r"draws random numbers \(native_dropout.*\), so that no two runs"):
        Verify(captured, [(torch.randn(2, 4),)], tmp_path)


def test_an_approximate_pass_is_held_to_its_budget(program: Program, inputs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    result = Approximate(factor=1.02)(program, verified(program, inputs, tmp_path))
    assert 20.0 < result.program.history[0].notes["verify"]["from_captured"]["sqnr_db"] < 60.0
    with pytest.raises(VerificationError, match=r"below its budget of 20 dB"):
        Approximate(factor=2.0)(program, verified(program, inputs, tmp_path))


def test_noise_of_an_earlier_pass_is_not_blamed_on_a_later_one(program: Program, inputs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    noisy, quiet, wrong = (Approximate(factor=factor) for factor in (1.13, 1.02, 2.0))
    result = PassManager([noisy, quiet])(program, verified(program, inputs, tmp_path))
    first, second = (record.notes["verify"]["from_captured"]["sqnr_db"] for record in result.program.history)
    assert first > 20.0 > second, "or the test says nothing"
    with pytest.raises(VerificationError, match=rf"its budget of 20 dB, and passes before it left {first:.1f} dB"):
        PassManager([noisy, wrong])(program, verified(program, inputs, tmp_path))


def test_an_exact_pass_after_an_approximate_one_is_judged_by_its_own_step(
    program: Program, inputs, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    result = PassManager([Approximate(factor=1.02), Rescale(factor=1.0)])(program, verified(program, inputs, tmp_path))
    notes = result.program.history[1].notes["verify"]
    assert notes["from_previous"]["max_abs"] == 0.0
    assert notes["from_captured"]["max_abs"] > 0.0


def test_outputs_that_are_not_finite_stop_the_run(program: Program, inputs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(VerificationError, match="no longer finite"):
        Approximate(factor=float("inf"))(program, verified(program, inputs, tmp_path))


def test_bisection_finds_the_pass_that_broke_the_model(program: Program, inputs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    passes = PassManager([Rescale(), Rescale(), Rescale(factor=3.0), Rescale()])
    lines: list[str] = []

    def works(limit: int) -> bool:
        context = optc.PassContext(instruments=(Bisect(limit, lines.append), Verify(program, inputs, tmp_path)))
        try:
            passes(program, context)
        except VerificationError:
            return False
        return True

    assert [works(limit) for limit in (0, 1, 2, 3, 4)] == [True, True, True, False, False]
    assert lines[0] == "BISECT: NOT running pass (1) rescale"


def test_print_after_prints_the_named_passes_only(program: Program) -> None:
    written: list[str] = []
    context = optc.PassContext(instruments=(PrintAfter({"approximate"}, written.append),))
    PassManager([Rescale(), Approximate()])(program, context)
    (text,) = written
    assert text.startswith("# graph after approximate (6 operators)")
    assert "aten.conv2d.default" in text


def test_where_no_reproducer_can_be_written_the_verdict_stays(program: Program, inputs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").write_text("")
    context = verified(program, inputs, tmp_path / "file")
    with pytest.raises(VerificationError, match="a reproducer could not be written: NotADirectoryError"):
        Rescale(factor=1.01)(program, context)
