"""Preprocessing against torchvision's and timm's own transforms."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from optc.data.preprocess import normalize_bytes, prepare_image, upscale_grey
from optc.frontend.source import BuiltModel, ModelSource
from optc.frontend.timm_source import TimmSource
from optc.frontend.torchvision_source import TorchvisionSource
from optc.program import Preprocessing


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth random blobs with some fine grain, at any size."""
    generator = np.random.default_rng(3)
    coarse = Image.fromarray(generator.integers(0, 256, (9, 12, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    grain = generator.integers(-20, 20, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse, np.int64) + grain, 0, 255).astype(np.uint8)).convert(mode)


@cache
def built(source: type[ModelSource], name: str) -> BuiltModel:
    return source().build(name, pretrained=False, num_classes=None, seed=0)


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (256, 256), (120, 90), (301, 257)])
@pytest.mark.parametrize("name", ["alexnet", "swin_v2_t"])
def test_equals_torchvisions_transforms(name: str, size: tuple[int, int]) -> None:
    preprocessing = built(TorchvisionSource, name).preprocessing
    from torchvision.models import get_model_weights

    image = photograph(*size)
    expected = get_model_weights(name).DEFAULT.transforms()(image)
    ours = normalize_bytes(prepare_image(image, preprocessing)[None], preprocessing)[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(400, 300), (200, 333)])
def test_equals_timms_transforms(size: tuple[int, int]) -> None:
    model = built(TimmSource, "test_resnet")
    from timm.data import create_transform, resolve_model_data_config

    image = photograph(*size)
    expected = create_transform(**resolve_model_data_config(model.module))(image)
    ours = normalize_bytes(prepare_image(image, model.preprocessing)[None], model.preprocessing)[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    pixels = prepare_image(photograph(50, 40, mode), Preprocessing(input_size=(3, 32, 32), resize=36))
    assert (pixels.shape, pixels.dtype) == ((3, 32, 32), np.uint8)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_grey_of_16_bits_is_scaled_and_not_clipped(dtype: str, tmp_path: Path) -> None:
    grey = np.linspace(0, 255, 256, dtype=np.uint8).reshape(16, 16)
    plain = Preprocessing(input_size=(3, 16, 16), resize=16)
    Image.fromarray((grey.astype(np.uint16) * 257).astype(dtype)).save(tmp_path / "deep.tif")
    with Image.open(tmp_path / "deep.tif") as image:
        assert image.mode.startswith("I;16")
        np.testing.assert_array_equal(prepare_image(image, plain), np.stack([grey] * 3))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_white_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"mode {mode}"):
        prepare_image(photograph(50, 40, "L").convert(mode), Preprocessing())


def test_grey_models_get_one_channel() -> None:
    preprocessing = Preprocessing(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,), resize=32)
    assert prepare_image(photograph(50, 40), preprocessing).shape == (1, 32, 32)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_grey_upscaling_uses_pils_filters(interpolation: str) -> None:
    values = np.random.default_rng(0).random((8, 8)).astype(np.float32)
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    expected = np.asarray(Image.fromarray(values).resize((28, 28), filters[interpolation])).clip(0, 1)
    plain = Preprocessing(input_size=(1, 28, 28), mean=(0.0,), std=(1.0,), interpolation=interpolation)
    np.testing.assert_allclose(upscale_grey(values[None], plain)[0, 0].numpy(), expected, atol=2e-5)
