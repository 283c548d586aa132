from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch

from optc import Program, Target
from optc.lowering.onnxruntime_tensorrt import OnnxRuntimeTensorRtBackend
from optc.lowering.tensorrt import library_missing
from optc.plugins.registry import registry

TENSORRT = "TensorrtExecutionProvider"
CUDA = Target(device="cuda")


def test_it_is_registered_and_left_out_of_auto() -> None:
    assert registry().load("backend", "onnxruntime-tensorrt") is OnnxRuntimeTensorRtBackend
    assert not OnnxRuntimeTensorRtBackend.automatic
    assert not OnnxRuntimeTensorRtBackend.simulates_quantization(CUDA)


def test_tensorrt_is_what_is_asked_for() -> None:
    assert list(OnnxRuntimeTensorRtBackend.providers("cuda")) == [TENSORRT, "CUDAExecutionProvider"]


def test_where_it_cannot_run_it_says_why() -> None:
    reasons = OnnxRuntimeTensorRtBackend.unavailable(Target()), OnnxRuntimeTensorRtBackend.unavailable(CUDA)
    if TENSORRT not in onnxruntime.get_available_providers():
        mend = "pip uninstall onnxruntime && pip install 'optc[gpu]'"
        assert reasons == 2 * (f"the installed onnxruntime has no {TENSORRT}: {mend}",)


def test_where_all_is_installed_it_says_what_it_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [TENSORRT])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("optc.lowering.tensorrt.library_missing", lambda: False)
    assert OnnxRuntimeTensorRtBackend.unavailable(Target()) == "onnxruntime-tensorrt runs on cuda, not on 'cpu'"
    assert OnnxRuntimeTensorRtBackend.unavailable(CUDA) is None


@pytest.mark.skipif(not library_missing(), reason="TensorRT is installed")
def test_a_provider_without_tensorrts_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [TENSORRT])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    reason = OnnxRuntimeTensorRtBackend.unavailable(CUDA) or ""
    assert reason.startswith("TensorRT's library (libnvinfer) is missing: pip install")


@pytest.mark.gpu
def test_tensorrt_runs_every_node(cnn: Program, tmp_path: Path) -> None:
    backend = OnnxRuntimeTensorRtBackend()
    if reason := backend.unavailable(CUDA):
        pytest.skip(reason)
    lowered = backend.lower(cnn, CUDA, tmp_path)
    assert lowered.details["fallback"] == []
    assert set(lowered.details["providers"]) == {TENSORRT}
    (output,) = backend.load(tmp_path, lowered.files, CUDA)(torch.randn(3, 3, 16, 16).numpy())
    assert output.shape == (3, 10)
