"""The ``onnxruntime`` backend: an ONNX file, run by ONNX Runtime."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from optc.errors import BackendError
from optc.lowering.backend import Array, Backend, Lowered, Runner
from optc.lowering.layer_precision import layer_precision
from optc.target import Target

if TYPE_CHECKING:
    from optc.lowering.agreement import Agreement
    from optc.program import Program

MODEL_FILE = "model.onnx"
RUN_SCRIPT = Path(__file__).with_name("run_onnxruntime.py")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ERRORS_ONLY = 3
_TYPES = {
    "float": "float32",
    "double": "float64",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "uint8": "int8",
    "int8": "int8",
}
_INT4_KERNELS = ("MatMulNBits",)


class OnnxRuntimeBackend(Backend):
    """Lowers to ONNX with explicit QuantizeLinear/DequantizeLinear, which ONNX Runtime turns into integer kernels."""

    name = "onnxruntime"
    summary = "ONNX Runtime on CPU: one portable .onnx file."

    @classmethod
    def unavailable(cls, target: Target) -> str | None:
        """Why the execution provider for the target's device is missing, with the mend."""
        provider = PROVIDERS.get(target.device)
        if provider is None:
            return f"onnxruntime runs on {' or '.join(PROVIDERS)}, not on '{target.device}'"
        if provider not in ort.get_available_providers():
            return f"the installed onnxruntime has no {provider}: pip install 'optc[gpu]'"
        return None

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        """Write ``model.onnx`` (and ``model.onnx.data``), check it, and compare what it computes with the graph.

        Raises:
            BackendError: an operator has no ONNX form, onnx.checker refuses the file, or ONNX Runtime's outputs on the
                example inputs differ from the graph's.
        """
        from optc.lowering.onnx_export import export_onnx

        files, details = export_onnx(program, folder / MODEL_FILE)
        details["check"] = _check(program, folder / MODEL_FILE, target).details()
        return Lowered(files, details, run_script=RUN_SCRIPT.read_text())

    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> Runner:
        """Load the file into a session.

        Raises:
            BackendError: ONNX Runtime refuses the file or does not run on the target's device.
        """
        return OnnxRuntimeRunner(folder / files[0], target)


class OnnxRuntimeRunner(Runner):
    """A session over one ONNX file.

    Provider and precision are read back: the provider from the session, the precision from the kernels that ran one
    profiled query of zeros while loading.
    """

    def __init__(self, path: Path, target: Target) -> None:
        with tempfile.TemporaryDirectory(prefix="optc-ort-") as scratch:
            options = session_options(target)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(scratch) / "profile")
            session = open_session(path, target, options)
            self._inputs = [value.name for value in session.get_inputs()]
            feed = {value.name: _zeros(value) for value in session.get_inputs()}
            try:
                session.run(None, feed)
            except Exception as error:
                raise BackendError(f"onnxruntime cannot run {path.name}: {_first_line(error)}") from error
            events = json.loads(Path(session.end_profiling()).read_bytes())
        self._session: ort.InferenceSession | None = session
        self.provider = f"onnxruntime {session.get_providers()[0]}"
        self.precision = precision(events)

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        """Run one query: arrays in the order of the model's inputs, any batch size where the batch is dynamic."""
        if self._session is None:
            raise BackendError("this runner is closed", "load the model again")
        return tuple(self._session.run(None, dict(zip(self._inputs, inputs, strict=True))))

    def close(self) -> None:
        """Free the session."""
        self._session = None


def session_options(target: Target) -> ort.SessionOptions:
    """Options every session runs with: the target's threads, all graph optimizations, no spinning.

    Idle worker threads do not spin. Spinning burns 35 to 47 ms of CPU time after each call, which slows whatever else
    runs (a second model, the caller's own preprocessing); on two quiet cores AlexNet took 12.2 ms at the median with
    and without it, and with other work on the cores ViT-Tiny took 88 ms spinning and 47 ms not.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = target.threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def open_session(path: Path, target: Target, options: ort.SessionOptions) -> ort.InferenceSession:
    """A session on the target's device; no silent fallback to another.

    Raises:
        BackendError: ONNX Runtime refuses the file, or gave another execution provider than asked for.
    """
    wanted = PROVIDERS[target.device]
    try:
        session = ort.InferenceSession(str(path), options, providers=[wanted])
    except Exception as error:
        raise _no_kernel(path, wanted, error) or BackendError(
            f"onnxruntime refuses {path.name}: {_first_line(error)}"
        ) from error
    if session.get_providers()[0] != wanted:
        raise BackendError(
            f"onnxruntime fell back from {wanted} to {session.get_providers()[0]}",
            "see 'optc doctor' for what is missing, or use the device 'cpu'",
        )
    return session


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


def precision(events: Sequence[Mapping[str, Any]]) -> str:
    """What the arithmetic ran in, from a profile: ``"float32"`` or ``"int8 (7 of 8 layers, 1 float32)"``.

    Counted are convolutions and matrix products with weights, by the type their kernel read.
    """
    layers: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time"):
            kind = _kernel_type(event["args"])
            (layers if _is_layer(event["args"]) else others)[kind] += 1
    counts = layers or others
    counts.pop("", None)
    return layer_precision(counts)


def _is_layer(args: Mapping[str, Any]) -> bool:
    """Whether a kernel is a convolution or matrix product with weights. Prepacked weights are no inputs any more."""
    kernel = args["op_name"]
    if "Conv" in kernel or "Gemm" in kernel or kernel in _INT4_KERNELS:
        return True
    if "MatMul" not in kernel:
        return False
    shapes = [shape for typed in args["input_type_shape"] for shape in typed.values() if len(shape) > 1]
    return len(shapes) < 2 or int(args["parameter_size"]) >= math.prod(shapes[1])


def _kernel_type(args: Mapping[str, Any]) -> str:
    if args["op_name"] in _INT4_KERNELS:
        return "int4"
    for typed in args["input_type_shape"]:
        return _TYPES.get(next(iter(typed)), "")
    return ""


def _check(program: Program, path: Path, target: Target) -> Agreement:
    """Compare ONNX Runtime's outputs with the graph's; if they differ, say whether its integer kernels are to blame."""
    from optc.lowering.agreement import check_agreement

    def compare(options: ort.SessionOptions) -> Agreement:
        session = open_session(path, target, options)
        names = [value.name for value in session.get_inputs()]
        return check_agreement(
            "onnxruntime", program, lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))
        )

    try:
        return compare(session_options(target))
    except BackendError as error:
        plain = session_options(target)
        plain.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            compare(plain)
        except BackendError:
            raise error from None
        raise BackendError(
            f"{error.message}; without its integer kernels it computes the same",
            "this CPU's integer kernels are not exact for this model: use fewer quantized layers or another backend",
        ) from error


def _zeros(value: Any) -> Array:
    """One sample of zeros for a session's input; dynamic dimensions become 1."""
    shape = [size if isinstance(size, int) else 1 for size in value.shape]
    dtype = {"tensor(float)": "float32", "tensor(double)": "float64"}.get(value.type, value.type[len("tensor(") : -1])
    return np.zeros(shape, np.dtype(dtype))


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
