"""Values that no command takes: one line that names the option, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]
HUGE = "9" * 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("optimize", "m", "--seed", HUGE), "'--seed': "),
        (("optimize", "m", "--batch", "99999999999999"), "'--batch': "),
        (("optimize", "m", "--threads", HUGE), "'--threads': "),
        (("profile", "m", "--threads", HUGE), "'--threads': "),
        (("profile", "m", "--memory-limit", f"{HUGE}GB"), "is no size of memory"),
        (("compare", "m", "n", "--batch", HUGE), "'--batch': "),
        (("partition", "m", "--stages", HUGE), "'--stages': "),
        (("partition", "m", "--microbatches", HUGE), "'--microbatches': "),
        (("partition", "m", "--seed", "-1"), "'--seed': "),
        (("partition", "m", "--devices", "99999999999xh100"), "'99999999999xh100' has more devices or threads than"),
        (("partition", "m", "--simulate", "1xh100, 5000xl4"), "'--simulate': "),
        (("partition", "m", "--devices", f"2xcpu:{'9' * 5000}"), "'--devices': "),
        (("optimize", "m", "--max-drop", "nan"), "'--max-drop': nan is no number of percentage points"),
        (("optimize", "m", "--max-drop", "inf"), "'--max-drop': inf is not in the range 0<=x<=100"),
        (("optimize", "m", "--max-drop", "101"), "'--max-drop': 101.0 is not in the range 0<=x<=100"),
        (("optimize", "m", "--data", ""), "'--data': it is empty"),
        (("optimize", ""), "'MODEL': it is empty"),
        (("optimize", "m", "--weights", ""), "'--weights': it is empty"),
        (("optimize", "m", "--backend", " "), "'--backend': it is empty"),
        (("profile", ""), "'TARGETS...': it is empty"),
        (("profile", "m", "--data", ""), "'--data': it is empty"),
        (("profile", "m", "--cpu-affinity", ""), "'--cpu-affinity': it is empty"),
        (("compare", "m", ""), "'TARGETS...': it is empty"),
        (("explain", ""), "'ARTIFACT': it is empty"),
        (("partition", "m", "--devices", ""), "'--devices': it is empty"),
    ],
)
def test_a_value_out_of_bounds_is_one_line(
    arguments: tuple[str, ...], message: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_counts_of_devices_that_exist_are_taken(command: Command) -> None:
    done = command("partition", "no-such-model", "--simulate", "64xh100,4096xcpu:128", "-q")
    assert "unknown model 'no-such-model'" in done.stderr
