"""What oneDNN says it does in a call, in a process of its own: it reads what to say from the environment, once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import optc

CALLS = """
import sys
import numpy as np
import optc
runner, image = optc.load(sys.argv[1]), np.zeros((1, 64, 7, 7), np.float32)
runner(image)
print("called once", flush=True)
runner(image)
"""


def model() -> nn.Module:
    """Layers whose kernels want their weights laid out otherwise at batch 1 than for large images."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(64, 512, 1), nn.ReLU(), nn.Conv2d(512, 512, 3, padding=1), nn.ReLU(), nn.Conv2d(512, 2048, 1))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048 * 49, 16)).eval()


@pytest.fixture(scope="module", params=[pytest.param("fuse", marks=pytest.mark.slow), "fuse,quant"])
def optimized(request: pytest.FixtureRequest) -> optc.Optimized:
    images = torch.randn(8, 64, 7, 7)
    return optc.optimize(
        model(), images[:1], request.param, backend="inductor", calibration=list(images.split(1)),
        target=optc.Target(threads=1, batch=1), measure=False, verify=False,
    )  # fmt: skip


def test_weights_are_not_rearranged_at_each_call(optimized: optc.Optimized, tmp_path: Path) -> None:
    folder = optimized.save(tmp_path / "model")
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    command = [sys.executable, "-c", CALLS, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    _, _, second = done.stdout.partition("called once")
    executed = [line for line in second.splitlines() if ",exec," in line]
    assert any(",convolution," in line for line in executed)
    weights = ("512x64x1x1", "512x512x3x3", "2048x512x1x1")
    assert not [line for line in executed if ",reorder," in line and line.split(",")[-2] in weights]


def test_other_batches_compute_the_same(optimized: optc.Optimized) -> None:
    images = torch.randn(5, 64, 7, 7).numpy()
    runner = optimized.load()
    (together,) = runner(images)
    for batch in (1, 2, 5):
        np.testing.assert_allclose(runner(images[:batch])[0], together[:batch], rtol=1e-4, atol=1e-4)
    runner.close()


@pytest.mark.slow
def test_weights_in_blocks_are_said_to_be_held_as_float32() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    quantized = {"passes": "quant<formats=int8-weights>", "backend": "inductor", "measure": False}
    made = optc.optimize(dense, torch.randn(2, 128), **quantized)
    reason = "Inductor has no kernels for weights in blocks, which it holds as float32"
    assert made.details["not_int8"] == {"linear (0)": reason, "linear_1 (2)": reason}
