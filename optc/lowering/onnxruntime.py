"""The ``onnxruntime`` backend: ONNX files run by ONNX Runtime, checked against the graph they came from."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from optc.errors import BackendError
from optc.lowering.backend import Array, Backend, Lowered, Runner
from optc.lowering.onnx_export import export_onnx
from optc.passmanager.compare import Comparison, compare, rounding_sqnr_db
from optc.program import Program
from optc.target import Target

MIN_INT8_SQNR_DB = 20.0
"""Least SQNR between the runtime's int8 kernels and the graph's simulation of them: the kernels keep int32 sums and
requantize once where the graph rounds through float32, so values fall on the other side of a step now and then."""
_LAYERS = ("Conv", "Gemm", "MatMul")


class OnnxRuntimeBackend(Backend):
    """Exports to ONNX and runs with ONNX Runtime's CPU provider."""

    name = "onnxruntime"
    summary = "ONNX Runtime on CPU: one portable .onnx file."

    @classmethod
    def unavailable(cls, target: Target) -> str | None:
        if target.device != "cpu":
            return f"it lowers for cpu only, not {target.device}"
        return None

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        """Write ``model.onnx`` (and ``model.onnx.data`` for large weights) and compare it with the graph."""
        files, details = export_onnx(program, folder / "model.onnx")
        layers = count_layers(folder / "model.onnx")
        distance = _check(program, target, self.load(folder, files, target), quantized=layers["int8"] > 0)
        return Lowered(files, {**details, "layers": layers, "check": asdict(distance)})

    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> Runner:
        """An ONNX Runtime session over the first of ``files``."""
        return OnnxRuntimeRunner(folder / files[0], target)


class OnnxRuntimeRunner(Runner):
    """An ONNX Runtime session; its provider is read back from the session, its precision from the file.

    Args:
        path: the ``.onnx`` file.
        target: device and number of intra-op threads.
    """

    def __init__(self, path: Path, target: Target) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = target.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # The program's quantize/dequantize operators are explicit; leftovers between int8 regions cost time only.
        options.add_session_config_entry("session.enable_quant_qdq_cleanup", "1")
        try:
            self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BackendError(f"onnxruntime refuses {path}: {str(error).splitlines()[0]}") from error
        self._inputs = [entry.name for entry in self._session.get_inputs()]
        self.provider = f"onnxruntime {', '.join(self._session.get_providers())}"
        self.precision = describe_precision(count_layers(path))

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        """Run one query; arrays must be C-contiguous and of the model's dtypes."""
        return tuple(self._session.run(None, dict(zip(self._inputs, inputs, strict=True))))

    def close(self) -> None:
        self._session = None


def count_layers(path: Path) -> dict[str, int]:
    """Convolutions and matrix products of an ONNX file by precision: ``int8`` where a weight reaches it through a
    DequantizeLinear, else the weight's or input's data type."""
    graph = onnx.load(str(path), load_external_data=False).graph
    producers = {output: node for node in graph.node for output in node.output}
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    counts: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in _LAYERS:
            counts[_layer_precision(node, producers, types)] += 1
    return dict(counts) | {"int8": counts["int8"]}


def _layer_precision(node: onnx.NodeProto, producers: dict[str, onnx.NodeProto], types: dict[str, int]) -> str:
    sources = [producers.get(name) for name in node.input[:2]]
    if all(source is not None and source.op_type == "DequantizeLinear" for source in sources):
        return "int8"
    data_type = types.get(node.input[1], onnx.TensorProto.FLOAT)
    return {onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.BFLOAT16: "bfloat16"}.get(data_type, "float32")


def describe_precision(layers: dict[str, int]) -> str:
    """``"int8 (8 of 8 layers)"``, or the one float type all layers have."""
    total = sum(layers.values())
    if layers.get("int8"):
        return f"int8 ({layers['int8']} of {total} layers)"
    floats = [name for name, count in layers.items() if count]
    return floats[0] if floats else "float32"


def _check(program: Program, target: Target, runner: Runner, quantized: bool) -> Comparison:
    """Compare the runtime's outputs with the graph's on the example inputs.

    Raises:
        BackendError: they differ by more than float rounding, or than int8 kernels may differ from their simulation.
    """
    expected = program.run(*program.example_inputs)
    outputs = runner(*[tensor.contiguous().numpy() for tensor in program.example_inputs])
    runner.close()
    distance = compare([expected], [tuple(torch.from_numpy(array) for array in outputs)])
    bound = MIN_INT8_SQNR_DB if quantized else rounding_sqnr_db(program)
    if not distance.finite or distance.sqnr_db < bound:
        raise BackendError(
            f"onnxruntime computes something else than the graph: SQNR {distance.sqnr_db:.1f} dB, at least {bound:.0f} dB"
            f" expected, largest error {distance.max_abs:.3g}",
            "try --backend eager and report the model",
        )
    return distance


__all__ = ["OnnxRuntimeBackend", "OnnxRuntimeRunner", "count_layers", "describe_precision"]
