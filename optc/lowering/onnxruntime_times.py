"""How long each node takes in ONNX Runtime: from the profile of some queries."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from optc.errors import BackendError
from optc.lowering.backend import Array
from optc.lowering.kernel_times import KernelTime, medians, repeat_query
from optc.lowering.onnxruntime_profile import kernels, plain_name
from optc.lowering.onnxruntime_session import OnnxRuntimeOptions, open_session, session_options
from optc.target import Target

_SUFFIX = "_kernel_time"


def kernel_times(
    path: Path, providers: Sequence[str], target: Target, given: OnnxRuntimeOptions, inputs: Sequence[Array]
) -> list[KernelTime]:
    """Run queries of ``inputs`` under ONNX Runtime's profiler. Its clock counts whole microseconds.

    Raises:
        BackendError: ONNX Runtime refuses the file or cannot run it.
    """
    from optc.lowering.onnxruntime import with_weight_types
    from optc.lowering.onnxruntime_layers import fused

    with tempfile.TemporaryDirectory(prefix="optc-ort-") as scratch:
        options = session_options(target, given)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch) / "profile")
        session = open_session(path, providers, options, target)
        feed = {value.name: array for value, array in zip(session.get_inputs(), inputs, strict=True)}
        try:
            calls = repeat_query(lambda: session.run(None, feed))
        except Exception as error:
            raise BackendError(f"onnxruntime cannot run {path.name}: {error}") from error
        events = json.loads(Path(session.end_profiling()).read_bytes())
    ran = [event for event in events if event.get("cat") == "Node" and str(event.get("name")).endswith(_SUFFIX)]
    times = medians(((_key(event["name"], event["args"]), event["dur"] / 1e6) for event in ran), calls)
    found = with_weight_types(kernels(ran), path)
    layers = fused(path, found)
    return [
        KernelTime(
            kernel.node, kernel.operator, times[key], kernel.kind, layers.get(kernel.node, (plain_name(kernel.node),))
        )
        for key, kernel in zip(times, found, strict=True)
    ]


def _key(name: str, args: dict[str, object]) -> tuple[str, object]:
    return name.removesuffix(_SUFFIX), args.get("node_index")
