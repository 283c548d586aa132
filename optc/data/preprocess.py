"""From images to model inputs: resize, crop, scale to [0, 1], normalise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from optc.program import Preprocessing

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def prepare_image(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resize the shorter side and crop the centre, as torchvision's ``Resize`` and ``CenterCrop`` do on PIL images.

    Returns:
        Array of shape (channels, height, width), uint8, not normalised.

    Raises:
        ValueError: its pixels are floats or integers of 32 bits, of which nobody knows what white is; or it is so long
            and thin that resized it would be larger than Pillow opens.
    """
    channels, height, width = preprocessing.input_size
    if image.mode.startswith("I;16"):  # convert() would clip them to 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"nobody knows what white is among pixels of PIL's mode {image.mode}, of 32 bits")
    image = image.convert("L" if channels == 1 else "RGB")
    short, long = sorted(image.size)
    scaled = int(preprocessing.resize * long / short)
    if scaled * preprocessing.resize > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"{image.width}x{image.height} pixels are too long and thin to be {preprocessing.resize} wide")
    size = (preprocessing.resize, scaled) if image.width <= image.height else (scaled, preprocessing.resize)
    if size != image.size:
        image = image.resize(size, RESAMPLING[preprocessing.interpolation])
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def normalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalise float32 images in [0, 1], shape (N, C, H, W), by the model's mean and standard deviation.

    Channels beyond those stay as they are.
    """
    channels = preprocessing.input_size[0]
    more = channels - len(preprocessing.mean)  # what is no colour has statistics nobody knows
    mean = torch.tensor([*preprocessing.mean, *[0.0] * more][:channels]).view(1, -1, 1, 1)
    std = torch.tensor([*preprocessing.std, *[1.0] * more][:channels]).view(1, -1, 1, 1)
    return (images - mean) / std


def normalize_bytes(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> Tensor:
    """Float32 model inputs, shape (N, C, H, W), from uint8 pixels of that shape."""
    return normalize(torch.from_numpy(pixels).float().div_(255), preprocessing)


def upscale_grey(images: NDArray[np.float32], preprocessing: Preprocessing) -> Tensor:
    """Grey images, shape (N, h, w) in [0, 1], resized whole to the model's input size and repeated over channels."""
    channels, height, width = preprocessing.input_size
    mode = preprocessing.interpolation if preprocessing.interpolation in ("bilinear", "bicubic") else "nearest"
    smooth = mode != "nearest"
    grey = functional.interpolate(
        torch.from_numpy(images)[:, None],
        size=(height, width),
        mode=mode,
        # antialias=True makes torch use PIL's filters (bicubic a = -0.5), as the models were trained with.
        **({"align_corners": False, "antialias": True} if smooth else {}),
    )
    return normalize(grey.clamp_(0, 1).expand(-1, channels, -1, -1), preprocessing)
