"""Nodes that run elsewhere than asked, for real: the wheel lists AzureExecutionProvider, which runs no local node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from optc import Program, Target
from optc.errors import BackendError
from optc.lowering.lowering import lower
from optc.lowering.onnx_export import LEAST_OPSET, OPSET
from optc.lowering.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeRunner

CPU, AZURE = "CPUExecutionProvider", "AzureExecutionProvider"
TARGET = Target(threads=1)
ALLOWED = replace(TARGET, allow_fallback=True)

pytestmark = pytest.mark.skipif(
    AZURE not in onnxruntime.get_available_providers(), reason=f"this onnxruntime has no {AZURE}"
)


class AzureBackend(OnnxRuntimeBackend):
    name = "onnxruntime-azure"

    @classmethod
    def providers(cls, device: str) -> Sequence[str]:
        return (AZURE, CPU)


class NewestFallsBack(OnnxRuntimeBackend):
    """Runs nodes of the newest opset elsewhere than asked for, as the CUDA provider does for some operators."""

    @classmethod
    def opsets(cls, device: str) -> Sequence[int]:
        return (OPSET, LEAST_OPSET)

    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> OnnxRuntimeRunner:
        (opset,) = (each.version for each in onnx.load(folder / files[0]).opset_import if not each.domain)
        providers = (AZURE, CPU) if opset == OPSET else (CPU,)
        return OnnxRuntimeRunner(folder / files[0], providers, target, self.options(target))


def test_an_older_opset_is_preferred_to_a_fallback_that_is_allowed(cnn: Program, tmp_path: Path) -> None:
    details = NewestFallsBack().lower(cnn, ALLOWED, tmp_path).details
    assert (details["opset"], details["fallback"]) == (LEAST_OPSET, [])


def test_a_fallback_is_an_error_that_lists_the_nodes(cnn: Program, tmp_path: Path) -> None:
    with pytest.raises(BackendError) as caught:
        AzureBackend().lower(cnn, TARGET, tmp_path)
    assert f"nodes on another provider than {AZURE}" in str(caught.value)
    assert f"(Conv, {CPU})" in str(caught.value)
    assert "--allow-fallback" in str(caught.value)


def test_an_allowed_fallback_is_recorded_node_by_node(block: Program, tmp_path: Path) -> None:
    made = lower(AzureBackend(), block, ALLOWED, tmp_path / "azure")
    details = made.lowered.details
    ran = details["providers"][CPU]
    assert details["providers"] == {CPU: ran}
    operators = [each["operator"] for each in details["fallback"]]
    assert {"Conv", "Attention", "LayerNormalization"} <= set(operators)
    assert "Shape" not in operators  # computed on the CPU for any provider
    assert len(operators) < ran
    assert {each["provider"] for each in details["fallback"]} == {CPU}
    assert made.provider == f"onnxruntime {CPU} ({ran} nodes)"
    assert f'= [("{AZURE}", {{}}), ("{CPU}", {{}})]' in made.lowered.run_script
    runner = made.load()
    x = torch.randn(2, 3, 16, 16)
    for ours, graph in zip(runner(x.numpy()), block.run(x), strict=True):
        np.testing.assert_allclose(ours, graph.numpy(), rtol=1e-3, atol=1e-4)


def test_loading_asks_again_whether_a_fallback_is_allowed(cnn: Program, tmp_path: Path) -> None:
    made = lower(AzureBackend(), cnn, ALLOWED, tmp_path / "azure")
    with pytest.raises(BackendError, match="--allow-fallback"):
        replace(made, target=TARGET).load()
