"""Decibels of amplitudes and of decisions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import optc
from optc.lowering.agreement import check_agreement
from optc.passmanager.compare import compare
from optc.sqnr import decides, decisions_db, sqnr_db


def test_amplitudes() -> None:
    assert sqnr_db(100.0, 1.0) == pytest.approx(20.0)
    assert sqnr_db(0.0, 0.0) == math.inf
    assert sqnr_db(0.0, 1.0) == sqnr_db(1.0, math.inf) == sqnr_db(1.0, math.nan) == -math.inf


def test_decisions_are_counted_against_those_that_are_not_the_most_frequent_one() -> None:
    classes = np.repeat(np.arange(10), 20)
    other = np.where(np.arange(200) == 7, 9, classes)
    assert decisions_db(classes, classes) == math.inf
    assert decisions_db(classes, other) == pytest.approx(20 * math.log10(180))
    assert decisions_db(classes, classes + 1) < 0
    assert decisions_db(np.zeros(100), np.arange(100) == 3) == pytest.approx(40.0)


def test_a_mask_that_loses_its_few_pixels_is_not_nearly_right() -> None:
    mask = np.arange(10_000) < 20
    assert decisions_db(mask, np.zeros_like(mask)) == 0.0


@pytest.mark.parametrize(
    ("name", "expected"), [("int64", True), ("int32", True), ("bool", True), ("uint8", False), ("int8", False),
    ("float32", False), ("bfloat16", False)],
)  # fmt: skip
def test_bytes_are_amplitudes_and_other_whole_numbers_decisions(name: str, expected: bool) -> None:
    assert decides(getattr(torch, name)) is expected
    if name != "bfloat16":
        assert decides(np.dtype(name)) is expected


class Segments(nn.Module):
    """The class of each pixel, as a network for segmentation gives it out, and whether it is one that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 200, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        classes = self.body(x).argmax(1)
        return classes, classes > 100


def test_a_class_far_away_is_as_wrong_as_the_next_one() -> None:
    classes = torch.arange(200).reshape(2, 10, 10)
    near, far = classes.clone(), classes.clone()
    near[0, 0, 1], far[0, 0, 1] = 2, 199
    for other in (near, far):
        found = compare([(classes,)], [(other,)])
        assert found.sqnr_db == pytest.approx(20 * math.log10(199))
        assert (found.cosine, found.top1_agreement) == (1.0, None)
    assert compare([(torch.tensor([1, 2, 3, 4]),)], [(torch.tensor([1, 2, 9, 4]),)]).top1_agreement == 0.75


def test_a_model_that_gives_out_classes_is_quantized_and_checked_by_how_many_differ() -> None:
    torch.manual_seed(0)
    model, images = Segments().eval(), torch.randn(2, 3, 16, 16)
    made = optc.optimize(
        model, images, "fuse,quant", calibration=[torch.randn(8, 3, 16, 16)], backend="onnxruntime", measure=False
    )
    verified = made.program.history[-1].notes["verify"]["from_captured"]
    other = torch.randn(8, 3, 16, 16)
    share = float((made.program.run(other)[0] != model(other)[0]).float().mean())
    assert 0.0 < share < 0.2  # int8 tips some decisions
    assert verified["sqnr_db"] == pytest.approx(-20 * math.log10(share), abs=12)
    runner = made.load()
    assert check_agreement("onnxruntime", made.program, runner).sqnr_db >= 20

    def shifted(*inputs: object) -> list[object]:
        return [(output + 1) % 200 for output in runner(*inputs)]

    with pytest.raises(optc.OptcError, match=r"differently from the optimized graph: SQNR -\d\.\d dB"):
        check_agreement("onnxruntime", made.program, shifted)
    runner.close()
