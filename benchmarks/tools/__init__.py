"""The tools that optc is compared with, and optc, by the names the benchmark gives them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.peer import Peer


@dataclass(frozen=True)
class Entry:
    """Where a peer is implemented.

    Attributes:
        place: ``"module:Class"`` in this package; imported when it is used, for a tool may be missing.
        arguments: of the class.
        weight_bytes: what a weight takes while the model is open, besides the module that all share.
    """

    place: str
    arguments: tuple[str, ...]
    weight_bytes: int

    def load(self) -> Peer:
        """The peer itself.

        Raises:
            ImportError: the tool is not installed.
        """
        module, _, name = self.place.partition(":")
        peer: Peer = getattr(importlib.import_module(f"tools.{module}"), name)(*self.arguments)
        return peer


AUTO = "optc auto"
PEERS = {
    "eager fp32": Entry("pytorch:Eager", ("fp32",), 0),
    "eager bf16": Entry("pytorch:Eager", ("bf16",), 2),
    "torch.compile fp32": Entry("pytorch:Compiled", ("fp32",), 4),
    "torch.compile bf16": Entry("pytorch:Compiled", ("bf16",), 2),
    "torchao int8": Entry("torchao_int8:TorchaoInt8", (), 1),
    "torchao int8 bf16": Entry("torchao_int8:TorchaoInt8Bfloat16", (), 1),
    "onnxruntime fp32": Entry("onnx_runtime:Float32", (), 4),
    "onnxruntime int8": Entry("onnx_runtime:StaticInt8", (), 1),
    "onnxruntime int8 per tensor": Entry("onnx_runtime:StaticInt8PerTensor", (), 1),
    "openvino f32": Entry("open_vino:Float", ("f32",), 4),
    "openvino bf16": Entry("open_vino:Float", ("bf16",), 2),
    "openvino nncf int8": Entry("open_vino:NncfInt8", (), 1),
    "openvino nncf int8 mixed": Entry("open_vino:NncfInt8Mixed", (), 1),
    "olive int8": Entry("olive_int8:OliveInt8", (), 1),
    AUTO: Entry("optc_itself:Optc", ("auto",), 2),
}


def is_optc(name: str) -> bool:
    """Whether a name stands for optc rather than for a peer of it."""
    return name.startswith("optc ")
