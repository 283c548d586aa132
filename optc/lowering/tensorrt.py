"""The ``tensorrt`` backend: one TensorRT engine, built by Torch-TensorRT for the GPU at hand."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext, suppress
from ctypes.util import find_library
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from optc.errors import BackendError
from optc.lowering.agreement import check_agreement
from optc.lowering.backend import Backend, Lowered, Runner
from optc.lowering.graph_file import read_graph, refuse_unwritable, write_graph
from optc.lowering.inputs import described
from optc.lowering.prepack import LAYERS
from optc.lowering.tensorrt_build import build_engine, dry_run, export, largest_batch, refuse_partition
from optc.lowering.tensorrt_engine import ENGINE, FACTS, TensorRtRunner
from optc.lowering.tensorrt_quant import (
    PIP_MODELOPT,
    plain_kernels,
    quantize_op,
    quantize_ops,
    tensorrt_form,
)
from optc.program import Program
from optc.rewrite import argument, is_dequantize, is_quantized, label
from optc.target import Target

RUN_SCRIPT = Path(__file__).with_name("run_tensorrt.py")
FIRST_VERSION = (2, 13)
"""The first Torch-TensorRT whose networks are always strongly typed: TensorRT 11 has no other kind, and the options
``enabled_precisions`` and ``use_explicit_typing`` of earlier ones are gone."""


class TensorRtBackend(Backend):
    """Builds one strongly typed engine: every operator runs in the type the graph gives it, Q/DQ included.

    A model that TensorRT does not take as a whole is refused, with the operators and reasons: a partitioned one could
    only be saved as a ``.pt2`` file that is unpickled when it is loaded.
    """

    name = "tensorrt"
    summary = "NVIDIA TensorRT through Torch-TensorRT: one strongly typed engine for the GPU at hand."

    @classmethod
    def unavailable(cls, target: Target) -> str | None:
        """What is missing, with the pip line. Imports nothing of NVIDIA's."""
        major, minor = torch.__version__.split(".")[:2]
        if (int(major), int(minor)) < FIRST_VERSION:
            first = ".".join(map(str, FIRST_VERSION))
            return f"strongly typed networks need torch {first} or newer, this is torch {torch.__version__}"
        packages = f"'torch-tensorrt=={major}.{minor}.*' {PIP_MODELOPT.removeprefix('pip install ')}"
        pip = f"pip install {packages} --extra-index-url https://pypi.nvidia.com"
        if importlib.util.find_spec("torch_tensorrt") is None:
            return f"Torch-TensorRT is not installed, and it needs an NVIDIA GPU: {pip}"
        version = importlib.metadata.version("torch-tensorrt")
        if tuple(map(int, version.split(".")[:2])) < FIRST_VERSION:
            return f"Torch-TensorRT {version} is too old, its networks are not strongly typed: {pip}"
        if library_missing():
            return f"TensorRT's library (libnvinfer) is missing, PyPI has only stubs of it: {pip}"
        if target.device != "cuda":
            return f"TensorRT runs on cuda, not on '{target.device}'"
        if not torch.cuda.is_available():
            return "this PyTorch sees no GPU: install a CUDA build of torch and NVIDIA's driver"
        return None

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        """Build ``model.engine``, write ``engine.json`` beside it, and compare what the engine computes with the graph.

        ``details["engines"]`` is 1 and ``details["not_tensorrt"]`` empty: what Torch-TensorRT's dry run leaves to
        PyTorch is refused.

        Raises:
            BackendError: an operator cannot be written or is none of TensorRT's (names each, with the reason), the
                quantization is not symmetric int8, modelopt is missing for a quantized program, TensorRT fails to
                build, or the outputs on the example inputs differ from the graph's.
        """
        refuse_unwritable(program, "the tensorrt backend cannot take")
        form = tensorrt_form(program)
        layers = layer_types(form)
        quantized = is_quantized(form)
        # Before torch_tensorrt is first imported, which registers its converter only if it finds modelopt.
        with nullcontext() if quantized else suppress(BackendError):
            quantize_op()
        with ExitStack() as stack:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="optc-tensorrt-", dir=folder))
            if quantized:
                stack.enter_context(plain_kernels())
            write_graph(form, Path(scratch))
            # 0 and 1 would be taken for constants of a dynamic batch.
            moved = read_graph(Path(scratch), max(2, target.batch), "cuda")
            exported = export(quantize_ops(moved) if quantized else moved, target)
            rows, engines = dry_run(exported, moved, target)
            labels = {node.name: label(node) for node in form.graph.nodes}
            rows = [{**row, "layer": labels.get(row["layer"], row["layer"])} for row in rows]
            if rows or engines != 1:
                raise refuse_partition(rows, engines)
            engine = build_engine(exported, moved, target, Path(scratch))
        (folder / ENGINE).write_bytes(engine)
        (folder / FACTS).write_text(json.dumps(_facts(program, target, layers)), encoding="utf-8")
        runner = self.load(folder, (ENGINE, FACTS), target)
        details = {
            "engines": engines,
            "not_tensorrt": {row["layer"]: row["reason"] for row in rows},
            "layers": layers,
            "tf32": False,
            "check": check_agreement(self.name, _fitting(program, target), runner, target.batch).details(),
        }
        runner.close()
        script, provider, precision = RUN_SCRIPT.read_text(), runner.provider, runner.precision
        return Lowered((ENGINE, FACTS), details, script, provider=provider, precision=precision)

    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> Runner:
        """Deserialize the engine with TensorRT's runtime; nothing is unpickled.

        Raises:
            BackendError: it was built by another TensorRT or for another GPU, or TensorRT refuses it.
        """
        reason = self.unavailable(target)
        if reason:
            raise BackendError(reason)
        return TensorRtRunner(folder, files, target)


def library_missing() -> bool:
    """Whether libnvinfer is neither installed with pip nor by the system: wheels on PyPI hold the Python side alone."""
    return importlib.util.find_spec("tensorrt_libs") is None and find_library("nvinfer") is None


def layer_types(form: Program) -> dict[str, int]:
    """How many convolutions and linear layers the graph has in each type; int8 where both operands are dequantized.

    A strongly typed engine computes in these types; TensorRT keeps no record of them in an engine to read back.
    """
    counts: Counter[str] = Counter()
    for node in form.graph.nodes:
        if node.target in LAYERS:
            sources = [argument(node, name) for name in ("input", "weight")]
            int8 = all(is_dequantize(source) for source in sources)
            counts["int8" if int8 else str(node.meta["val"].dtype).removeprefix("torch.")] += 1
    return dict(counts)


def _fitting(program: Program, target: Target) -> Program:
    """The program with no more example samples than its engine takes."""
    if not program.dynamic_batch:
        return program
    most = largest_batch(target)
    return replace(program, example_inputs=tuple(tensor[:most] for tensor in program.example_inputs))


def _facts(program: Program, target: Target, layers: Mapping[str, int]) -> dict[str, Any]:
    import tensorrt

    outputs = [node.meta["val"].dtype for node in program.graph.output_node().args[0]]  # type: ignore[union-attr]
    return {
        "tensorrt": tensorrt.__version__,
        "torch_tensorrt": importlib.metadata.version("torch-tensorrt"),
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "inputs": described(program),
        "outputs": [{"dtype": str(dtype).removeprefix("torch.")} for dtype in outputs],
        "batches": [1, largest_batch(target)] if program.dynamic_batch else None,
        "layers": dict(layers),
    }
