"""Observers: what calibration remembers of a tensor, and the 8-bit range chosen from it.

They extend torchao's PT2E observers, whose default ``eps`` of 1.2e-7 is a floor under the scale: a network with
activations of 1e-6 would lose all of them. Here a scale is as small as the data needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver

_TINY = torch.finfo(torch.float32).tiny
_BIAS_LIMIT = 2.0**30
"""Largest |bias / scale|: leaves half of int32 to the products it is added to."""


class ActivationObserver(MinMaxObserver):
    """Per-tensor range from the smallest and largest value seen.

    The range always holds 0, so that padding and ReLU are exact.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(eps=_TINY, **kwargs)

    def range(self) -> tuple[Tensor, Tensor]:
        """Lower and upper end of what is represented, both 0-d float32."""
        return self.min_val, self.max_val

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32, > 0) and zero point (int), each of shape [1]; scale 1 where every value was 0."""
        low, high = self.range()
        scale, zero_point = self._calculate_qparams(low, high)
        return torch.where(scale > _TINY, scale, torch.ones_like(scale)), zero_point


class HistogramRangeObserver(ActivationObserver):
    """Base of observers that choose a range from a histogram of |values| up to the largest seen, signs kept apart.

    The bins cover [-limit, limit]; when a value falls outside, ``limit`` doubles and neighbouring bins are merged, so
    counts stay exact whatever the order of batches.
    """

    BINS = 8192

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
        self.counts += torch.histc(x, self.BINS, -self.limit, self.limit)
        zeros = x.numel() - int(torch.count_nonzero(x))
        self.zeros += zeros
        self.counts[self.BINS // 2] -= zeros
        return x_orig

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

    def range(self) -> tuple[Tensor, Tensor]:
        """The two quantiles that leave (100 - percentile) / 2 percent outside on each side."""
        counts = self.counts.clone()
        counts[self.BINS // 2] += self.zeros
        share = counts.cumsum(0) / counts.sum().clamp(min=1.0)
        outside = (1.0 - self.percentile / 100.0) / 2
        edges = torch.linspace(-self.limit, self.limit, self.BINS + 1, dtype=torch.float64)
        low = edges[int((share <= outside).sum())]
        high = edges[int((share < 1.0 - outside).sum()) + 1]
        return torch.maximum(low.float(), self.min_val), torch.minimum(high.float(), self.max_val)


class EntropyObserver(HistogramRangeObserver):
    """Range whose 256-level histogram is closest to the values' own in Kullback-Leibler divergence.

    Migacz, "8-bit Inference with TensorRT", GTC 2017: each candidate keeps a share of the full range and counts what it
    clips in its outermost bins. Zeros are left out of the histogram, as every range represents them exactly.
    """

    CANDIDATES = 64
    LEVELS = 256

    def range(self) -> tuple[Tensor, Tensor]:
        """The candidate range of least divergence."""
        if self.limit == 0.0:
            return self.min_val, self.max_val
        shares = torch.linspace(1.0, 0.1, self.CANDIDATES).tolist()
        best = min(shares, key=self._divergence)
        return self.min_val * best, self.max_val * best

    def _divergence(self, share: float) -> float:
        width = 2 * self.limit / self.BINS
        low, high = min(float(self.min_val), 0.0) * share, max(float(self.max_val), 0.0) * share
        first = min(int((low + self.limit) / width), self.BINS - 1)
        last = min(int((high + self.limit) / width), self.BINS - 1)
        inside = self.counts[first : last + 1]
        reference = inside.clone()
        reference[0] += self.counts[:first].sum()
        reference[-1] += self.counts[last + 1 :].sum()
        level = torch.arange(len(inside)) * self.LEVELS // len(inside)
        filled = (inside > 0).double()
        mass = torch.zeros(self.LEVELS, dtype=torch.float64).scatter_add_(0, level, inside)
        bins = torch.zeros(self.LEVELS, dtype=torch.float64).scatter_add_(0, level, filled)
        quantized = (mass / bins.clamp(min=1.0))[level] * filled
        if not float(quantized.sum()):
            return float("inf")
        p, q = reference / reference.sum(), quantized / quantized.sum()
        held = p > 0
        return float((p[held] * (p[held] / q[held].clamp(min=1e-12)).log()).sum())


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
        """Scale (float32, > 0) and zero point (0), each of shape [channels]."""
        scale, zero_point = super().calculate_qparams()
        scale = torch.where(scale > _TINY, scale, torch.ones_like(scale))
        if self.layer is not None:
            activation, bias = self.layer
            scale = torch.maximum(scale, bias.detach().abs().float() / (activation.calculate_qparams()[0] * _BIAS_LIMIT))
        return scale, zero_point
