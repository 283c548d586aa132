"""Models in bfloat16 throughout, which OpenVINO computes in its own inference precision."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import optc
from optc_openvino.backend import OpenVinoBackend
from optc_openvino.bfloat16 import use_inference_precision
from optc_openvino.runtime import computes_bfloat16, inference_precision, read

TARGET = optc.Target(threads=2)
pytestmark = pytest.mark.skipif(not computes_bfloat16(), reason="this CPU has no bfloat16 arithmetic")


def test_casts_are_dropped_for_the_inference_precision(vit_mixed: optc.Optimized) -> None:
    model = read(vit_mixed.files[0])
    assert inference_precision(model) == "bf16"
    assert vit_mixed.details["inference_precision"] == "bfloat16"
    types = {output.get_element_type().get_type_name() for node in model.get_ops() for output in node.outputs()
             if node.get_type_name() != "Constant"}  # fmt: skip
    assert "bf16" not in types
    runner = vit_mixed.load()
    assert runner.precision == "int8 (18 of 18 layers)"
    kinds = [kernel.kind for kernel in runner.kernels]  # type: ignore[attr-defined]
    runner.close()
    assert kinds.count("bfloat16") > 6


@pytest.mark.parametrize("batch", [1, 4])
def test_it_computes_what_the_graph_does(
    vit_mixed: optc.Optimized, batch: int, sqnr_db: Callable[[np.ndarray, np.ndarray], float]
) -> None:
    images = torch.randn(batch, 3, 224, 224)
    runner = vit_mixed.load()
    (output,) = runner(images.numpy())
    runner.close()
    assert sqnr_db(vit_mixed.program.run(images)[0].numpy(), output) > 22


def test_the_artifact_runs_without_optc_as_it_does_with(vit_mixed: optc.Optimized, tmp_path: Path) -> None:
    artifact = vit_mixed.save(tmp_path / "artifact")
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)
    np.save(tmp_path / "image.npy", image)
    runner = vit_mixed.load()
    top = np.argsort(runner(image)[0][0])[::-1][:5]
    runner.close()
    command = [sys.executable, "-I", str(artifact / "run.py"), str(tmp_path / "image.npy")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"top 5: {top[0]}:" in printed


class Pair(nn.Module):
    """Two convolutions, each in its own type, with something between them."""

    def __init__(self, first: torch.dtype, second: torch.dtype, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3).to(first), nn.Conv2d(32, 32, 3).to(second)
        self.types, self.between = (first, second), between

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.first(x.to(self.types[0])).float())
        return self.second(x.to(self.types[1])).float()


HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("model", "changed"),
    [
        (Pair(HALF, HALF, torch.relu), True),
        (Pair(HALF, FULL, torch.relu), False),
        (Pair(HALF, HALF, lambda x: torch.exp(-x.abs())), False),
        (Pair(FULL, FULL, torch.relu), False),
    ],
    ids=["all half", "a layer in float32", "exp in float32", "no half"],
)
def test_a_model_with_something_delicate_in_float32_keeps_its_casts(
    model: nn.Module, changed: bool, tmp_path: Path
) -> None:
    program = optc.capture(model, (torch.randn(1, 3, 32, 32),))
    lowered = OpenVinoBackend().lower(program, TARGET, tmp_path)
    assert (lowered.details["inference_precision"] == "bfloat16") == changed
    model = read(tmp_path / lowered.files[0])
    assert (inference_precision(model) == "bf16") == changed
    assert not use_inference_precision(model), "there is nothing left to drop"
