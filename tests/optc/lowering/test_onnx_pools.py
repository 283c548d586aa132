"""Average pools that divide by a number of their own: ONNX has none, so they become other pools, or are refused."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from optc import Target, capture
from optc.errors import BackendError
from optc.lowering.onnx_export import export_onnx
from optc.lowering.onnxruntime import OnnxRuntimeBackend

TARGET = Target(threads=1)
IMAGES = torch.randn(2, 4, 9, 8)
POOLS = {
    "plain": (nn.AvgPool2d(3, 2, divisor_override=2), IMAGES),
    "padded, which does not count": (nn.AvgPool2d((3, 2), 2, 1, count_include_pad=False, divisor_override=5), IMAGES),
    "in three dimensions": (nn.AvgPool3d(2, divisor_override=3), torch.randn(2, 4, 4, 4, 4)),
}


@pytest.mark.parametrize("name", POOLS)
def test_a_divisor_is_kept(name: str, tmp_path: Path) -> None:
    pool, x = POOLS[name]
    program = capture(nn.Sequential(pool, nn.ReLU()).eval(), (x,))
    fingerprint = program.fingerprint()
    lowered = OnnxRuntimeBackend().lower(program, TARGET, tmp_path)
    assert program.fingerprint() == fingerprint
    assert lowered.details["operators"]["AveragePool"] == 1
    assert set(lowered.details["origins"].values()) == {node.name for node in program.graph.nodes if node.args} - {
        "output"
    }
    with closing(OnnxRuntimeBackend().load(tmp_path, lowered.files, TARGET)) as runner:
        for batch in (1, 2, 5):
            images = torch.randn(batch, *x.shape[1:])
            torch.testing.assert_close(torch.from_numpy(runner(images.numpy())[0]), pool(images).relu())


def test_without_a_divisor_nothing_is_added(tmp_path: Path) -> None:
    _, details = export_onnx(capture(nn.AvgPool2d(3, 2, ceil_mode=True), (IMAGES,)), tmp_path / "m.onnx")
    assert set(details["operators"]) == {"AveragePool"}


def test_one_whose_windows_may_be_cut_off_is_refused_by_name(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.AvgPool2d(3, 2, ceil_mode=True, divisor_override=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(x)

    with pytest.raises(BackendError, match=r"'avg_pool2d' in module 'pool'\) has no ONNX form: divisor_override"):
        export_onnx(capture(Net(), (IMAGES,)), tmp_path / "m.onnx")
