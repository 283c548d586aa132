"""LoadGen's settings: MLPerf's own defaults, what a run asks for, and the user's ``user.conf`` on top."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from optc.bench.loadgen import library
from optc.errors import MeasurementError

Scenario = Literal["SingleStream", "MultiStream", "Server", "Offline"]
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)
_ANY_MODEL = "optc"
_LINE = re.compile(
    r"^[\w*.-]+\.(SingleStream|MultiStream|Server|Offline|\*)\."
    r"((target_qps|\w+_percentile|accuracy_log_probability)\s+=\s+[\d.eE+-]+|\w+\s+=\s+(0|[1-9]\d*))$"
)
"""Of all other numbers LoadGen reads the whole part only: ``1e3`` as 1, ``12.5`` as 12 and, octal, ``010`` as 8."""


def loadgen_settings(
    scenario: Scenario, model: str, values: Mapping[str, Any], user_conf: Path | None, *, accuracy: bool = False
) -> Any:
    """LoadGen's ``TestSettings`` for one test.

    Later ones win: what the ``mlperf.conf`` that LoadGen carries says of any model, ``values``, and ``user_conf``,
    whose keys are looked up as MLPerf does: ``model.Scenario.key`` before ``*.Scenario.key`` before ``*.*.key``.

    Args:
        model: the benchmark's name, as keys in ``user_conf`` spell it.
        values: attributes of ``TestSettings``.
        accuracy: run every sample once and log the answers, instead of measuring.

    Raises:
        MeasurementError: ``user_conf`` cannot be read.
    """
    loadgen = library()
    settings = loadgen.TestSettings()
    # MLPerf's own benchmarks have limits of their own there. An artifact called resnet50 is not held to others than
    # one called resnet50-int8.
    settings.FromConfig("", _ANY_MODEL, scenario, 0)
    settings.scenario = getattr(loadgen.TestScenario, scenario)
    for name, value in values.items():
        setattr(settings, name, value)
    if user_conf is not None:
        check_user_conf(user_conf)
        # Type 2 is LoadGen's for a file read after its defaults; type 1 may be read only once in a process.
        if settings.FromConfig(str(user_conf), model, scenario, 2) != 0:
            raise MeasurementError(f"LoadGen cannot read '{user_conf}'", "see its format in mlcommons/inference")
    mode = loadgen.TestMode
    settings.mode = mode.AccuracyOnly if accuracy else mode.PerformanceOnly
    return settings


def check_user_conf(path: Path) -> None:
    """Make sure that every line of a ``user.conf`` is a setting or a comment; LoadGen would pass over what it is not.

    Raises:
        MeasurementError: it cannot be read, or names the first line that is neither.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MeasurementError(f"cannot read '{path}': {error}", "give a user.conf of MLPerf") from error
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text and not text.startswith("#") and not _LINE.match(text):
            raise MeasurementError(
                f"'{path}' line {number} is no setting: {text}",
                "write model.Scenario.key = number, whole but for target_qps, as in *.Server.target_latency = 100",
            )
