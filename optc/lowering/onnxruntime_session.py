"""ONNX Runtime's sessions: with what options they run, and how they are opened."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import onnxruntime as ort
from pydantic import Field

from optc.errors import BackendError, first_line
from optc.lowering.backend import BackendOptions
from optc.target import Target

OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}
"""By provider. float32 in the graph is float32: the CUDA provider's default is TF32, with 10 bits of 23."""
ON_CUDA = frozenset(("CUDAExecutionProvider", "TensorrtExecutionProvider"))
_ERRORS_ONLY = 3
LEVELS = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "layout": ort.GraphOptimizationLevel.ORT_ENABLE_LAYOUT,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
"""ONNX Runtime's levels of graph optimization by the names that the option has for them."""


class OnnxRuntimeOptions(BackendOptions):
    """Options of ``onnxruntime``; ``benchmarks/ort_options.py`` measures the defaults against the others."""

    optimization: Literal["none", "basic", "extended", "layout", "all"] = Field(
        "all", description="ONNX Runtime's graph optimizations, up to this level"
    )
    spin_us: int = Field(
        1000,
        ge=0,
        description="microseconds that idle workers stay awake for more work, within a call and after it; 0 lets them"
        " sleep at once",
    )
    io_binding: bool = Field(False, description="bind inputs and outputs in place of handing them over at each call")


def session_options(target: Target, given: OnnxRuntimeOptions) -> ort.SessionOptions:
    """The session's options: the target's threads, and those of the backend.

    Their defaults were measured (``python benchmarks/ort_options.py``; two cores, AMD Zen 5). Within a call idle
    workers spin: sleeping at once costs more the smaller the nodes are, up to half as much again (MobileNetV3-Small).
    After the last call they go on for a millisecond, so that calls one after another find them awake; in 50 ms of it
    they burn 65 to 90 ms of CPU time after each call, which slows whatever else runs (a second model, the caller's own
    preprocessing). Old versions do not know the option and spin on. Of the optimizations those of layout (``layout``
    and ``all``) matter: without them convolutional networks took 1.15 to 2.5 times as long, ViT-Tiny no longer. Binding
    inputs and outputs gained nothing on the CPU, where ``run`` reads the caller's arrays in place.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = target.threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = LEVELS[given.optimization]
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if given.spin_us else "0")
    if given.spin_us:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(given.spin_us))
    return options


def open_session(
    path: Path, providers: Sequence[str], options: ort.SessionOptions, target: Target
) -> ort.InferenceSession:
    """A session on the execution providers in this order; ONNX Runtime adds the CPU's, for what they cannot run.

    Its Python package would also try again on the CPU where a provider fails, and say so on stdout: not here.

    Raises:
        BackendError: ONNX Runtime refuses the file, or the first provider does not start and the target does not allow
            another in its place.
    """
    preload(providers)
    device = _current_device()
    given = [(name, OPTIONS.get(name, {}) | (device if name in ON_CUDA else {})) for name in providers]
    try:
        session = ort.InferenceSession(str(path), options, providers=given, enable_fallback=0)
    except Exception as error:
        raise _no_kernel(path, providers[0], error) or BackendError(
            f"onnxruntime refuses {path.name}: {first_line(error)}"
        ) from error
    if session.get_providers()[0] != providers[0] and not target.allow_fallback:
        raise BackendError(
            f"onnxruntime's {providers[0]} does not start, {session.get_providers()[0]} does",
            "see 'optc doctor' for what is missing, or use the device 'cpu'",
        )
    return session


def preload(providers: Sequence[str]) -> None:
    """Load what providers on a GPU need where it was installed with pip: ONNX Runtime looks for it elsewhere only."""
    if ON_CUDA.isdisjoint(providers):
        return
    if hasattr(ort, "preload_dlls"):  # since 1.21
        with contextlib.redirect_stdout(io.StringIO()):  # what cannot be loaded shows when the session is opened
            ort.preload_dlls()
    if "TensorrtExecutionProvider" in providers:
        with contextlib.suppress(ImportError):
            importlib.import_module("tensorrt")


def _current_device() -> dict[str, str]:
    """PyTorch's current GPU as an option of a provider; nothing where PyTorch is not in use: the first one then."""
    torch = sys.modules.get("torch")
    return {"device_id": str(torch.cuda.current_device())} if torch and torch.cuda.is_available() else {}


def _no_kernel(path: Path, provider: str, error: Exception) -> BackendError | None:
    """The error of an operator the provider has no kernel for in this type, or ``None`` if it is another one."""
    missing = re.search(r"Could not find an implementation for (\w+)\(\d+\) node with name '([^']*)'", str(error))
    if missing is None:
        return None
    import onnx

    operator, name = missing.groups()
    graph = onnx.load(path, load_external_data=False).graph
    types = {weight.name: weight.data_type for weight in graph.initializer}
    found = [types[i] for node in graph.node if node.name == name for i in node.input if i in types]
    kind = f" in {onnx.TensorProto.DataType.Name(found[0]).lower()}" if found else " in the type it has here"
    return BackendError(
        f"onnxruntime's {provider} has no kernel for operator {operator}{kind} (node '{name}')",
        "use a backend that has one, such as --backend eager, or leave out the pass that chose the type",
    )
