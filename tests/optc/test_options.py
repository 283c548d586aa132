from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import BeforeValidator, Field

from optc.errors import OptcError, UnknownNameError
from optc.options import Options, checked, described


class Some(Options):
    level: Literal["low", "high"] = "low"
    size: Annotated[Literal[32, 64], BeforeValidator(int)] | None = Field(None, description="how large")
    count: int = Field(3, ge=1)


def test_values_come_as_text_or_as_they_are() -> None:
    assert checked(Some, {"size": "64", "count": "7"}, "pass some", "optc passes some") == Some(size=64, count=7)
    assert checked(Some, {}, "pass some", "optc passes some") == Some()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cuont": 1}, "unknown option of backend some 'cuont' — did you mean count?"),
        ({"count": 0}, "option some.count=0: Input should be greater than or equal to 1 — see 'optc backends some'"),
        ({"level": "middle"}, "option some.level='middle': Input should be 'low' or 'high'"),
    ],
)
def test_what_is_wrong_is_one_line(given: dict[str, object], says: str) -> None:
    with pytest.raises(OptcError) as raised:
        checked(Some, given, "backend some", "optc backends some")
    assert str(raised.value).startswith(says)


def test_one_that_takes_none_says_so() -> None:
    with pytest.raises(UnknownNameError, match="it takes no options"):
        checked(Options, {"a": 1}, "pass none", "optc passes none")


def test_options_are_described_in_words() -> None:
    assert described(Some) == {
        "level": {"type": "low, high", "default": "low", "description": ""},
        "size": {"type": "32, 64, not given", "default": None, "description": "how large"},
        "count": {"type": "int", "default": 3, "description": ""},
    }
