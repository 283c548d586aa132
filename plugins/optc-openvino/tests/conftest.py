"""Real models as optc optimizes them, lowered to OpenVINO once for all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import optc
from optc.frontend.load import load_model
from optc_openvino.runtime import ov

TARGET = optc.Target(threads=2)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Choices among kernels are remembered in the user's cache; tests have one of their own."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """Leave out of garbage collections what is there already: with all of PyTorch loaded they take long."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def shortened(name: str, model: nn.Module) -> None:
    """Leave out what a model has more of: a ViT's last eight blocks, most of AlexNet's 58 million dense weights."""
    if name.startswith("vit"):
        model.blocks = model.blocks[:4]
    else:
        torch.manual_seed(0)
        model.classifier[1], model.classifier[4] = nn.Linear(9216, 256), nn.Linear(256, 256)
        model.classifier[6] = nn.Linear(256, 1000)


def optimized(name: str, passes: str, whole: bool = False) -> optc.Optimized:
    model = load_model(name, "random")
    if not whole:
        shortened(name, model.module)
    noise = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 3, 224, 224, generator=noise) for _ in range(2)]
    return optc.optimize(
        model.module,
        model.example_inputs,
        passes,
        backend="openvino",
        calibration=batches,
        verify=False,
        measure=False,
        target=TARGET,
        info=model.info,
    )


@pytest.fixture
def sqnr_db() -> Callable[[np.ndarray, np.ndarray], float]:
    """Signal to noise of an output against the graph's, in dB."""

    def ratio(graph: np.ndarray, output: np.ndarray) -> float:
        noise = np.square(graph.astype(np.float64) - output).sum()
        return float(10 * np.log10(np.square(graph.astype(np.float64)).sum() / max(noise, 1e-30)))

    return ratio


@pytest.fixture
def rounded() -> Callable[[ov.Node, float, int], ov.Node]:
    """A value rounded to uint8 with a scale and a zero point, and scaled back, as it comes from ONNX."""

    def make(value: ov.Node, scale: float, zero_point: int) -> ov.Node:
        ops = ov.opset13
        ends = [ops.constant(np.float32(end)) for end in (-zero_point * scale, (255 - zero_point) * scale, 0, 255)]
        wide = ops.convert(ops.convert(ops.fake_quantize(value, *ends, 256), "u8"), "f32")
        shift = ops.convert(ops.constant(np.uint8(zero_point)), "f32")
        return ops.multiply(ops.subtract(wide, shift), ops.constant(np.float32(scale)))

    return make


@pytest.fixture(scope="session")
def alexnet() -> optc.Optimized:
    return optimized("alexnet", "fuse")


@pytest.fixture(scope="session")
def alexnet_int8() -> optc.Optimized:
    return optimized("alexnet", "fuse,quant")


@pytest.fixture(scope="session")
def vit() -> optc.Optimized:
    return optimized("vit_tiny_patch16_224", "fuse")


@pytest.fixture(scope="session")
def vit_int8() -> optc.Optimized:
    return optimized("vit_tiny_patch16_224", "fuse,quant")


@pytest.fixture(scope="session")
def whole_vit_int8() -> optc.Optimized:
    return optimized("vit_tiny_patch16_224", "fuse,quant", whole=True)


@pytest.fixture(scope="session")
def vit_mixed() -> optc.Optimized:
    return optimized("vit_tiny_patch16_224", "fuse,quant,bf16")


class TwoInputs(nn.Module):
    """Inputs and outputs that must not be confused."""

    def forward(self, zulu: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        return zulu - 2 * alpha, zulu + alpha


@pytest.fixture(scope="session")
def two_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from optc_openvino.backend import OpenVinoBackend

    folder = tmp_path_factory.mktemp("two-inputs")
    program = optc.capture(TwoInputs(), (torch.randn(2, 4), torch.randn(2, 4)))
    OpenVinoBackend().lower(program, TARGET, folder)
    return folder
