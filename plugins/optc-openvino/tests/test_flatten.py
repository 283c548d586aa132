from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import optc
from optc_openvino.flatten import flatten_layers
from optc_openvino.graph import drop_zero_points
from optc_openvino.runner import OpenVinoRunner
from optc_openvino.runtime import ov, read

TARGET = optc.Target(threads=2)


class Block(nn.Module):
    """ConvNeXt's: a depthwise convolution, then a perceptron over the channels."""

    def __init__(self, channels_last: bool = True) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.perceptron = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        y = self.spatial(x).permute(0, 2, 3, 1)
        if not self.channels_last:
            y = y.flatten(1, 2)
        y = self.perceptron(y)
        return y.permute(0, 3, 1, 2) + x if self.channels_last else y


@pytest.mark.parametrize("passes", ["fuse", "fuse,quant"])
def test_layers_over_feature_maps_are_flattened(passes: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Block().eval(), torch.randn(2, 8, 6, 5)
    made = optc.optimize(module, x, passes, backend="openvino", calibration=[x] * 4, measure=False, target=TARGET)
    optc.export_onnx(made.program, tmp_path / "model.onnx")
    model = read(tmp_path / "model.onnx")
    drop_zero_points(model)
    plain = OpenVinoRunner(model.clone(), TARGET)
    assert flatten_layers(model) == 2
    assert flatten_layers(model) == 0
    flat = OpenVinoRunner(model, TARGET)
    if passes == "fuse,quant":
        assert len(flat.kernels) <= len(plain.kernels) - 2
    assert [kernel.kind for kernel in flat.kernels if kernel.is_layer] == [
        kernel.kind for kernel in plain.kernels if kernel.is_layer
    ]
    for batch in (1, 3):
        images = np.random.default_rng(0).standard_normal((batch, 8, 6, 5)).astype(np.float32)
        (expected,), (got,) = plain(images), flat(images)
        assert got.shape == expected.shape
        noise = np.square(got - expected).sum()
        assert noise <= np.square(expected).sum() * (1e-10 if passes == "fuse" else 1e-3)


def test_layers_over_sequences_stay(tmp_path: Path) -> None:
    optc.export_onnx(optc.capture(Block(channels_last=False), (torch.randn(2, 8, 6, 5),)), tmp_path / "model.onnx")
    assert flatten_layers(read(tmp_path / "model.onnx")) == 0


@pytest.mark.parametrize("shape", [(4, 5, 3), (1, 4, 5, 3), (5,)])
def test_products_with_other_than_matrices_stay(shape: tuple[int, ...]) -> None:
    ops = ov.opset13
    x = ops.parameter([2, 4, 6, 5], np.float32)
    weights = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    model = ov.Model([ops.matmul(x, ops.constant(weights), False, False)], [x])
    values = np.random.default_rng(1).standard_normal((2, 4, 6, 5)).astype(np.float32)
    assert flatten_layers(model) == 0
    np.testing.assert_allclose(OpenVinoRunner(model, TARGET)(values)[0], values @ weights, rtol=1e-4, atol=1e-5)
