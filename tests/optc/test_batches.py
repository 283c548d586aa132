"""Samples of a caller's batches that take the place of example inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import optc
from optc.batches import Batches, at_batch, first_samples
from optc.errors import DataError

EXAMPLE = torch.zeros(2, 3)
PROGRAM = optc.capture(nn.Linear(3, 4), (EXAMPLE,))


def test_as_many_samples_as_the_example_has_are_taken_over_batches_and_no_more() -> None:
    ones, twos, never = (torch.full((1, 3), value) for value in (1.0, 2.0, 3.0))
    (samples,) = first_samples([(ones,), (twos,), (never,)], PROGRAM)
    torch.testing.assert_close(samples, torch.cat([ones, twos]))
    (samples,) = first_samples([(torch.arange(15.0).reshape(5, 3),)], PROGRAM)
    torch.testing.assert_close(samples, torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    "batches",
    [
        [],
        [(torch.ones(1, 3),)],
    ],
    ids=["none", "too few"],
)
def test_without_such_samples_the_example_stays(batches: list[tuple[torch.Tensor, ...]]) -> None:
    assert first_samples(batches, PROGRAM) is PROGRAM.example_inputs


@pytest.mark.parametrize(
    ("batches", "wrong"),
    [
        (
            [torch.ones(8, 3), torch.ones(8, 4)],
            "batch 2 of .* is float32 (batch, 4), the model takes float32 (batch, 3)",
        ),
        ([torch.ones(8, 3).half()], "batch 1 of .* is float16 (batch, 3), the model takes float32 (batch, 3)"),
        ([(torch.ones(8, 3), torch.ones(8, 3))], "batch 1 of .* has 2 tensors, the model takes 1"),
    ],
    ids=["another size", "another type", "too many inputs"],
)
@pytest.mark.parametrize("what", ["calibration", "verification"])
def test_data_that_does_not_fit_is_one_line(batches: list[torch.Tensor], wrong: str, what: str) -> None:
    pattern = wrong.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(DataError, match=f"^{what} {pattern}"):
        optc.optimize(nn.Linear(3, 4), EXAMPLE, "fuse,quant", **{what: batches})


def test_fewer_than_eight_samples_to_calibrate_on_are_one_line() -> None:
    with pytest.raises(DataError, match="holds 6 samples, fewer than 8 — give more"):
        optc.optimize(nn.Linear(3, 4), EXAMPLE, "quant", calibration=[torch.ones(3, 3)] * 2, measure=False)


def test_backends_are_compared_with_the_graph_on_data() -> None:
    """A model that is NaN on its example input and right on data: a runtime can be checked on the latter alone."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.sqrt())

    data = torch.rand(8, 3)
    made = optc.optimize(Root(), -torch.ones(2, 3), "fuse", backend="onnxruntime", verification=[data], measure=False)
    torch.testing.assert_close(made.program.example_inputs[0], data[:2])
    assert float(made.details["check"]["sqnr_db"]) > 60


def test_a_query_has_the_samples_asked_for_or_those_that_the_program_takes() -> None:
    x, y = torch.arange(6.0).reshape(3, 2), torch.arange(3)
    free = optc.capture(nn.Linear(2, 2), (x,))
    for batch, rows in ((1, [0]), (3, [0, 1, 2]), (7, [0, 1, 2, 0, 1, 2, 0])):
        cut, indices = at_batch((x, y), free, batch)
        assert indices.tolist() == rows
        assert torch.equal(cut, x[rows])
    fixed = optc.capture(nn.Linear(2, 2), (x,), dynamic_batch=False)
    assert at_batch((x,), fixed, 7)[0] is x


class OfThree(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(3, 2) @ x.reshape(2, 3)


@pytest.mark.usefixtures("uncompiled", "briefly")
def test_a_model_of_one_batch_size_is_measured_with_that() -> None:
    model = OfThree()
    made = optc.optimize(model, torch.randn(3, 2), "fuse", backend="onnxruntime", target=optc.Target(threads=1))
    assert not made.program.dynamic_batch
    assert made.report.measurement is not None
    assert made.report.measurement.batch == 3, "that is what was measured, asked for or not"
    errors = [each.error for each in made.report.measurement.results if each.error]
    assert [error for error in errors if "emulates bfloat16" not in error] == []
    assert len(made.report.measurement.results) - len(errors) >= 3


def test_batches_are_put_together_for_a_larger_fixed_one() -> None:
    program = optc.capture(nn.Linear(2, 2), (torch.randn(6, 2),), dynamic_batch=False)
    rows = torch.arange(32.0).reshape(16, 2)
    found = list(Batches(rows.split(4), program))
    assert [len(batch[0]) for batch in found] == [6, 6]
    assert torch.equal(torch.cat([batch[0] for batch in found]), rows[:12])


def test_without_a_batch_to_verify_with_the_example_inputs_serve() -> None:
    model = OfThree()
    few = [torch.randn(2, 2)]
    made = optc.optimize(model, torch.randn(3, 2), "fuse", backend="eager", verification=few, measure=False)
    assert "there is no batch of 3 to verify with: outputs are compared on the example inputs" in made.report.notes


class Mixes(nn.Module):
    """Its second input is no batch, so that the first cannot vary either."""

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return x @ table


def test_an_input_that_is_no_batch_is_neither_cut_nor_put_together() -> None:
    example = (torch.randn(2, 3), torch.randn(3, 3))
    program = optc.capture(Mixes(), example)
    assert not program.dynamic_batch
    (batch,) = Batches([example], program)
    assert [tuple(tensor.shape) for tensor in batch] == [(2, 3), (3, 3)]
    with pytest.raises(DataError, match=r"has a tensor of \(4, 3\) — the model takes \(2, 3\) only"):
        list(Batches([(torch.randn(4, 3), example[1])], program))
    optimized = optc.optimize(Mixes(), example, "fuse", backend="onnxruntime", calibration=[example], measure=False)
    torch.testing.assert_close(optimized(*example), example[0] @ example[1])
