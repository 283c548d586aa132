"""The ``inductor`` backend: machine code that PyTorch's AOTInductor compiles ahead of time, as one ``.pt2`` package."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from optc.errors import BackendError, first_line
from optc.lowering.agreement import as_array, check_agreement
from optc.lowering.backend import Array, Backend, Lowered, Runner
from optc.lowering.graph_file import refuse_unwritable, write_graph
from optc.lowering.inductor_times import kernel_times
from optc.lowering.inputs import check_inputs
from optc.lowering.kernel_times import KernelTime
from optc.lowering.layer_precision import layer_precision
from optc.lowering.tf32 import without_tf32
from optc.lowering.torch_memory import TorchOptions, keep_freed_memory, return_freed_memory
from optc.program import Program
from optc.rewrite import argument, is_call, is_dequantize, is_quantized, label, quantized_attention
from optc.target import Target

PACKAGE, RESULT, FACTS = "model.pt2", "result.json", "optc.json"
RUN_SCRIPT = Path(__file__).with_name("run_inductor.py")
_MEMBER = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|\.data/(version|serialization_id)|extra/optc\.json"
    r"|data/aotinductor/model/[\w.+-]+\.(so|cpp|json|cubin|fatbin))"
)
"""What a package may hold: nothing that a loader of .pt2 files unpickles (weights, example inputs, custom objects)."""
_FACTS = ("torch", "device", "capability", "compiler", "inputs", "layers")


class InductorBackend(Backend):
    """Compiles the graph to C++ (on CUDA: Triton) and oneDNN calls, with weights frozen and laid out for the kernels.

    Explicit quantization reaches oneDNN's int8 kernels on CPU. The package holds machine code: it runs with the torch
    that made it, on CPUs with the instructions it was compiled for.
    """

    name = "inductor"
    summary = "PyTorch's AOTInductor: machine code compiled ahead of time, one .pt2 package."
    Options = TorchOptions

    @classmethod
    def unavailable(cls, target: Target) -> str | None:
        """Which compiler is missing for the target's device, with the mend. Starts none."""
        if target.device not in ("cpu", "cuda"):
            return f"inductor compiles for cpu or cuda, not for '{target.device}'"
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            return f"there is no C++ compiler '{compiler}': apt install g++, or name one in the variable CXX"
        if target.device == "cuda":
            if not torch.cuda.is_available():
                return "this PyTorch sees no GPU: install a CUDA build of torch and NVIDIA's driver"
            if importlib.util.find_spec("triton") is None:
                return "compiling for a GPU needs Triton: pip install triton"
            from torch.utils.cpp_extension import CUDA_HOME

            if CUDA_HOME is None:
                return "compiling for a GPU needs CUDA's headers: install the CUDA toolkit and set CUDA_HOME"
        return None

    @classmethod
    def simulates_quantization(cls, target: Target) -> bool:
        """It has int8 kernels on the CPU alone."""
        return target.device != "cpu"

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        """Compile ``model.pt2`` in a process of its own and compare what it computes with the graph.

        ``details["layers"]`` counts layers by the type they compute in, ``details["kernels"]`` Inductor's operators for
        them; of a quantized program ``details["not_int8"]`` has the layers that compute in float, with reasons.

        Raises:
            BackendError: the graph holds something that is not a call of a PyTorch operator, Inductor or the C++
                compiler fails, or the outputs on the example inputs differ from the graph's.
        """
        with self.started(program, target, folder) as finish:
            return finish()

    @contextmanager
    def started(self, program: Program, target: Target, folder: Path) -> Iterator[Callable[[], Lowered]]:
        """Start to compile in a process of its own; leaving the context before it is done stops it."""
        refuse_unwritable(program, "the inductor backend cannot compile")
        with tempfile.TemporaryDirectory(prefix="optc-inductor-", dir=folder) as scratch:
            write_graph(program, Path(scratch))
            with _compiling(Path(scratch), target) as process:
                yield lambda: self._finish(program, target, folder, process, Path(scratch))

    def _finish(
        self, program: Program, target: Target, folder: Path, process: subprocess.Popen[bytes], scratch: Path
    ) -> Lowered:
        result = _result(process, scratch)
        Path(scratch, PACKAGE).rename(folder / PACKAGE)
        details: dict[str, Any] = {"layers": result["layers"], "kernels": result["kernels"]}
        if is_quantized(program):
            details["not_int8"] = _not_int8(program, result["unquantized"], target)
        runner = self.load(folder, (PACKAGE,), target)
        details["check"] = check_agreement(self.name, program, runner, target.batch).details()
        runner.close()
        script, isa = _run_script(self.options(target)), tuple(result["required_isa"])
        return Lowered((PACKAGE,), details, script, isa, runner.provider, runner.precision)

    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> Runner:
        """Load the package's machine code; nothing in it is unpickled.

        Raises:
            BackendError: the file is no such package, holds more than compiled code, or was made by another torch or
                for another device.
        """
        if target.device == "cpu" and self.options(target).keep_memory:
            keep_freed_memory()
        return InductorRunner(folder / files[0], target)

    def profile(
        self, folder: Path, files: tuple[str, ...], target: Target, inputs: Sequence[Array]
    ) -> list[KernelTime]:
        """How long each kernel takes, by PyTorch's profiler.

        Raises:
            BackendError: as :meth:`load`; or the package does not say what its kernels compute.
        """
        kernels = read_facts(folder / files[0]).get("kernels")
        if not kernels:
            raise BackendError("the package does not say what its kernels compute", "optimize the model again on a CPU")
        runner = self.load(folder, files, target)
        try:
            return kernel_times(lambda: runner(*inputs), kernels)
        finally:
            runner.close()


