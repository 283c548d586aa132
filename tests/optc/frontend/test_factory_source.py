"""Factories in the user's own code: what they may return, and one line when they do not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from optc.errors import OptcError, UnknownNameError
from optc.frontend.load import load_model

CODE = """
import torch
from torch import nn

def make():
    return nn.Conv2d(1, 2, 3), (torch.zeros(4, 1, 9, 7),)

def bare():
    return nn.Conv2d(3, 2, 3)

class Model(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)

instance = nn.ReLU()

def fails():
    raise KeyError("no config")

def wrong():
    return 42

def leaves():
    raise SystemExit(0)
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_models").mkdir()
    (tmp_path / "user_models" / "nets.py").write_text(CODE)
    (tmp_path / "user_models" / "broken.py").write_text("import no_such_package\n")
    (tmp_path / "user_models" / "typo.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "user_models" / "program.py").write_text("import sys\nsys.exit()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    for name in [name for name in sys.modules if name.startswith("user_models")]:
        monkeypatch.delitem(sys.modules, name)


def test_module_with_example_inputs() -> None:
    loaded = load_model("user_models.nets:make")
    assert [tuple(t.shape) for t in loaded.example_inputs] == [(4, 1, 9, 7)]
    assert loaded.info.preprocessing.input_size == (1, 9, 7)
    assert len(loaded.info.preprocessing.mean) == 1
    assert (loaded.info.source, loaded.info.weights, loaded.info.notes) == ("factory", "given", ())
    assert str(Path.cwd()) not in sys.path


def test_module_alone_is_given_an_image_with_a_note() -> None:
    loaded = load_model("user_models.nets:bare")
    assert tuple(loaded.example_inputs[0].shape) == (1, 3, 224, 224)
    (note,) = loaded.info.notes
    assert "returned no example inputs: assuming one image of 3x224x224" in note


@pytest.mark.parametrize(("name", "kind"), [("Model", torch.nn.Linear), ("instance", torch.nn.ReLU)])
def test_class_and_instance(name: str, kind: type) -> None:
    assert isinstance(load_model(f"user_models.nets:{name}").module, kind)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:f", "there is no module 'no_such_module' for 'no_such_module:f'"),
        ("user_models.nope:f", "there is no module 'user_models.nope'"),
        ("user_models.broken:f", r"importing user_models\.broken raised ModuleNotFoundError: .*broken\.py:1\)"),
        ("user_models.typo:f", r"importing user_models\.typo raised SyntaxError: .*typo\.py:2\)"),
        ("user_models.nets:fails", r"calling user_models\.nets:fails raised KeyError: 'no config' \(.*nets\.py:18\)"),
        ("user_models.nets:leaves", r"calling user_models\.nets:leaves called sys\.exit\(0\) \(.*nets\.py:24\)"),
        ("user_models.program:f", r"importing user_models\.program called sys\.exit\(None\) \(.*program\.py:2\)"),
        ("user_models.nets:wrong", r"user_models\.nets:wrong returned int"),
    ],
)
def test_failures_are_one_line(spec: str, message: str) -> None:
    with pytest.raises(OptcError, match=message) as caught:
        load_model(spec)
    assert "\n" not in str(caught.value)


def test_unknown_factory_suggests_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean bare"):
        load_model("user_models.nets:bar")
