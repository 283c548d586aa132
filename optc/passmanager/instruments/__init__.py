"""Instruments: what watches passes from outside, so every pass, a plugin's too, gets it for nothing."""

from optc.passmanager.instruments.bisect import Bisect
from optc.passmanager.instruments.dump import PrintAfter
from optc.passmanager.instruments.statistics import Statistics
from optc.passmanager.instruments.timing import Timing
from optc.passmanager.instruments.verify import Verify

__all__ = ["Bisect", "PrintAfter", "Statistics", "Timing", "Verify"]
