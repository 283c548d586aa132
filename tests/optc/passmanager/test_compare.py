"""How far two runs are apart, infinities, integers and complex values included."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import optc
from optc.passmanager.compare import compare, nan_in, rounding_sqnr_db

MASKED = torch.tensor([[1.0, -math.inf, 2.0], [3.0, 4.0, -math.inf]])


def test_infinities_that_stay_hide_no_other_difference() -> None:
    assert compare([(MASKED,)], [(MASKED.clone(),)]).sqnr_db == math.inf
    moved = compare([(MASKED,)], [(MASKED * 1.1,)])
    assert 19.9 < moved.sqnr_db < 20.1
    assert moved.finite
    assert 0.39 < moved.max_abs < 0.41
    assert abs(moved.cosine - 1.0) < 1e-6


def test_an_infinity_that_goes_is_a_difference() -> None:
    assert compare([(MASKED,)], [(MASKED.nan_to_num(neginf=-1e9),)]).sqnr_db == -math.inf
    assert compare([(MASKED,)], [(MASKED.abs(),)]).sqnr_db == -math.inf
    new = compare([(torch.ones(2, 2),)], [(torch.tensor([[1.0, math.inf], [1.0, 1.0]]),)])
    assert (new.finite, new.sqnr_db) == (False, -math.inf)


class Bytes(nn.Module):
    """Takes bytes, as cameras give them, and makes a mask of them."""

    def forward(self, x: Tensor) -> Tensor:
        mask = (x > 3).to(torch.uint8)
        return x.float() / 255 * mask


def test_bytes_are_rounding_only_where_something_was_quantized() -> None:
    program = optc.capture(Bytes(), (torch.randint(0, 255, (2, 3, 4, 4), dtype=torch.uint8),))
    assert rounding_sqnr_db(program) > 75
    linear = optc.capture(nn.Linear(8, 8), (torch.randn(2, 8),))
    calibration = [(torch.randn(8, 8),)]
    quantized = optc.optimize(
        nn.Linear(8, 8), (torch.randn(2, 8),), "quant", calibration=calibration, backend="eager", measure=False
    ).program
    assert rounding_sqnr_db(quantized) < 40 < rounding_sqnr_db(linear)


def test_complex_values_count_with_both_parts() -> None:
    wanted = torch.complex(torch.ones(2, 3), torch.ones(2, 3))
    assert compare([(wanted,)], [(wanted.clone(),)]).sqnr_db == math.inf
    assert abs(compare([(wanted,)], [(wanted.conj(),)]).sqnr_db - 10 * math.log10(2 / 4)) < 1e-9


def test_one_value_of_each_batch_is_compared_where_an_output_has_no_batch() -> None:
    wanted, got = [(torch.tensor(1.0),), (torch.tensor(2.0),)], [(torch.tensor(1.0),), (torch.tensor(2.2),)]
    found = compare(wanted, got)
    assert (found.samples, round(found.max_abs, 6)) == (2, 0.2)


def test_an_output_may_have_the_batch_in_any_dimension() -> None:
    wanted = [(torch.eye(4),), (torch.eye(3),)]
    found = compare(wanted, [(torch.eye(4),), (torch.eye(3).roll(1, 0),)])
    assert (found.samples, found.top1_agreement) == (7, 4 / 7)
    assert nan_in(wanted) == []


def test_outputs_with_nan_are_told_by_position_and_share() -> None:
    whole = torch.ones(2, 2)
    some = torch.tensor([[math.nan, 1.0], [1.0, 1.0]])
    assert nan_in([(whole, some), (whole, whole)]) == [(1, 1 / 8)]
