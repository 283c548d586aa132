"""The ``onnxruntime-tensorrt`` backend: an ONNX file, compiled by TensorRT inside ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optc.lowering.onnxruntime import PROVIDERS, OnnxRuntimeBackend
from optc.target import Target

if TYPE_CHECKING:
    from optc.program import Program


class OnnxRuntimeTensorRtBackend(OnnxRuntimeBackend):
    """ONNX Runtime with the TensorRT execution provider first, for nodes it takes no part of the CUDA one.

    Nodes that TensorRT does not take have fallen back. The engines are built when the file is loaded, every time, and
    choose their own types; so ``--backend auto`` leaves it out, and the ``tensorrt`` backend is the better one unless
    an ONNX file is wanted.
    """

    name = "onnxruntime-tensorrt"
    summary = "ONNX Runtime with TensorRT on CUDA: one .onnx file, engines built at every load."
    automatic = False

    @classmethod
    def providers(cls, device: str) -> Sequence[str]:
        """TensorRT's, then CUDA's; none on other devices."""
        return ("TensorrtExecutionProvider", *PROVIDERS["cuda"]) if device == "cuda" else ()

    @classmethod
    def unavailable(cls, target: Target) -> str | None:
        """As of the base class; or that TensorRT's library is missing, which ONNX Runtime's wheel does not hold."""
        from optc.lowering.tensorrt import library_missing

        if reason := super().unavailable(replace(target, device="cuda")):
            return reason
        if library_missing():
            return (
                "TensorRT's library (libnvinfer) is missing:"
                " pip install 'optc[gpu]' --extra-index-url https://pypi.nvidia.com"
            )
        return super().unavailable(target)

    @classmethod
    def simulates_quantization(cls, target: Target) -> bool:
        """TensorRT has int8 kernels."""
        return False

    @classmethod
    def opsets(cls, device: str) -> Sequence[int]:
        """The one that TensorRT's parser is given."""
        from optc.lowering.tensorrt_onnx import OPSET

        return (OPSET,)

    def export(self, program: Program, path: Path, opset: int) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Write the ONNX file by TensorRT's rules of quantization.

        Raises:
            BackendError: an operator has no ONNX form, or the quantization is none that TensorRT takes.
        """
        from optc.lowering.tensorrt_onnx import export_tensorrt_onnx

        return export_tensorrt_onnx(program, path)
