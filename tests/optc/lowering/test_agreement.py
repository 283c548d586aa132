from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed

from optc import Program, capture
from optc.errors import BackendError
from optc.lowering.agreement import FLOAT_DB, QUANTIZED_DB, as_array, bound_db, check_agreement, compare_outputs
from optc.passmanager.contract import PassRecord

REFERENCE = np.array([[3.0, 4.0]], np.float32)


def test_numbers_of_a_known_difference() -> None:
    found = compare_outputs("rt", ["a"], [REFERENCE], [REFERENCE + np.float32(0.05)], 30.0)
    assert found.sqnr_db == pytest.approx(10 * math.log10(25 / (2 * 0.05**2)), abs=1e-3)
    assert found.max_abs == pytest.approx(0.05, abs=1e-6)


def test_equal_outputs_are_infinitely_close() -> None:
    assert compare_outputs("rt", ["a"], [REFERENCE], [REFERENCE], 60.0).sqnr_db == math.inf


def test_the_first_output_that_diverges_is_named_with_numbers() -> None:
    with pytest.raises(
        BackendError, match=r"output 'b'.*SQNR 27\.4 dB \(at least 60 dB expected\), largest error 0\.15"
    ):
        compare_outputs("rt", ["a", "b", "c"], [REFERENCE] * 3, [REFERENCE, REFERENCE + 0.15, -REFERENCE], 60.0)


