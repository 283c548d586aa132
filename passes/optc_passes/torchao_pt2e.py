"""What the quant pass takes from torchao, imported without the remarks torchao makes about itself."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Keep remarks on torchao's own internals (missing CUDA libraries, deprecations inside it) from the user."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.ao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(torchao|torch\.ao)\b")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


with quiet():
    from torchao.quantization.pt2e import MinMaxObserver, ObserverBase, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.prepare import prepare as insert_observers
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e
    from torchao.quantization.pt2e.quantizer import (
        DerivedQuantizationSpec,
        QuantizationAnnotation,
        QuantizationSpec,
        Quantizer,
        SharedQuantizationSpec,
    )

__all__ = [
    "DerivedQuantizationSpec",
    "MinMaxObserver",
    "ObserverBase",
    "PerChannelMinMaxObserver",
    "QuantizationAnnotation",
    "QuantizationSpec",
    "Quantizer",
    "SharedQuantizationSpec",
    "convert_pt2e",
    "insert_observers",
    "quiet",
]
