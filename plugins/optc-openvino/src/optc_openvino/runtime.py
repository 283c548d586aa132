"""OpenVINO itself: imported without its telemetry, reading and compiling models, its errors in one line."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from optc import BackendError, BackendOptions, Target, cache_folder

__all__ = [
    "INFERENCE_PRECISION",
    "PARTITIONER",
    "ROUNDED_TOGETHER",
    "VERSION",
    "OpenVinoOptions",
    "compile_model",
    "computes_bfloat16",
    "core",
    "errors",
    "ov",
    "read",
]


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Let ``import openvino_telemetry`` fail, which OpenVINO allows for.

    ``import openvino`` otherwise reports the import to Google Analytics unless the user has opted out, and writes a
    client id to ``~/intel``. The package stays importable afterwards, for whoever wants it.
    """
    name = "openvino_telemetry"
    if name in sys.modules:  # somebody else decided
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


with _without_telemetry():
    import openvino as ov

VERSION = ov.get_version().partition("-")[0]
INFERENCE_PRECISION = ("optc", "inference_precision")
"""Where a model's own information says what its operators in float32 are to be computed in, if not in that."""

PARTITIONER = "TBB_PARTITIONER"
"""OpenVINO's option for how an operator's work is divided among threads: ``"STATIC"`` or ``"AUTO"``."""

ROUNDED_TOGETHER = 64
"""How many inputs of a layer with integer weights alone share a scale, as they are rounded to 8 bits at each call.

ONNX Runtime's MatMulNBits rounds them too. OpenVINO's default is 32, which took longer; larger groups gained nothing.
"""


class OpenVinoOptions(BackendOptions):
    """Options of ``openvino``."""

    hint: Literal["latency", "throughput"] = Field(
        default="latency",
        description="latency: all threads for one query at a time; throughput: several queries at a time, as many as"
        " OpenVINO finds best, each with a part of the threads",
    )
    streams: int = Field(
        default=1,
        ge=1,
        description="into how many parts a batch is divided that run side by side, each with its part of the threads;"
        " the largest number that divides both this and the batch is taken",
    )
    kernels: Literal["default", "measured"] = Field(
        default="default",
        description="measured: each convolution is computed by the fastest of OpenVINO's kernels for it, found by"
        " measuring them when the model is lowered; default: OpenVINO's own choice",
    )
    partitioner: Literal["default", "static", "auto"] = Field(
        default="default",
        description="static: each thread gets an equal part of an operator's work; auto: the work is divided into more"
        " parts than there are threads, and each takes the next when it is free; default: OpenVINO's own choice",
    )
    cache: bool = Field(
        default=False,
        description="keep what is compiled, the weights once more, in ~/.cache/optc/openvino, to load it sooner",
    )

    @field_validator("streams")
    @classmethod
    def _share_threads_once(cls, streams: int, others: ValidationInfo) -> int:
        if streams > 1 and others.data.get("hint") == "throughput":
            raise ValueError("with hint=throughput it is queries that share the threads, not parts of one")
        return streams


@lru_cache(maxsize=1)
def core() -> ov.Core:
    """The process's OpenVINO core."""
    return ov.Core()


def computes_bfloat16() -> bool:
    """Whether this CPU has bfloat16 arithmetic that OpenVINO uses."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def read(path: Path, weights: Path | None = None) -> ov.Model:
    """Read an IR or ONNX file. Weights of an IR stay on disk and are mapped.

    Args:
        weights: an IR's, if its file of weights has another name.

    Raises:
        BackendError: OpenVINO refuses the file.
    """
    if not path.is_file():
        raise BackendError(f"openvino cannot read {path.name}: there is no such file", "optimize the model again")
    with errors(f"openvino refuses {path.name}"):
        return core().read_model(path, weights) if weights else core().read_model(path)


def compile_model(
    model: ov.Model,
    target: Target,
    given: OpenVinoOptions,
    further: Mapping[str, Any] | None = None,
    streams: int = 1,
) -> ov.CompiledModel:
    """Compile for the target's threads, in the types and the inference precision that are written in the model.

    Args:
        given: the backend's options.
        further: options besides those that every model is compiled with.
        streams: how many inferences run side by side with the latency hint.

    Raises:
        BackendError: OpenVINO's CPU plugin has no way to run the model, or its cache cannot be written.
    """
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": given.hint.upper(),
        "INFERENCE_NUM_THREADS": target.threads,
        # With its default OpenVINO runs a float32 model in bfloat16 where the CPU is fast at that. f32 means that
        # nothing is lowered further: what the graph itself casts to bfloat16 still runs in bfloat16.
        "INFERENCE_PRECISION_HINT": inference_precision(model),
        # Layers of which only the weights are integers, and no others, multiply 8-bit integers where the CPU has VNNI.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": ROUNDED_TOGETHER,
        # Pinned threads of two processes would share the first cores while the others idle.
        "ENABLE_CPU_PINNING": False,
    }
    if given.hint == "latency":
        options["NUM_STREAMS"] = streams
    if given.partitioner != "default":
        options[PARTITIONER] = given.partitioner.upper()
    if given.cache:
        options["CACHE_DIR"] = str(_writable(cache_folder("openvino")))
    with errors("openvino cannot compile the model"):
        return core().compile_model(model, "CPU", options | dict(further or {}))


def _writable(folder: Path) -> Path:
    """The folder, made if it is not there.

    Raises:
        BackendError: it cannot be made, or files in it cannot.
    """
    mend = "set XDG_CACHE_HOME to a folder of yours, or leave out -O openvino.cache"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BackendError(f"openvino cannot cache in {folder}: {error.strerror}", mend) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BackendError(f"openvino cannot cache in {folder}: it is not writable", mend)
    return folder


def inference_precision(model: ov.Model) -> str:
    """What operators in float32 are computed in: ``"f32"``, or ``"bf16"`` where the model says so and the CPU can."""
    path = list(INFERENCE_PRECISION)
    return "bf16" if model.has_rt_info(path) and computes_bfloat16() else "f32"


@contextmanager
def errors(what: str) -> Iterator[None]:
    """Turn OpenVINO's many-line errors into a :class:`BackendError` of one line that begins with ``what``."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        raise BackendError(f"{what}: {reason(str(error))}") from error


_PLACE = re.compile(
    r"(Exception from|Check '.*' failed at) \S+:\d+:?|^[\w/.]+\.[ch]pp:\d+.*|^FrontEnd API failed with \w+:"
)
_FAILED = re.compile(r"^-- (\S+) with a message:\n(.*?)(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)


def reason(text: str) -> str:
    """What an OpenVINO error says, without the places in its source code, in one line.

    Of a model that could not be converted: what it says of each type of operator that was not.
    """
    failed = _FAILED.findall(text)
    return "; ".join(f"{operator}: {_first(message)}" for operator, message in failed) or _first(text)


def _first(text: str) -> str:
    """The first line that tells, and after a colon the next one."""
    first, *rest = list(filter(None, (_PLACE.sub("", line).strip() for line in text.splitlines()))) or [
        "no reason given"
    ]
    for line in rest:
        if not first.endswith(":"):
            break
        first += f" {line}"
    return first.rstrip(":")
