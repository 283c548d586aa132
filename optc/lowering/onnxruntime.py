"""The ``onnxruntime`` backend: an ONNX file, run by ONNX Runtime."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from optc.errors import BackendError, first_line
from optc.lowering.backend import Array, Backend, Lowered, Runner
from optc.lowering.onnxruntime_profile import (
    BLOCK_KERNELS,
    Kernel,
    fallback,
    kernels,
    precision,
    provider_counts,
    refuse_fallback,
)
from optc.lowering.onnxruntime_session import (
    LEVELS,
    OPTIONS,
    OnnxRuntimeOptions,
    open_session,
    session_options,
)
from optc.target import Target

if TYPE_CHECKING:
    from optc.lowering.agreement import Agreement
    from optc.lowering.kernel_times import KernelTime
    from optc.program import Program

MODEL_FILE = "model.onnx"
RUN_SCRIPT = Path(__file__).with_name("run_onnxruntime.py")
PROVIDERS: dict[str, tuple[str, ...]] = {"cpu": ("CPUExecutionProvider",), "cuda": ("CUDAExecutionProvider",)}
"""By device, the execution providers to use, in order: the first is what is asked for. ONNX Runtime adds the CPU's."""


class OnnxRuntimeBackend(Backend):
    """Lowers to ONNX with explicit QuantizeLinear/DequantizeLinear, which ONNX Runtime turns into integer kernels."""

    name = "onnxruntime"
    summary = "ONNX Runtime on CPU or CUDA: one portable .onnx file."
    Options = OnnxRuntimeOptions

    @classmethod
    def providers(cls, device: str) -> Sequence[str]:
        """The execution providers to use on a device, in order; the first is what is asked for. Empty if none is."""
        return PROVIDERS.get(device, ())

    @classmethod
    def unavailable(cls, target: Target) -> str | None:
        """Why the execution provider for the target's device is missing or has no device, with the mend."""
        wanted = cls.providers(target.device)
        if not wanted:
            return f"{cls.name} runs on {' or '.join(filter(cls.providers, PROVIDERS))}, not on '{target.device}'"
        if wanted[0] not in ort.get_available_providers():
            return f"the installed onnxruntime has no {wanted[0]}: pip uninstall onnxruntime && pip install 'optc[gpu]'"
        if target.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                return "this PyTorch sees no GPU: install a CUDA build of torch and NVIDIA's driver"
        return None

    @classmethod
    def simulates_quantization(cls, target: Target) -> bool:
        """The CUDA provider has no integer convolutions or linear layers: it computes them in float."""
        return target.device == "cuda"

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        """Write ``model.onnx`` (and ``model.onnx.data``), check it, and compare what it computes with the graph.

        ``details["providers"]`` counts nodes by the execution provider that ran them, ``details["fallback"]`` lists
        those that another ran than asked for; :func:`optc.lowering.onnxruntime_layers.deviations` adds the rest.

        Raises:
            BackendError: an operator has no ONNX form, onnx.checker refuses the file, the execution provider did not
                run every node and the target does not allow that, or ONNX Runtime's outputs on the example inputs
                differ from the graph's.
        """
        from optc.lowering.onnxruntime_layers import deviations
        from optc.lowering.tensorrt_quant import float_biases

        written = program
        if target.device == "cuda":  # its DequantizeLinear takes no int32
            written = program.fork()
            float_biases(written)
        files, details, runner = self._exported(written, target, folder)
        details["providers"] = provider_counts(runner.kernels)
        details["fallback"] = runner.fallback
        details |= deviations(program, folder / MODEL_FILE, runner.kernels)
        details["check"] = self._check(program, runner, folder / MODEL_FILE, target).details()
        runner.close()
        script = _run_script(self.providers(target.device), self.options(target))
        return Lowered(files, details, script, provider=runner.provider, precision=runner.precision)

    def _exported(
        self, program: Program, target: Target, folder: Path
    ) -> tuple[tuple[str, ...], dict[str, Any], OnnxRuntimeRunner]:
        """The files in the first opset in which every node runs where it is asked to, details, and a session on them.

        Where there is none and the target allows for that, in the first of which ONNX Runtime makes a session.

        Raises:
            BackendError: there is none; says what is wrong with the first.
        """
        errors: dict[Target, BackendError] = {}
        opsets = self.opsets(target.device)
        strict = [replace(target, allow_fallback=False)] if len(opsets) > 1 else []
        for wanted, opset in product(dict.fromkeys((*strict, target)), opsets):
            try:
                files, details = self.export(program, folder / MODEL_FILE, opset)
                return files, details, self.load(folder, files, wanted)
            except BackendError as error:
                errors.setdefault(wanted, error.with_traceback(None))  # which would keep the session
        raise errors[target]

    @classmethod
    def opsets(cls, device: str) -> Sequence[int]:
        """The versions of the ONNX operator set to try, in order.

        Kernels of the CUDA provider are registered for the versions that an operator had then: those of MaxPool,
        QuantizeLinear and others were behind for years (``docs/OperatorKernels.md`` of ONNX Runtime).
        """
        from optc.lowering.onnx_export import LEAST_OPSET, OPSET

        return (OPSET, LEAST_OPSET) if device == "cuda" else (OPSET,)

    def export(self, program: Program, path: Path, opset: int) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Write the ONNX file; returns the names of all files and details.

        Raises:
            BackendError: an operator has no ONNX form, or onnx.checker refuses the file.
        """
        from optc.lowering.onnx_export import export_onnx

        return export_onnx(program, path, opset)

    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> OnnxRuntimeRunner:
        """Load the file into a session.

        Raises:
            BackendError: ONNX Runtime refuses the file, or did not run every node on the target's device and the
                target does not allow that; what it needs for that device is missing.
        """
        reason = None if target.allow_fallback else self.unavailable(target)
        if reason:
            raise BackendError(reason)
        return OnnxRuntimeRunner(folder / files[0], self.providers(target.device), target, self.options(target))

    def profile(
        self, folder: Path, files: tuple[str, ...], target: Target, inputs: Sequence[Array]
    ) -> list[KernelTime]:
        """How long each node takes, by ONNX Runtime's profiler.

        Raises:
            BackendError: ONNX Runtime refuses the file or cannot run it.
        """
        from optc.lowering.onnxruntime_times import kernel_times

        return kernel_times(folder / files[0], self.providers(target.device), target, self.options(target), inputs)

    def _check(self, program: Program, runner: OnnxRuntimeRunner, path: Path, target: Target) -> Agreement:
        """Compare ONNX Runtime's outputs with the graph's; if they differ, say whether integer kernels are to blame."""
        from optc.lowering.agreement import check_agreement

        try:
            return check_agreement(self.name, program, runner, target.batch)
        except BackendError as error:
            plain = session_options(target, self.options(target))
            plain.add_session_config_entry("session.disable_quant_qdq", "1")
            session = open_session(path, self.providers(target.device), plain, target)
            names = [value.name for value in session.get_inputs()]
            try:
                check_agreement(
                    self.name,
                    program,
                    lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True))),
                    target.batch,
                )
            except BackendError:
                raise error from None
            raise BackendError(
                f"{error.message}; without its integer kernels it computes the same",
                "its integer kernels are not exact for this model here: use fewer quantized layers or another backend",
            ) from error


class OnnxRuntimeRunner(Runner):
    """A session over one ONNX file.

    Provider and precision are read back from the kernels that ran one profiled query of zeros while loading.

    Attributes:
        kernels: those that ran.
        fallback: the nodes that another execution provider ran than the one asked for.
    """

    def __init__(self, path: Path, providers: Sequence[str], target: Target, given: OnnxRuntimeOptions) -> None:
        with tempfile.TemporaryDirectory(prefix="optc-ort-") as scratch:
            options = session_options(target, given)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(scratch) / "profile")
            session = open_session(path, providers, options, target)
            self._inputs = [value.name for value in session.get_inputs()]
            feed = {value.name: _zeros(value) for value in session.get_inputs()}
            try:
                session.run(None, feed)
            except Exception as error:
                raise BackendError(
                    f"onnxruntime cannot run {path.name}: {first_line(error)}",
                    "use a backend that runs it, such as --backend eager",
                ) from error
            ran = kernels(json.loads(Path(session.end_profiling()).read_bytes()))
        self.kernels = with_weight_types(ran, path)
        self.fallback = fallback(self.kernels, providers[0])
        if not target.allow_fallback:
            refuse_fallback(self.fallback, self.kernels, providers[0])
        self._session: ort.InferenceSession | None = session
        self._binds = given.io_binding
        self.provider = f"onnxruntime {_who_ran(self.kernels, providers[0], self.fallback)}"
        self.precision = precision(self.kernels)

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        """Run one query: arrays in the order of the model's inputs, any batch size where the batch is dynamic.

        Raises:
            BackendError: the runner is closed, or the inputs are not the model's.
        """
        if self._session is None:
            raise BackendError("this runner is closed", "load the model again")
        if len(inputs) != len(self._inputs):
            raise BackendError(f"the model takes {len(self._inputs)} inputs, not {len(inputs)}")
        try:
            return self._run(self._session, inputs)
        except Exception as error:
            raise BackendError(f"onnxruntime cannot run the model on this: {first_line(error)}") from error

    def _run(self, session: ort.InferenceSession, inputs: Sequence[Array]) -> tuple[Array, ...]:
        if not self._binds:
            return tuple(session.run(None, dict(zip(self._inputs, inputs, strict=True))))
        binding = session.io_binding()  # one for each call: several threads may call
        for name, array in zip(self._inputs, inputs, strict=True):
            binding.bind_cpu_input(name, array)
        for output in session.get_outputs():
            binding.bind_output(output.name)
        session.run_with_iobinding(binding)
        return tuple(binding.copy_outputs_to_cpu())

    def close(self) -> None:
        """Free the session."""
        self._session = None


def with_weight_types(ran: list[Kernel], path: Path) -> list[Kernel]:
    """The kernels; the file is read only where it alone tells the type of weights."""
    if not any(kernel.operator in BLOCK_KERNELS for kernel in ran):
        return ran
    from optc.lowering import onnxruntime_layers

    return onnxruntime_layers.with_weight_types(ran, path)


def _who_ran(ran: Sequence[Kernel], wanted: str, fallen: Sequence[object]) -> str:
    """The provider that was asked for, and where nodes fell back how many each ran."""
    if not fallen:
        return wanted
    return ", ".join(f"{provider} ({count} nodes)" for provider, count in provider_counts(ran).items())


def _run_script(providers: Sequence[str], given: OnnxRuntimeOptions) -> str:
    """The artifact's ``run.py``, on the same execution providers with the same options."""
    text = RUN_SCRIPT.read_text(encoding="utf-8")
    text = text.replace('= "ORT_ENABLE_ALL", 1000', f'= "{LEVELS[given.optimization].name}", {given.spin_us}')
    wanted = ", ".join(f'("{name}", {json.dumps(OPTIONS.get(name, {}))})' for name in providers)
    return text.replace('= [("CPUExecutionProvider", {})]', f"= [{wanted}]")


def _zeros(value: Any) -> Array:
    """One sample of zeros for a session's input; dynamic dimensions become 1."""
    shape = [size if isinstance(size, int) else 1 for size in value.shape]
    dtype = {"tensor(float)": "float32", "tensor(double)": "float64"}.get(value.type, value.type[len("tensor(") : -1])
    return np.zeros(shape, np.dtype(dtype))
