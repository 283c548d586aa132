"""A program is decomposed for ONNX where it has to be, and only there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

import optc
from optc import Program
from optc.lowering import onnx_export
from optc.lowering.onnx_decompose import decomposed_where_needed

passes = pytest.importorskip(
    "torch.onnx._internal.exporter._fx_passes", reason="this torch decomposes programs for ONNX elsewhere"
)


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each program that torch.onnx decomposes."""
    seen: list[int] = []
    original = passes.decompose_with_registry

    def count(*args: object) -> object:
        seen.append(1)
        return original(*args)

    monkeypatch.setattr(passes, "decompose_with_registry", count)
    return seen


@contextmanager
def always() -> Iterator[None]:
    yield


@pytest.fixture(scope="module")
def pooled() -> Program:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    return optc.capture(nn.Sequential(*layers).eval(), (torch.randn(1, 3, 16, 16),))


@pytest.mark.parametrize("name", ["pooled", "block"])
def test_what_is_known_throughout_is_written_the_same_without(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, decomposed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    program: Program = request.getfixturevalue(name)
    files = [tmp_path / "without.onnx", tmp_path / "with.onnx"]
    _, without = onnx_export.export_onnx(program.fork(), files[0])
    assert not decomposed, "also not for a pool over all of the image"
    monkeypatch.setattr(onnx_export, "decomposed_where_needed", always)
    _, with_it = onnx_export.export_onnx(program.fork(), files[1])
    assert decomposed
    assert sorted(without.pop("origins").values()) == sorted(with_it.pop("origins").values())
    assert without == with_it
    outputs = []
    for file in files:
        session = ort.InferenceSession(file)
        (value,) = session.get_inputs()
        outputs.append(session.run(None, {value.name: program.example_inputs[0].numpy()}))
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_array_equal(one, other)


class Unknown(nn.Module):
    """Has operators that ONNX has not, but that have a decomposition."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.entr(torch.sigmoid(x)) + nn.functional.softshrink(x)


def test_what_has_no_translation_is_decomposed(tmp_path: Path, decomposed: list[int]) -> None:
    x = torch.randn(2, 5)
    program = optc.capture(Unknown(), (x,))
    onnx_export.export_onnx(program, tmp_path / "model.onnx")
    assert len(decomposed) == 1
    (found,) = ort.InferenceSession(tmp_path / "model.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, Unknown()(x).numpy(), atol=1e-6)


def test_the_exporter_is_left_as_it_was() -> None:
    original = passes.decompose_with_registry
    with pytest.raises(KeyError, match="False"), decomposed_where_needed():
        raise KeyError(passes.decompose_with_registry is original)
    assert passes.decompose_with_registry is original
