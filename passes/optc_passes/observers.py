"""Observers: what calibration remembers of a tensor, and the 8-bit range chosen from it.

They extend torchao's PT2E observers, whose default ``eps`` of 1.2e-7 is a floor under the scale: a network with
activations of 1e-6 would lose all of them. Here a scale is as small as the data needs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optc_passes.torchao_pt2e import MinMaxObserver, PerChannelMinMaxObserver

_TINY = torch.finfo(torch.float32).tiny
_LEAST_SHARE = 1e-12
"""Stands for the share of values in a bin that quantization leaves empty, where the divergence would be infinite."""
_NEARLY = 0.75
"""From here on the shorter side of a range is nearly as long as the other: making them equal costs 1.2 dB at most."""
_EXACT_COUNT = 2**24
"""``torch.histc`` counts in float32, which counts no further."""
_BIAS_LIMIT = 2.0**30
"""Largest |bias / scale|: leaves half of int32 to the products it is added to."""


class ActivationObserver(MinMaxObserver):
    """Per-tensor range from the smallest and largest value seen.

    The range always holds 0, so that padding and ReLU are exact.

    Args:
        centre: make the range of an affine type symmetric where it nearly is: the zero point is then in the middle.
    """

    def __init__(self, centre: bool = False, **kwargs: Any) -> None:
        super().__init__(eps=_TINY, **kwargs)
        self.centre = centre
        self._chosen: tuple[Tensor, Tensor] | None = None

    def forward(self, x_orig: Tensor) -> Tensor:
        """Take ``x_orig`` (any shape, float) into account and return it as it is."""
        self._chosen = None
        observed: Tensor = super().forward(x_orig)
        return observed

    def choose(self) -> tuple[Tensor, Tensor]:
        """Lower and upper end of what is represented, both 0-d float32."""
        return self.min_val, self.max_val

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32, > 0) and zero point (int), each of shape [1]; scale 1 where every value was 0."""
        if self._chosen is None:
            affine = self.qscheme == torch.per_tensor_affine
            ends = _centred(*self.choose()) if self.centre and affine else self.choose()
            scale, zero_point = self._calculate_qparams(*ends)
            self._chosen = torch.where(scale > _TINY, scale, torch.ones_like(scale)), zero_point
        return self._chosen


