"""What a remembered choice depends on, and that a broken file is no choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import optc
from optc import Target
from optc.bench.choice import Outcome
from optc.bench.choice_cache import _code, file_of, folder, recall, remember
from optc.bench.disturbance import by_others
from optc.lowering.lowering import AUTO, backends

OUTCOMES = (Outcome("a", True, "lowest", "int8", 1.5, 100, 2.0), Outcome("b", False, "pip install b"))
TARGET = Target(threads=1)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def program(seed: int = 0, size: int = 4) -> optc.Program:
    torch.manual_seed(seed)
    return optc.capture(torch.nn.Sequential(torch.nn.Linear(size, 3), torch.nn.ReLU()), (torch.randn(2, size),))


def test_the_same_model_has_the_same_file_and_another_has_not() -> None:
    found, _ = backends(AUTO, TARGET)
    file = file_of({"": program()}, TARGET, found)
    assert file.parent == folder()
    assert file_of({"": program()}, TARGET, found) == file
    others = {
        file_of({"": program(seed=1)}, TARGET, found),  # the weights alone differ
        file_of({"": program(size=5)}, TARGET, found),
        file_of({"": program()}, replace(TARGET, threads=2), found),
        file_of({"": program()}, TARGET, found[1:]),
        file_of({"fuse": program()}, TARGET, found),
        file_of({"": program(), "fuse": program()}, TARGET, found),
    }
    assert len(others) == 6
    assert file not in others


def test_a_program_that_comes_out_otherwise_each_time_counts_by_its_passes() -> None:
    found, _ = backends(AUTO, TARGET)
    made, otherwise = ({"int8": program(), "measured": program(seed=seed)} for seed in (1, 2))
    varying = {"measured": ["mixed", {"block": 128}]}
    file = file_of(made, TARGET, found, varying)
    assert file == file_of(otherwise, TARGET, found, varying)
    others = {
        file_of(made, TARGET, found),
        file_of(made, TARGET, found, {"measured": ["mixed", {"block": 64}]}),
        file_of({"int8": program()}, TARGET, found, varying),
        file_of({**made, "int8": program(seed=1)}, TARGET, found, varying),
    }
    assert len(others) == 4
    assert file not in others


def test_models_of_one_batch_size_have_a_file_for_each() -> None:
    found, _ = backends(AUTO, TARGET)
    files = {}
    for dynamic in (True, False):
        for batch in (2, 4):
            torch.manual_seed(0)
            model, x = torch.nn.Linear(4, 3), torch.randn(batch, 4)
            files[dynamic, batch] = file_of({"": optc.capture(model, (x,), dynamic_batch=dynamic)}, TARGET, found)
    assert files[True, 2] == files[True, 4]
    assert files[False, 2] != files[False, 4]


def test_what_is_remembered_is_recalled() -> None:
    file = file_of({"": program()}, TARGET, [])
    assert recall(file) is None
    remember(file, OUTCOMES)
    choice = recall(file)
    assert choice is not None
    assert choice.outcomes == OUTCOMES
    assert choice.measured.endswith("+00:00")
    assert [path.name for path in folder().iterdir()] == [file.name]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"outcomes": [], "measured": ""}', '{"outcomes": [{"x": 1}]}'])
def test_a_broken_file_is_no_choice(text: str) -> None:
    file = file_of({"": program()}, TARGET, [])
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert recall(file) is None
    remember(file, OUTCOMES)
    assert recall(file) is not None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    file = file_of({"": program()}, TARGET, [])
    remember(file, OUTCOMES)
    assert recall(file) is None


def test_fingerprint_of_contents_sees_a_changed_weight() -> None:
    one, two = program(), program()
    assert one.fingerprint() != two.fingerprint()
    assert one.fingerprint(contents=True) == two.fingerprint(contents=True)
    with torch.no_grad():
        next(two.constants())[1].view(-1)[0] += 1
    assert one.fingerprint(contents=True) != two.fingerprint(contents=True)


def test_a_change_of_the_code_is_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    before = file_of({"": program()}, TARGET, [])
    assert file_of({"": program()}, TARGET, []) == before
    monkeypatch.setattr("optc.bench.choice_cache._code", lambda: "of another day")
    assert file_of({"": program()}, TARGET, []) != before
    monkeypatch.undo()
    assert len(_code()) == 64


def test_what_disturbed_a_choice_is_remembered_with_it(tmp_path: Path) -> None:
    seen = ["unsteady: the medians of its blocks lie 12% apart", "other processes took 40% of the CPUs meanwhile"]
    remember(tmp_path / "choice.json", OUTCOMES, by_others(seen))
    known = recall(tmp_path / "choice.json")
    assert known is not None
    assert known.disturbed == seen[1]
    assert by_others(seen[:1]) == ""
