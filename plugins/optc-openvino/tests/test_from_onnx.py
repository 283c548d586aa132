"""What ONNX files hold that OpenVINO, NumPy and ONNX Runtime have in common only in some forms."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import optc
from optc_openvino import bfloat16
from optc_openvino.backend import OpenVinoBackend
from optc_openvino.runtime import read

TARGET = optc.Target(threads=1)


def lowered(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> optc.Runner:
    program = optc.capture(model.eval(), inputs)
    made = OpenVinoBackend().lower(program, TARGET, folder)
    return OpenVinoBackend().load(folder, made.files, TARGET)


class Masked(nn.Module):
    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x, x, attn_mask=kept[:, None, None, :])


class OneHead(nn.Module):
    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x, x, attn_mask=kept[:, None, :])


@pytest.mark.parametrize(("model", "size"), [(Masked(), (4, 6, 8)), (OneHead(), (6, 8))], ids=["heads", "one head"])
def test_a_mask_of_keys_alone_is_applied_to_each_query(model: nn.Module, size: tuple[int, ...], tmp_path: Path) -> None:
    kept = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    with closing(lowered(model, (torch.randn(2, *size), kept), tmp_path)) as runner:
        for batch in (1, 2, 5):
            x, mask = torch.randn(batch, *size), kept[1:].expand(batch, -1).contiguous()
            (output,) = runner(x.numpy(), mask.numpy())
            np.testing.assert_allclose(output, model(x, mask).numpy(), atol=1e-5)


class Halves(nn.Module):
    """An input and an output in bfloat16 beside others in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).bfloat16()

    def forward(self, image: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        found = self.conv(image)
        return found.relu(), shift + found.float().mean((2, 3))


def check_halves(runner: optc.Runner, model: Halves, sqnr_db: Callable[[np.ndarray, np.ndarray], float]) -> None:
    image, shift = torch.randn(2, 3, 8, 8).bfloat16(), torch.randn(2, 4)
    with torch.no_grad():
        wanted = model(image, shift)
    found = runner(image.float().numpy(), shift.numpy())
    assert [output.dtype for output in found] == [np.float32, np.float32]
    assert all(sqnr_db(want.float().numpy(), got) > 30 for want, got in zip(wanted, found, strict=True))


def test_a_model_in_bfloat16_takes_and_gives_float32(
    tmp_path: Path, sqnr_db: Callable[[np.ndarray, np.ndarray], float]
) -> None:
    model = Halves()
    with closing(lowered(model, (torch.randn(2, 3, 8, 8).bfloat16(), torch.randn(2, 4)), tmp_path)) as runner:
        check_halves(runner, model, sqnr_db)
    names = [port.get_any_name() for port in read(tmp_path / "model.xml").inputs]
    assert names == ["image", "shift"]


def test_its_casts_at_the_ends_are_dropped_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sqnr_db: Callable[[np.ndarray, np.ndarray], float]
) -> None:
    monkeypatch.setattr(bfloat16, "computes_bfloat16", lambda: True)
    model = Halves()
    with closing(lowered(model, (torch.randn(2, 3, 8, 8).bfloat16(), torch.randn(2, 4)), tmp_path)) as runner:
        check_halves(runner, model, sqnr_db)
    nodes = read(tmp_path / "model.xml").get_ops()
    computed = [node for node in nodes if node.get_type_name() not in ("Constant", "Convert")]
    types = {output.get_element_type().get_type_name() for node in computed for output in node.outputs()}
    assert "bf16" not in types


def test_each_type_of_operator_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    model = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    with pytest.raises(optc.BackendError) as caught:
        lowered(model, (torch.randn(2, 4, 8, 8),), tmp_path)
    message = str(caught.value)
    assert message.startswith("openvino refuses model.onnx: ")
    assert "Pad-" in message
    assert message.endswith("Unsupported padding mode: [wrap]")
    assert "\n" not in message
