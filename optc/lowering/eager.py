"""The ``eager`` backend: PyTorch's own operators, one by one, with the composites' fused kernels.

On CPU every convolution and linear layer becomes one oneDNN primitive whose weights are laid out once, at load. On CUDA
composites run cuDNN's fused convolution where it has one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from optc.errors import BackendError
from optc.lowering.agreement import as_array, check_agreement
from optc.lowering.backend import Array, Backend, Lowered, Runner
from optc.lowering.eager_times import kernel_times
from optc.lowering.graph_file import read_graph, refuse_unwritable, write_graph
from optc.lowering.inputs import check_inputs, described
from optc.lowering.kernel_times import KernelTime
from optc.lowering.prepack import LAYERS, prepack
from optc.lowering.tf32 import without_tf32
from optc.lowering.torch_memory import TorchOptions, keep_freed_memory, return_freed_memory
from optc.ops import COMPOSITES, cuda
from optc.program import Program, complete_meta
from optc.rewrite import add_constant, arguments, calls, constant_of, is_dequantize, is_quantize, label, replace
from optc.target import Target

aten = torch.ops.aten
_PRODUCTS = {
    *LAYERS,
    aten.conv1d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv_transpose2d.input,
    aten.convolution.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.scaled_dot_product_attention.default,
}
"""Operators that do a model's arithmetic: what their precision is, the model's is."""


class EagerBackend(Backend):
    """Runs the graph in eager PyTorch. Composites keep their kernels; explicit quantization is simulated in float."""

    name = "eager"
    summary = "PyTorch eager with fused kernels: oneDNN on CPU, cuDNN on GPU."
    Options = TorchOptions

    @classmethod
    def unavailable(cls, target: Target) -> str | None:
        """Why PyTorch cannot run on the target's device."""
        if target.device == "cpu" or (target.device == "cuda" and torch.cuda.is_available()):
            return None
        if target.device == "cuda":
            return "this PyTorch sees no GPU: install a CUDA build of torch and NVIDIA's driver"
        return f"the eager backend runs on cpu or cuda, not on '{target.device}'"

    @classmethod
    def simulates_quantization(cls, target: Target) -> bool:
        """PyTorch has no kernels of explicit quantization."""
        return True

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        """Write ``graph.json`` and ``weights.safetensors``, and compare what the kernels compute with the graph.

        ``details["not_onednn"]`` has the layers without a oneDNN primitive on a CPU, ``details["not_cudnn"]`` the
        composites without a fused kernel on CUDA, with reasons, if there are any.

        Raises:
            BackendError: the graph holds something that is not a call of a PyTorch operator, or the outputs on the
                example inputs differ from the graph's.
        """
        refuse_unwritable(program, "the eager backend cannot write")
        files = write_graph(program, folder)
        composites = Counter(str(node.target) for node in program.graph.nodes if node.target in COMPOSITES)
        operators = sum(node.op == "call_function" for node in program.graph.nodes)
        details: dict[str, Any] = {
            "operators": operators,
            "composites": dict(composites),
            "no_run_script": "eager artifacts run inside optc: optc.load(folder)",
        }
        runner = self.load(folder, files, target)
        if isinstance(runner, EagerRunner) and runner.left:
            labels = {node.name: label(node) for node in program.graph.nodes}
            library = "onednn" if target.device == "cpu" else "cudnn"
            details[f"not_{library}"] = {labels.get(name, name): reason for name, reason in runner.left.items()}
        details["check"] = check_agreement(self.name, program, runner, target.batch).details()
        runner.close()
        return Lowered(files, details, provider=runner.provider, precision=runner.precision)

    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> Runner:
        """Read the graph, resolve its operators and lay weights out for the target.

        Raises:
            BackendError: the files are unreadable or call operators that are not registered.
        """
        reason = self.unavailable(target)
        if reason:
            raise BackendError(reason)
        if target.device == "cpu" and self.options(target).keep_memory:
            keep_freed_memory()
        return EagerRunner(read_graph(folder, target.batch, target.device), target)

    def profile(
        self, folder: Path, files: tuple[str, ...], target: Target, inputs: Sequence[Array]
    ) -> list[KernelTime]:
        """How long each operator takes, by torch.profiler.

        Raises:
            BackendError: as :meth:`load`.
        """
        runner = self.load(folder, files, target)
        assert isinstance(runner, EagerRunner)
        return runner.profile(inputs)