def test_an_error_where_the_graph_gives_zeros_counts() -> None:
    with pytest.raises(BackendError, match="-inf dB"):
        compare_outputs("rt", ["a"], [np.zeros(3)], [np.full(3, 1e-3)], 60.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(BackendError, match="not finite"):
        compare_outputs("rt", ["a"], [REFERENCE], [np.array([[3.0, bad]])], 60.0)


def test_infinities_of_the_graph_itself_are_not_held_against_the_runtime() -> None:
    both = np.array([1.0, -math.inf])
    assert compare_outputs("rt", ["a"], [both], [both], 60.0).sqnr_db == math.inf


@pytest.mark.parametrize("instead", [math.inf, math.nan, -3.4e38])
def test_an_infinity_that_goes_is_refused(instead: float) -> None:
    with pytest.raises(BackendError, match="not infinite where the graph's is"):
        compare_outputs("rt", ["a"], [np.array([1.0, -math.inf])], [np.array([1.0, instead])], 60.0)


def test_complex_outputs_are_compared_in_both_parts() -> None:
    graph = np.array([[3.0 + 1.0j, 4.0 - 2.0j]], np.complex64)
    assert compare_outputs("rt", ["a"], [graph], [graph.copy()], 60.0).sqnr_db == math.inf
    found = compare_outputs("rt", ["a"], [graph], [graph + np.complex64(0.05j)], 30.0)
    assert found.sqnr_db == pytest.approx(10 * math.log10(30 / (2 * 0.05**2)), abs=1e-3)
    with pytest.raises(BackendError, match="differently"):
        compare_outputs("rt", ["a"], [graph], [graph.conj()], 60.0)
    with pytest.raises(BackendError, match="differently"):
        compare_outputs("rt", ["a"], [graph], [graph.real.copy()], 60.0)
    with pytest.raises(BackendError, match="not finite"):
        compare_outputs("rt", ["a"], [graph], [graph + np.array([[0, complex(0, math.nan)]])], 60.0)


def test_a_single_complex_number_is_compared() -> None:
    with pytest.raises(BackendError, match="differently"):
        compare_outputs("rt", ["a"], [np.complex64(1 + 1j)[...]], [np.complex64(1 - 1j)[...]], 60.0)


def test_a_conjugated_tensor_becomes_an_array() -> None:
    np.testing.assert_array_equal(as_array(torch.tensor([1 + 2j]).conj()), np.array([1 - 2j]))


def test_a_wrong_shape_is_refused() -> None:
    with pytest.raises(BackendError, match=r"shape is \(2,\), the graph's \(1, 2\)"):
        compare_outputs("rt", ["a"], [REFERENCE], [REFERENCE[0]], 60.0)


def test_the_bound_follows_the_graphs_arithmetic(cnn: Program, quantized: Callable[[Program], Program]) -> None:
    assert bound_db(cnn) == FLOAT_DB
    assert bound_db(quantized(cnn)) == QUANTIZED_DB


def test_a_program_is_compared_on_its_example_inputs_under_its_bound(cnn: Program) -> None:
    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        return [output.numpy() for output in cnn.run(*map(torch.from_numpy, arrays))]

    found = check_agreement("rt", cnn, run)
    assert found.bound_db == FLOAT_DB
    assert found.details()["sqnr_db"] == "inf"
    with pytest.raises(BackendError, match=r"rt computes output 'output' differently"):
        check_agreement("rt", cnn, lambda *arrays: [output * 1.1 for output in run(*arrays)])


def test_a_runtime_that_is_wrong_in_the_targets_batch_alone_is_refused(cnn: Program) -> None:
    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        wrong = 1.1 if len(arrays[0]) == 1 else 1.0
        return [wrong * output.numpy() for output in cnn.run(*map(torch.from_numpy, arrays))]

    assert check_agreement("rt", cnn, run).batches == (2,)
    assert check_agreement("rt", cnn, run, 5).details()["batches"] == [2, 5]
    with pytest.raises(BackendError, match=r"rt, of a batch of 1, computes output 'output' differently"):
        check_agreement("rt", cnn, run, 1)


class Ranked(torch.nn.Module):
    """What a sample gives depends on the others of its batch, and one output has no sample."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x - x.mean(0), x.sum()


def test_samples_may_depend_on_the_others_of_the_targets_batch() -> None:
    program = capture(Ranked(), (torch.randn(2, 8),))

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        return [output.numpy() for output in program.run(*map(torch.from_numpy, arrays))]

    for batch in (1, 3):
        assert check_agreement("rt", program, run, batch).sqnr_db == math.inf


class Amplifies(torch.nn.Module):
    """Quantized, and a hundred thousand times more sensitive to its input than that is large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = torch.ops.quantized_decomposed
        y = torch.sin(1.5e5 * x)
        integers = q.quantize_per_tensor(y, 1 / 127, 0, -128, 127, torch.int8)
        return q.dequantize_per_tensor(integers, 1 / 127, 0, -128, 127, torch.int8)


def test_a_graph_that_amplifies_roundings_holds_runtimes_to_its_own_steadiness() -> None:
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(1))
    program = capture(Amplifies().eval(), (x,))

    def other_rounding(*inputs: np.ndarray) -> list[np.ndarray]:
        moved = torch.from_numpy(inputs[0] * (1 + 2.0**-20 * np.random.default_rng(2).standard_normal((2, 512))))
        return [program.run(moved.float())[0].numpy()]

    found = check_agreement("rt", program, other_rounding)
    assert 10.0 <= found.bound_db < found.sqnr_db < QUANTIZED_DB
    with pytest.raises(BackendError, match="differently from the optimized graph"):
        check_agreement("rt", program, lambda *inputs: [1.6 * other_rounding(*inputs)[0]])


def test_a_runtime_may_add_half_the_noise_that_quantization_made() -> None:
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(1))
    program = capture(Rounds().eval(), (x,))
    notes = {"verify": {"from_captured": {"sqnr_db": 12.0}}}
    verified = replace(program, history=(PassRecord("quant", {}, True, (), (), notes),))

    def noisy(db: float) -> Callable[..., list[np.ndarray]]:
        graph = program.run(x)[0].numpy()
        noise = np.random.default_rng(3).standard_normal(graph.shape)
        return lambda *inputs: [graph + noise * 10 ** (-db / 20) * np.linalg.norm(graph) / np.linalg.norm(noise)]

    assert check_agreement("rt", verified, noisy(17.0)).bound_db == 15.0
    for given, db in ((verified, 14.0), (program, 17.0)):
        with pytest.raises(BackendError):
            check_agreement("rt", given, noisy(db))


class Rounds(torch.nn.Module):
    """Quantized, and steady."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = torch.ops.quantized_decomposed
        return q.dequantize_per_tensor(
            q.quantize_per_tensor(x, 0.1, 0, -128, 127, torch.int8), 0.1, 0, -128, 127, torch.int8
        )
