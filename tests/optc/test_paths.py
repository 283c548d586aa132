"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from optc.bench.cache import cache_folder
from optc.paths import encodable, user_path


def test_a_home_that_does_not_exist_is_part_of_the_name() -> None:
    assert user_path("~/x") == Path.home() / "x"
    assert user_path("~no-such-user/x") == Path("~no-such-user/x")


def test_names_that_are_no_text_can_be_written() -> None:
    assert encodable("café") == "café"
    assert encodable("caf\udce9").encode() == b"caf\\udce9"


@pytest.mark.parametrize(
    ("given", "folder"), [(".", "optc/kind"), ("/c", "/c/optc/kind"), ("~no-such-user/c", "/nonexistent/optc/kind")]
)
def test_the_cache_is_where_it_is_asked_for(given: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cache_folder("kind") == Path(folder)