def _centred(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """A range of 256 levels with zero at the 128th, where ``low`` and ``high`` reach nearly as far; else as it is."""
    reach = torch.maximum(-low, high)
    if float(torch.minimum(-low, high)) < _NEARLY * float(reach):
        return low, high
    return -reach * (128 / 127), reach


class HistogramRangeObserver(ActivationObserver):
    """Base of observers that choose a range from a histogram of |values| up to the largest seen, signs kept apart.

    The bins cover [-limit, limit]; when a value falls outside, ``limit`` doubles and neighbouring bins are merged, so
    counts stay exact whatever the order of batches.
    """

    BINS = 16384

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("counts", torch.zeros(self.BINS, dtype=torch.float64))
        self.register_buffer("zeros", torch.zeros((), dtype=torch.float64))
        self.limit = 0.0

    def forward(self, x_orig: Tensor) -> Tensor:
        """Count ``x_orig`` (any shape, float) and return it as it is."""
        super().forward(x_orig)
        if x_orig.numel() == 0:
            return x_orig
        x = x_orig.detach().float()
        needed = float(torch.maximum(-self.min_val, self.max_val))
        if needed == 0.0:
            self.zeros += x.numel()
            return x_orig
        if self.limit == 0.0:
            self.limit = needed
        while self.limit < needed:
            self._double()
        for part in x.flatten().split(_EXACT_COUNT):
            self.counts += torch.histc(part, self.BINS, -self.limit, self.limit)
        zeros = x.numel() - int(torch.count_nonzero(x))
        self.zeros += zeros
        self.counts[self.BINS // 2] -= zeros
        return x_orig

    def quantiles(self, percentile: float) -> tuple[Tensor, Tensor]:
        """The ends of the range that holds ``percentile`` percent of the values, as many outside on either side."""
        counts = self.counts.clone()
        counts[self.BINS // 2] += self.zeros
        share = counts.cumsum(0) / counts.sum().clamp(min=1.0)
        outside = (1.0 - percentile / 100.0) / 2
        edges = torch.linspace(-self.limit, self.limit, self.BINS + 1, dtype=torch.float64)
        low = edges[int((share <= outside).sum())]
        high = edges[int((share < 1.0 - outside).sum()) + 1]
        return torch.maximum(low.float(), self.min_val), torch.minimum(high.float(), self.max_val)

    def _double(self) -> None:
        self.limit *= 2
        quarter = self.BINS // 4
        merged = self.counts.view(-1, 2).sum(1)
        self.counts.zero_()
        self.counts[quarter : 3 * quarter] = merged


class PercentileObserver(HistogramRangeObserver):
    """Range that holds a given share of the values; what lies outside on either side is clipped."""

    def __init__(self, percentile: float = 99.99, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.percentile = percentile

    def choose(self) -> tuple[Tensor, Tensor]:
        """The two quantiles that leave (100 - percentile) / 2 percent outside on each side."""
        return self.quantiles(self.percentile)


class EntropyObserver(HistogramRangeObserver):
    """Range whose 256-level histogram is closest to the values' own in Kullback-Leibler divergence.

    Migacz, "8-bit Inference with TensorRT", GTC 2017: each candidate keeps a share of the full range and counts what it
    clips in its outermost bins. Zeros are left out of the histogram, as every range represents them exactly.
    """

    LEVELS = 256
    SHARES = np.linspace(1.0, 0.1, 91)

    def choose(self) -> tuple[Tensor, Tensor]:
        """The candidate range of least divergence."""
        if self.limit == 0.0:
            return self.min_val, self.max_val
        counts = self.counts.numpy()
        share = float(min(self.SHARES, key=lambda share: self._divergence(counts, float(share))))
        return self.min_val * share, self.max_val * share

    def _represented(self, low: float, high: float) -> tuple[float, float]:
        """What 256 levels reach where this range is chosen: zero is among it, and both sides alike if symmetric."""
        low, high = min(low, 0.0), max(high, 0.0)
        if self.qscheme != torch.per_tensor_symmetric:
            return low, high
        reach = max(-low, high)
        return -reach, reach

    def _divergence(self, counts: NDArray[np.float64], share: float) -> float:
        width = 2 * self.limit / self.BINS
        ends = [end * share for end in self._represented(float(self.min_val), float(self.max_val))]
        first, last = (min(int((end + self.limit) / width), self.BINS - 1) for end in ends)
        inside = counts[first : last + 1]
        filled = inside > 0
        # Every level takes the same number of bins, give or take one; its mass is spread evenly over its filled bins.
        edges = np.arange(self.LEVELS + 1) * len(inside) // self.LEVELS
        mass, bins = (np.diff(np.concatenate(([0.0], np.cumsum(values)))[edges]) for values in (inside, filled))
        spread = np.repeat(mass / np.maximum(bins, 1.0), np.diff(edges))
        reference = inside.copy()
        reference[0] += counts[:first].sum()
        reference[-1] += counts[last + 1 :].sum()
        held = reference > 0
        if not mass.sum():
            return float("inf")
        p = reference[held] / reference.sum()
        q = np.where(filled, spread, 0.0)[held] / mass.sum()
        return float(np.sum(p * np.log(p / np.maximum(q, _LEAST_SHARE))))


class MseObserver(EntropyObserver):
    """Range of least squared error: of the smallest and largest value's, the 99.99th percentile's, the entropy
    observer's, and both ends clipped alike to shares of their own.

    So each tensor gets the method that suits it; the error is that of the histogram rounded to 256 levels.
    """

    PERCENTILE = 99.99

    def choose(self) -> tuple[Tensor, Tensor]:
        """The candidate of least squared error."""
        if self.limit == 0.0:
            return self.min_val, self.max_val
        candidates = [(self.min_val * share, self.max_val * share) for share in self.SHARES.tolist()]
        candidates += [self.quantiles(self.PERCENTILE), super().choose()]
        centers = (np.arange(self.BINS) + 0.5) * (2 * self.limit / self.BINS) - self.limit
        counts = self.counts.numpy()
        held = counts > 0
        return min(candidates, key=lambda ends: self._error(centers[held], counts[held], *map(float, ends)))

    def _error(self, values: NDArray[np.float64], counts: NDArray[np.float64], low: float, high: float) -> float:
        low, high = self._represented(low, high)
        step = (high - low) / (self.LEVELS - 1)
        if step == 0.0:
            return float("inf")
        zero = round(-low / step)
        rounded = (np.clip(np.rint(values / step) + zero, 0, self.LEVELS - 1) - zero) * step
        return float(np.sum(counts * np.square(values - rounded)))


class PerChannelWeightObserver(PerChannelMinMaxObserver):
    """Per-channel symmetric range of a weight, looked at once.

    A channel's scale is also kept so large that the layer's int32 bias, whose scale is the activation's times the
    weight's, does not overflow: the rule onnxruntime's ``quantize_static`` follows too.

    Attributes:
        layer: observer of the layer's input and the layer's bias (shape [channels]); set once all observers exist.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(eps=_TINY, **kwargs)
        self.layer: tuple[ActivationObserver, Tensor] | None = None

    def forward(self, x_orig: Tensor) -> Tensor:
        """Observe ``x_orig`` if nothing was observed yet; return it as it is."""
        return super().forward(x_orig) if self.min_val.numel() == 0 else x_orig

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32, > 0) and zero point (int8, all 0), each of shape [channels]."""
        scale, zero_point = super().calculate_qparams()
        scale = torch.where(scale > _TINY, scale, torch.zeros_like(scale))
        if self.layer is not None:
            activation, bias = self.layer
            activation_scale, _ = activation.calculate_qparams()
            scale = torch.maximum(scale, bias.detach().abs().float() / (activation_scale * _BIAS_LIMIT))
        return torch.where(scale > 0, scale, torch.ones_like(scale)), zero_point.to(torch.int8)
