"""Inputs that a model does not take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import optc
from optc.errors import BackendError
from optc.lowering.eager import EagerBackend
from optc.lowering.inputs import check_inputs, described


class Two(nn.Module):
    def forward(self, image: Tensor, scale: Tensor) -> Tensor:
        return image.sum((1, 2, 3)) * scale[:, 0]


@pytest.fixture(scope="module")
def program() -> optc.Program:
    return optc.capture(Two(), (torch.randn(2, 3, 8, 8), torch.randn(2, 1, dtype=torch.float64)))


def test_a_program_says_what_it_takes(program: optc.Program) -> None:
    assert described(program) == [
        {"name": "image", "shape": [None, 3, 8, 8], "dtype": "float32"},
        {"name": "scale", "shape": [None, 1], "dtype": "float64"},
    ]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(4, 3, 8, 8)], "the model takes 2 inputs, not 1"),
        ([(4, 3, 8), (4, 1)], r"input 'image' has the shape \(4, 3, 8\), the model takes \(batch, 3, 8, 8\)"),
        ([(4, 3, 8, 8), (3, 1)], r"input 'scale' has the shape \(3, 1\), the model takes \(batch, 1\)"),
        ([(), (1, 1)], r"input 'image' has the shape \(\), the model takes \(batch, 3, 8, 8\)"),
    ],
)
def test_what_the_model_does_not_take_is_one_line(
    program: optc.Program, shapes: list[tuple[int, ...]], message: str
) -> None:
    check_inputs([torch.zeros(4, 3, 8, 8), np.zeros((4, 1))], described(program))
    with pytest.raises(BackendError, match=message):
        check_inputs([np.zeros(shape) for shape in shapes], described(program))


def test_eager_refuses_it_too(program: optc.Program, tmp_path: Path) -> None:
    backend = EagerBackend()
    lowered = backend.lower(program, optc.Target(threads=1), tmp_path)
    runner = backend.load(tmp_path, lowered.files, optc.Target(threads=1))
    assert runner(np.ones((5, 3, 8, 8), np.float32), np.ones((5, 1)))[0].shape == (5,)
    with pytest.raises(BackendError, match=r"has the shape \(5, 3, 8, 9\), the model takes \(batch, 3, 8, 8\)"):
        runner(np.ones((5, 3, 8, 9), np.float32), np.ones((5, 1)))
