"""What values options take: numbers within what makes sense and fits into memory, and texts that say something."""

from __future__ import annotations

import math
import re
from typing import Any

import click

MOST_STAGES = 4096
IMAGES = click.IntRange(1, 65536)
"""Images in a batch, or parts of one."""
STAGES = click.IntRange(1, MOST_STAGES)
THREADS = click.IntRange(1, 4096)
SEED = click.IntRange(0, 2**32 - 1)
"""What every generator of random numbers takes."""


class _Text(click.types.StringParamType):
    """Any text but an empty one, which shells make of variables that are not set."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(super().convert(value, param, ctx))
        if not text.strip():
            self.fail("it is empty", param, ctx)
        return text


class _Points(click.FloatRange):
    """Percentage points; a NaN, which no bound refuses, is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        points = float(super().convert(value, param, ctx))
        if math.isnan(points):
            self.fail(f"{value} is no number of percentage points", param, ctx)
        return points


class _Devices(_Text):
    """Devices as in ``4xh100`` or ``2xcpu:1``, or a TOML file of them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = super().convert(value, param, ctx)
        numbers = re.findall(r"(?:^|,)\s*(\d+)x|:(\d+)", text)
        if any(float(count or threads) > MOST_STAGES for count, threads in numbers):
            self.fail(f"'{text}' has more devices or threads than {MOST_STAGES}", param, ctx)
        return text


TEXT = _Text()
POINTS = _Points(0, 100)
DEVICES = _Devices()
