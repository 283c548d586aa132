"""OpenVINO: the converted model in float32 and bfloat16, and NNCF's post-training quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from optc import Runner
from optc.lowering.backend import Array
from optc_openvino.runtime import ov  # the import without telemetry
from tools.peer import CallRunner, Peer, Task, int8_saturates, require_bfloat16

FILE = "model.xml"
NOT_RELU = frozenset(("Elu", "Gelu", "HSigmoid", "HSwish", "Mish", "PRelu", "Sigmoid", "Softplus", "Swish"))
"""Activations for which NNCF recommends its mixed preset."""


class Float(Peer):
    """The converted model, in the precision that OpenVINO is told to compute in."""

    def __init__(self, hint: str) -> None:
        self.hint = hint

    def prepare(self) -> None:
        """Refuse a precision that the CPU has to emulate."""
        if self.hint == "bf16":
            require_bfloat16()

    def produce(self, task: Task, folder: Path) -> dict[str, Any]:
        """Convert and write the IR."""
        ov.save_model(convert(task), folder / FILE, compress_to_fp16=False)
        return {}

    def load(self, task: Task, folder: Path) -> Runner:
        """Compile."""
        return compile_file(folder / FILE, task, {"INFERENCE_PRECISION_HINT": self.hint})


class NncfInt8(Peer):
    """NNCF's ``quantize``; what stays unquantized runs in OpenVINO's own choice, bfloat16 where the CPU has it.

    Before VNNI with weights of 7 bits, which costs no time.
    """

    name = "openvino nncf int8"
    preset: str | None = None

    def produce(self, task: Task, folder: Path) -> dict[str, Any]:
        """Convert, calibrate, quantize and write the IR."""
        import nncf

        model = convert(task)
        kinds = {node.get_type_name() for node in model.get_ops()}
        attention = "ScaledDotProductAttention" in kinds
        if self.preset and (attention or NOT_RELU.isdisjoint(kinds)):
            raise RuntimeError("transformers have this preset anyway, and for ReLU alone it is not recommended")
        images = [batch.numpy() for batch in task.calibration]
        overflow = nncf.OverflowFix.ENABLE if int8_saturates() else None
        quantized = nncf.quantize(
            model,
            nncf.Dataset(images),
            preset=nncf.QuantizationPreset(self.preset) if self.preset else None,
            subset_size=len(images),
            model_type=nncf.ModelType.TRANSFORMER if attention else None,
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=overflow),
        )
        ov.save_model(quantized, folder / FILE, compress_to_fp16=False)
        return {}

    def load(self, task: Task, folder: Path) -> Runner:
        """Compile."""
        return compile_file(folder / FILE, task, {})


class NncfInt8Mixed(NncfInt8):
    """The same with activations quantized asymmetrically, as NNCF recommends for other activations than ReLU."""

    name = "openvino nncf int8 mixed"
    preset = "mixed"


def convert(task: Task) -> ov.Model:
    """The model converted from PyTorch, for the task's batch."""
    example = task.calibration[0]
    with torch.no_grad():
        return ov.convert_model(task.loaded.module, example_input=example, input=[tuple(example.shape)])


def compile_file(path: Path, task: Task, options: dict[str, Any]) -> Runner:
    """Runs an IR file on the task's threads. Threads are not pinned, as optc does not pin them either."""
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": task.threads, "ENABLE_CPU_PINNING": False}
    compiled = ov.Core().compile_model(path, "CPU", {**settings, **options})
    request = compiled.create_infer_request()

    def call(array: Array) -> tuple[Array, ...]:
        request.set_input_tensor(ov.Tensor(array, shared_memory=True))
        request.infer()
        return (request.get_output_tensor().data.copy(),)

    precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return CallRunner(call, "openvino CPU", f"int8 and {precision}" if not options else precision)
