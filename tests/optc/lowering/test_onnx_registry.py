"""The exporter's table of operators is made once, and each export has its own."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from optc import Program
from optc.lowering import onnx_registry
from optc.lowering.onnx_export import export_onnx

registration = pytest.importorskip(
    "torch.onnx._internal.exporter._registration", reason="this torch keeps its table of operators elsewhere"
)


def test_exports_with_one_table_write_what_single_ones_write(
    cnn: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_registry, "_made", {})
    parsed, parse = [], registration._torchlib_registry.get_torchlib_ops
    monkeypatch.setattr(registration._torchlib_registry, "get_torchlib_ops", lambda: parsed.append(1) or parse())
    original = registration.ONNXRegistry.from_torchlib.__func__
    files = []
    for name in ("first.onnx", "second.onnx"):
        export_onnx(cnn, tmp_path / name)
        files.append(onnx.load(tmp_path / name).SerializeToString())
    assert files[0] == files[1]
    assert len(parsed) == 1
    assert registration.ONNXRegistry.from_torchlib.__func__ is original


def test_what_one_export_adds_to_its_table_others_do_not_see() -> None:
    with onnx_registry.registry_kept():
        first = registration.ONNXRegistry.from_torchlib(opset_version=23)
        first.functions["aten::relu"].clear()
        first.functions["optc::new"] = []
        second = registration.ONNXRegistry.from_torchlib(opset_version=23)
    assert second.functions["aten::relu"]
    assert "optc::new" not in second.functions
