"""ONNX Runtime: the exported model, and its own static quantization."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from optc import Runner
from optc.lowering.backend import Array
from tools.peer import CallRunner, Peer, Task, int8_saturates

INPUT, FILE = "input", "model.onnx"
_PROTOBUF_LIMIT = 1_500_000_000


class Float32(Peer):
    """The exported model as it is."""

    name = "onnxruntime fp32"

    def produce(self, task: Task, folder: Path) -> dict[str, Any]:
        """Export."""
        export(task, folder / FILE)
        return {}

    def load(self, task: Task, folder: Path) -> Runner:
        """A session with all graph optimizations."""
        return session_runner(folder / FILE, task, "float32")


class StaticInt8(Peer):
    """``quantize_static`` as its documentation says to use it on x86: pre-processing, QDQ, U8S8, 7 bits before VNNI.

    Per channel, which it recommends for accuracy.
    """

    name = "onnxruntime int8"
    settings: ClassVar[dict[str, Any]] = {
        "quant_format": QuantFormat.QDQ,
        "per_channel": True,
        "reduce_range": int8_saturates(),
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QInt8,
    }

    def produce(self, task: Task, folder: Path) -> dict[str, Any]:
        """Export, pre-process, calibrate, quantize."""
        exported, prepared = folder / "exported.onnx", folder / "prepared.onnx"
        big = export(task, exported)
        quant_pre_process(exported, prepared, skip_symbolic_shape=True, save_as_external_data=big)
        quantize_static(
            prepared,
            folder / FILE,
            _Reader(task),
            **self.settings,
            use_external_data_format=big,
        )
        return {}

    def load(self, task: Task, folder: Path) -> Runner:
        """A session over the quantized file."""
        return session_runner(folder / FILE, task, "int8")


class StaticInt8PerTensor(StaticInt8):
    """The same with one scale for each weight, which the documentation recommends for speed."""

    name = "onnxruntime int8 per tensor"
    settings: ClassVar[dict[str, Any]] = {**StaticInt8.settings, "per_channel": False}


class StaticInt8Defaults(StaticInt8):
    """``quantize_static`` with its default settings: S8S8, one scale for each weight."""

    name = "onnxruntime int8, defaults"
    settings: ClassVar[dict[str, Any]] = {}


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """The calibration batches as ONNX Runtime wants them."""

    def __init__(self, task: Task) -> None:
        self._rest: Iterator[dict[str, Array]] = iter([{INPUT: batch.numpy()} for batch in task.calibration])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._rest, None)


def export(task: Task, path: Path) -> bool:
    """Write the model as ONNX for the task's batch; returns whether its weights are in a second file."""
    module = task.loaded.module
    big = sum(parameter.nbytes for parameter in module.parameters()) > _PROTOBUF_LIMIT
    torch.onnx.export(
        module, (task.calibration[0],), path, dynamo=True, external_data=big, input_names=[INPUT], verbose=False
    )
    return big


def session_runner(path: Path, task: Task, precision: str) -> Runner:
    """Runs an ONNX file on the task's threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return CallRunner(lambda array: tuple(session.run(None, {name: array})), "onnxruntime", precision)