class EagerRunner(Runner):
    """A graph in eager PyTorch. Takes the program over: its weights are repacked in place.

    Attributes:
        left: by the names of their nodes, why layers did not get a oneDNN primitive, or on CUDA why composites are
            computed by their parts.
    """

    def __init__(self, program: Program, target: Target) -> None:
        self.precision = _precision(program)
        self.left: dict[str, str] = {}
        self._device = torch.device(target.device)
        self._threads = target.threads
        self._dtypes = [example.dtype for example in program.example_inputs]
        self._inputs = described(program)
        library = "cuDNN"
        if self._device.type == "cpu":
            _dequantize_weights(program)
            packed = prepack(program)
            self.left = packed.left
            library = f"oneDNN: {packed.layers} of {packed.layers + len(packed.left)} layers"
        elif self._device.type == "cuda":
            self.left = _decomposed_on_cuda(program)
        self.provider = f"eager {target.device} ({library})"
        self._graph: fx.GraphModule | None = program.module.to(self._device)

    @property
    def _module(self) -> fx.GraphModule:
        if self._graph is None:
            raise BackendError("this runner is closed", "load the model again")
        return self._graph

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        check_inputs(inputs, self._inputs)
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode(), without_tf32(self._device):
            tensors = [_tensor(array, dtype, self._device) for array, dtype in zip(inputs, self._dtypes, strict=True)]
            outputs: tuple[Tensor, ...] = self._module(*tensors)
            return tuple(as_array(output) for output in outputs)

    def run_tensors(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run one query; the outputs stay on the device, in the graph's types."""
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode(), without_tf32(self._device):
            tensors = [
                each.to(self._device, dtype).contiguous() for each, dtype in zip(inputs, self._dtypes, strict=True)
            ]
            outputs: tuple[Tensor, ...] = self._module(*tensors)
        return outputs

    def profile(self, inputs: Sequence[Array]) -> list[KernelTime]:
        """How long each operator takes for a query of ``inputs``, by torch.profiler."""
        torch.set_num_threads(self._threads)
        tensors = [_tensor(array, dtype, self._device) for array, dtype in zip(inputs, self._dtypes, strict=True)]
        with without_tf32(self._device):
            return kernel_times(self._module, tensors)

    def close(self) -> None:
        """Free the weights."""
        self._graph = None
        return_freed_memory()


def _tensor(array: Array, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The array as a tensor, sharing its memory where PyTorch can."""
    if not (array.flags.writeable and array.flags.c_contiguous):
        array = np.array(array, order="C")
    return torch.from_numpy(array).to(device, dtype)


@torch.no_grad()
def _dequantize_weights(program: Program) -> None:
    """Evaluate, in place, each dequantization of constants: the layer it feeds then has a constant weight to pack."""
    for node in list(program.graph.nodes):
        operands = node.all_input_nodes
        if not is_dequantize(node):
            continue
        values: dict[fx.Node, Any] = {operand: constant_of(program, operand) for operand in operands}
        if all(value is not None for value in values.values()):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            replace(node, add_constant(program, node, f"{node.name}_constant", node.target(*args, **kwargs)))
    for node in reversed(program.graph.find_nodes(op="get_attr")):
        if not node.users:
            program.graph.erase_node(node)
    complete_meta(program)


def _decomposed_on_cuda(program: Program) -> dict[str, str]:
    """The composites that have no fused kernel on CUDA, by the names of their nodes, with reasons."""
    found = {}
    for node in calls(program, *COMPOSITES):
        fakes = fx.map_arg(arguments(node), lambda n: n.meta["val"])
        if reason := cuda.why_decomposed(COMPOSITES[node.target], fakes):  # type: ignore[index]
            found[node.name] = reason
    return found


def _precision(program: Program) -> str:
    """What a model's layers compute in: ``"float32"``, or each type with its share of the layers."""
    found = Counter(
        str(node.meta["val"].dtype).removeprefix("torch.") for node in program.graph.nodes if node.target in _PRODUCTS
    )
    if not found:
        return "no convolution or matrix product"
    total = found.total()
    names = [name if len(found) == 1 else f"{name} ({count} of {total} layers)" for name, count in found.most_common()]
    text = ", ".join(names)
    quantized = sum(map(is_quantize, program.graph.nodes))
    return f"{text}, simulating {quantized} quantizations" if quantized else text
