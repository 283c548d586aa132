"""Bicubic resizing between integer convolutions, which ONNX Runtime runs in one layout only."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import optc
from optc import capture
from optc.lowering.onnx_export import export_onnx

IMAGES = torch.randn(8, 4, 8, 8)


class EightImages(nn.Module):
    """Fixes the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(8, 4, 8, 8)


def resized(size: tuple[int, int], mode: str = "bicubic") -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.Upsample(size=size, mode=mode), nn.Conv2d(4, 4, 1))


@pytest.mark.parametrize("size", [(5, 3), (16, 3), (16, 12)])
@pytest.mark.parametrize("dynamic", [True, False], ids=["any batch", "batch of 8"])
def test_it_runs_between_integer_convolutions(size: tuple[int, int], dynamic: bool) -> None:
    model = resized(size) if dynamic else nn.Sequential(EightImages(), *resized(size))
    made = optc.optimize(model, IMAGES, "fuse,quant", backend="onnxruntime", calibration=[IMAGES], measure=False)
    assert made.program.dynamic_batch == dynamic
    with closing(made.load()) as runner:
        assert runner.precision == "int8 (2 of 2 layers)"
        for batch in (1, 3, 8) if dynamic else (8,):
            (output,) = made.program.run(IMAGES[:batch])
            torch.testing.assert_close(torch.from_numpy(runner(IMAGES[:batch].numpy())[0]), output, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("size", "mode", "added"), [((5, 8), "bicubic", 1), ((9, 8), "bicubic", 0), ((5, 3), "bilinear", 0)]
)
def test_nothing_is_added_where_onnxruntime_has_both_layouts(
    size: tuple[int, int], mode: str, added: int, tmp_path: Path
) -> None:
    export_onnx(capture(resized(size, mode), (IMAGES,)), tmp_path / "m.onnx")
    nodes = onnx.load(tmp_path / "m.onnx").graph.node
    assert sum(node.op_type == "Flatten" for node in nodes) == added
