"""What quantization may cost: noise in the outputs, and the budget of whoever runs it."""

from __future__ import annotations

from optc import PassContext
from optc_passes.quant_formats import Attempt

MIN_SQNR_DB = 10.0
"""Noise of a tenth of the signal's power: below it a network's outputs are no longer its own."""
ROOM_DB = 1.0
"""How much more is asked for on calibration data, as outputs on other data may be noisier."""


def over_budget(attempt: Attempt, context: PassContext) -> str | None:
    """What is wrong with an attempt, in words that end a sentence, or ``None``."""
    least = max(MIN_SQNR_DB + ROOM_DB, context.budget.min_sqnr_db if context.budget else 0.0)
    if not attempt.sqnr >= least:
        return f"the model's outputs have {attempt.sqnr:.1f} dB, below {least:.3g} dB"
    return context.budget.excess(attempt.program.call) if context.budget else None


def drop(attempt: Attempt, context: PassContext) -> float | None:
    """Percentage points of the task's metric that an attempt loses; ``None`` where there is no budget of it."""
    return context.budget.drop(attempt.program.call) if context.budget else None
