"""A manifest whose JSON is valid and whose contents are not: said in one line when it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optc import Program, Target
from optc.errors import ArtifactError
from optc.lowering.artifact import write_artifact
from optc.lowering.backend import Lowered
from optc.lowering.manifest import NAME, Manifest, read_manifest


@pytest.fixture(scope="module")
def saved(captured_cnn: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of one file."""
    files, folder = tmp_path_factory.mktemp("lowered"), tmp_path_factory.mktemp("saved") / "artifact"
    (files / "file").touch()
    return write_artifact(folder, files, Lowered(("file",)), captured_cnn, "eager", {}, Target(threads=1))


def changed(saved: Path, folder: Path, place: str, value: Any) -> Path:
    """A copy of the manifest with another value at a place such as ``"target.batch"``."""
    manifest: Any = json.loads((saved / NAME).read_text())
    *parents, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    inner = manifest
    for part in parents:
        inner = inner.setdefault(part, {}) if isinstance(inner, dict) else inner[part]
    inner[last] = value
    (folder / NAME).write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("model", {}, "model.preprocessing: Field required"),
        ("model.name", 3, "model.name: "),
        ("model.preprocessing", 3, "model.preprocessing: "),
        ("model.preprocessing.input_size", [3, 16], "model.preprocessing.input_size.2: Field required"),
        ("model.preprocessing.resize", "x", "model.preprocessing.resize: "),
        ("model.preprocessing.crop", 1, "model.preprocessing.crop: Extra inputs"),
        ("target.threads", "4", "target.threads: Input should be a valid integer"),
        ("target.threads", True, "target.threads: Input should be a valid integer"),
        ("target.batch", 0, "target.batch: Input should be greater than or equal to 1"),
        ("target.batch", 10**30, "target.batch: Input should be less than"),
        ("target.device", None, "target.device: Input should be 'cpu' or 'cuda'"),
        ("target.device", "tpu", "target.device: Input should be 'cpu' or 'cuda'"),
        ("target.options", {"eager": 1}, "target.options.eager: "),
        ("inputs", [], "inputs: "),
        ("inputs.0.dtype", "wat", "inputs.0.dtype: Value error, 'wat' is no type of numbers"),
        ("inputs.0.dtype", "object", "inputs.0.dtype: Value error, 'object' is no type of numbers"),
        ("inputs.0.shape", [None, -3, 16], "inputs.0.shape.1: Input should be greater than or equal to 0"),
        ("inputs.0.shape", [None, 10**6, 10**6], "inputs.0.shape: Value error, no memory holds so many values"),
        ("report.accuracy", 3, "report.accuracy: "),
        ("report.accuracy", {"after": "good"}, "report.accuracy.after: "),
        ("report.model_bytes", "x", "report.model_bytes: "),
        ("report.precision", 3, "report.precision: "),
        ("report.passes", 3, "report.passes: "),
        ("report.passes", [3], "report.passes.0: "),
        ("report.passes", [{"name": "quant", "options": {}, "notes": 3}], "report.passes.0.notes: "),
    ],
)
def test_a_value_of_another_type_is_named_with_its_file(
    saved: Path, tmp_path: Path, place: str, value: Any, message: str
) -> None:
    with pytest.raises(ArtifactError) as caught:
        read_manifest(changed(saved, tmp_path, place, value))
    assert str(caught.value).startswith(f"{tmp_path / NAME} is not valid: {message}")
    assert str(caught.value).endswith("— make the artifact again")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("target.sockets", 2),
        ("model.licence", "MIT"),
        ("report.accuracy", {"after": "nan", "metric": "accuracy"}),
        ("report.accuracy", None),
        ("report.passes", [{"name": "quant", "options": {"bits": 8}}]),
        ("report.something", [1, {"new": None}]),
        ("inputs.0.dtype", "float8_e4m3fn"),
    ],
)
def test_what_it_does_not_know_stays_as_it_is(saved: Path, tmp_path: Path, place: str, value: Any) -> None:
    folder = changed(saved, tmp_path, place, value)
    assert read_manifest(folder).model_dump(mode="json") == json.loads((folder / NAME).read_text())


def test_what_is_written_is_read_back(saved: Path) -> None:
    manifest = read_manifest(saved)
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
