"""Synthetic images with the statistics of natural ones, for models that come without data.

The amplitude spectrum of natural images falls as 1/f (D. J. Field, "Relations between the statistics of natural images
and the response properties of cortical cells", JOSA A 4(12), 1987), and their colour channels are strongly correlated.
Such noise exercises a network's value ranges far better than white noise, but it is no image: accuracy on it means
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from optc.data.dataset import Dataset, Split, SplitName, check_split_name

if TYPE_CHECKING:
    from torch import Tensor

    from optc.program import Preprocessing

COUNT = 256
_SEEDS: dict[SplitName, int] = {"train": 1, "validation": 2, "test": 3}
_SHARED = 0.9  # share of a channel's amplitude that all channels have in common


class SyntheticDataset(Dataset):
    """Seeded 1/f noise at the model's input size; unlabeled, each split from a seed of its own."""

    name = "synthetic"
    summary = "seeded noise with the spectrum of natural images, unlabeled: stands in where there is no data"
    num_classes = None
    class_names = ()

    def split(self, name: SplitName, preprocessing: Preprocessing) -> Split:
        check_split_name(name)
        return _SyntheticSplit(name, preprocessing)


class _SyntheticSplit(Split):
    labels = None

    def __init__(self, name: SplitName, preprocessing: Preprocessing) -> None:
        super().__init__(SyntheticDataset.name, name)
        self._preprocessing = preprocessing

    def __len__(self) -> int:
        return COUNT

    @property
    def content_hash(self) -> str:
        return f"1/f noise, seed {_SEEDS[self.name]}"

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        import torch

        from optc.data.preprocess import normalize

        for span in self.spans(batch_size, limit):
            images = [
                _noise(self._preprocessing.input_size, _SEEDS[self.name] * COUNT + index)
                for index in range(span.start, span.stop)
            ]
            yield normalize(torch.stack(images), self._preprocessing), None


def _noise(size: tuple[int, int, int], seed: int) -> Tensor:
    """One image of shape (C, H, W) in [0, 1]: mean and contrast random, spectrum 1/f, channels correlated."""
    import torch

    channels, height, width = size
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    frequency[0, 0] = float("inf")
    white = torch.randn(1 + channels, height, width, generator=generator)
    layers = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(height, width))
    layers = layers / layers.std(dim=(1, 2), keepdim=True).clamp_min(1e-6)
    image = _SHARED * layers[:1] + (1 - _SHARED**2) ** 0.5 * layers[1:]
    brightness = 0.45 + 0.1 * torch.randn(1, generator=generator)
    contrast = 0.22 + 0.05 * torch.randn(1, generator=generator)
    noise: Tensor = (brightness + contrast * image).clamp(0, 1)
    return noise
