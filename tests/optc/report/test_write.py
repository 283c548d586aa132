from __future__ import annotations

import json
from pathlib import Path

import pytest

from optc.errors import OptcError
from optc.report.document import Document
from optc.report.write import check_path, write_report, write_whole

EMPTY = Document("title", "verdict", None, (), ())


@pytest.mark.parametrize(
    ("name", "begins"), [("r.html", "<!doctype html>"), ("r.HTML", "<!doctype"), ("r.md", "# title")]
)
def test_the_extension_chooses_the_form(name: str, begins: str, tmp_path: Path) -> None:
    write_report(tmp_path / name, EMPTY, {})
    assert (tmp_path / name).read_text().startswith(begins)
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_json_holds_the_data(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")
    write_report(path, EMPTY, {"a": [1, 2.5, None]})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}


@pytest.mark.parametrize("name", ["r.pdf", "r", "html"])
def test_another_extension_is_refused_with_the_choice(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptcError, match=r"written as \.html, \.md, \.json"):
        check_path(tmp_path / name)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptcError, match="there is no folder"):
        check_path(tmp_path / "missing" / "r.html")


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "r.html").mkdir()
    with pytest.raises(OptcError, match="cannot write the report"):
        write_report(tmp_path / "r.html", EMPTY, {})
    with pytest.raises(OptcError, match=r"cannot write the report '.*': Is a directory — choose another path"):
        write_whole(tmp_path / "r.html", b"text", "the report")
    assert [each.name for each in tmp_path.iterdir()] == ["r.html"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("taken.html", "Is a directory"), ("/proc/r.html", "No such file"), ("a" * 300 + ".html", "File name too long")],
)
def test_a_place_where_nothing_can_be_written_is_found_beforehand(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(OptcError, match=f"cannot write the report '.*': {reason}"):
        check_path(tmp_path / name)


def test_a_name_as_long_as_names_may_be_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 250 + ".html")
    write_report(path, EMPTY, {})
    assert list(tmp_path.iterdir()) == [path]