class InductorRunner(Runner):
    """A loaded package. Inputs are checked here: the compiled code would read beyond an array that is too small."""

    def __init__(self, path: Path, target: Target) -> None:
        facts = read_facts(path)
        _refuse_others(path, facts, target)
        self._inputs: list[dict[str, Any]] = facts["inputs"]
        self._device, self._threads = torch.device(target.device), target.threads
        self.provider = f"inductor {target.device} (AOT, {facts['compiler']})"
        self.precision = layer_precision(facts["layers"])
        try:
            # Not torch._inductor.aoti_load_package, which starts the C++ compiler to see what it would compile for.
            self._loader: torch._C._aoti.AOTIModelPackageLoader | None = torch._C._aoti.AOTIModelPackageLoader(
                str(path), "model", False, 1, -1
            )
        except RuntimeError as error:
            raise BackendError(f"torch cannot load {path.name}: {first_line(error)}") from error

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        """Run one query: arrays in the order of the model's inputs, any batch size where the batch is dynamic."""
        if self._loader is None:
            raise BackendError("this runner is closed", "load the model again")
        check_inputs(inputs, self._inputs)
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        tensors = [self._tensor(array, entry["dtype"]) for array, entry in zip(inputs, self._inputs, strict=True)]
        with torch.inference_mode(), without_tf32(self._device):
            return tuple(as_array(output) for output in self._loader.boxed_run(tensors))

    def run_tensors(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run one query; the outputs stay on the device, in the graph's types."""
        if self._loader is None:
            raise BackendError("this runner is closed", "load the model again")
        check_inputs(inputs, self._inputs)
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        tensors = [
            each.to(self._device, getattr(torch, entry["dtype"])).contiguous()
            for each, entry in zip(inputs, self._inputs, strict=True)
        ]
        with torch.inference_mode(), without_tf32(self._device):
            return tuple(self._loader.boxed_run(tensors))

    def _tensor(self, array: Array, dtype: str) -> Tensor:
        if not (array.flags.writeable and array.flags.c_contiguous):
            array = np.array(array, order="C")
        return torch.from_numpy(array).to(self._device, getattr(torch, dtype))

    def close(self) -> None:
        """Unload the code and its weights."""
        self._loader = None
        return_freed_memory()


def _run_script(given: TorchOptions) -> str:
    """``run.py``, keeping freed memory or not."""
    return RUN_SCRIPT.read_text(encoding="utf-8").replace("= True", f"= {given.keep_memory}", 1)


def read_facts(path: Path) -> dict[str, Any]:
    """What a package says it was compiled for: torch, device, compiler, inputs, types of the layers.

    Raises:
        BackendError: it is no package of this backend, or holds a member that loading might unpickle.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            strange = next((name for name in names if not _MEMBER.fullmatch(name) or names.count(name) > 1), None)
            if strange:
                raise BackendError(f"{path.name} holds '{strange}' beside its code", "optimize the model again")
            inside = next(name for name in names if name.endswith(f"/{FACTS}"))
            facts: dict[str, Any] = json.loads(archive.read(inside))
            if missing := [name for name in _FACTS if name not in facts]:
                raise ValueError(f"it does not say {', '.join(missing)}")
            return facts
    except (OSError, zipfile.BadZipFile, zlib.error, ValueError, TypeError, RuntimeError, StopIteration) as error:
        reason = str(error) or "it does not say what it was compiled for"
        raise BackendError(f"{path.name} is no readable inductor package: {reason}", "optimize it again") from error


def _refuse_others(path: Path, facts: Mapping[str, Any], target: Target) -> None:
    """Refuse what another torch made, or what was made for another device."""
    again = "optimize the model again here"
    if facts["torch"] != torch.__version__:
        raise BackendError(f"{path.name} was compiled with torch {facts['torch']}, this is {torch.__version__}", again)
    made, here = facts.get("architecture", platform.machine()), platform.machine()
    if made != here:
        raise BackendError(f"{path.name} was compiled for {made}, this is {here}", again)
    if facts["device"] != target.device:
        raise BackendError(f"{path.name} was compiled for {facts['device']}, not for {target.device}", again)
    if target.device == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            f"{path.name} was compiled for a GPU, and this PyTorch sees none", "run it where there is one"
        )
    if target.device == "cuda" and tuple(facts["capability"]) != torch.cuda.get_device_capability():
        made, here = (f"{major}.{minor}" for major, minor in (facts["capability"], torch.cuda.get_device_capability()))
        raise BackendError(f"{path.name} was compiled for compute capability {made}, this GPU has {here}", again)


@contextmanager
def _compiling(folder: Path, target: Target) -> Iterator[subprocess.Popen[bytes]]:
    """:mod:`optc.lowering.inductor_compile` at work on a folder; the end of the context stops it and its compilers."""
    command = [sys.executable, "-P", "-m", "optc.lowering.inductor_compile", str(folder), json.dumps(asdict(target))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            _stop(process)
        elif process.returncode:
            with suppress(ProcessLookupError):  # compilers that it left behind
                os.killpg(process.pid, signal.SIGKILL)


def _result(process: subprocess.Popen[bytes], folder: Path) -> dict[str, Any]:
    """Wait for the compiling process and read what it says.

    Raises:
        BackendError: it failed; has its reason.
    """
    status = process.wait()
    try:
        result: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        said = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        raise BackendError(
            f"the compiling process {how}: {said[-1] if said else 'it said nothing'}",
            "is there enough memory?" if status == -signal.SIGKILL else "",
            passing=status < 0,
        ) from None
    if "error" in result:
        # Another compiler, or what this one lacked, may be there next time.
        raise BackendError(
            f"inductor cannot compile the model: {result['error']}", passing=bool(result.get("compiler"))
        )
    return result


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the process and its compilers, which remove what they have half written; kill what does not end."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _not_int8(program: Program, names: Sequence[str], target: Target) -> dict[str, str]:
    """Each layer of a quantized program that computes in float, with the reason."""
    nodes = {node.name: node for node in program.graph.nodes}
    found = {label(nodes[name]) if name in nodes else name: _why_float(nodes.get(name), target) for name in names}
    attention = (
        "Inductor has no int8 kernel for attention: its queries and keys are rounded, and computed with in float"
    )
    return found | {label(node): attention for node in quantized_attention(program)}


def _why_float(layer: fx.Node | None, target: Target) -> str:
    if target.device == "cuda":
        return "Inductor has no int8 kernels on CUDA"
    if layer is not None:
        if is_call(argument(layer, "weight"), torch.ops.quantized_decomposed.dequantize_per_channel_group.default):
            return "Inductor has no kernels for weights in blocks, which it holds as float32"
        for operand, what in (("input", "input"), ("weight", "weight")):
            if not is_dequantize(argument(layer, operand)):
                return f"its {what} is not quantized in the graph"
    return "Inductor found no oneDNN int8 kernel for it"
