"""Which of OpenVINO's kernels computes each convolution: the fastest of them, found by measuring."""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree as ET

from optc import Target, cache_file, cache_folder, write_cache
from optc_openvino.execution import kernels
from optc_openvino.graph import LAYERS
from optc_openvino.parts import compile_and_fill, run_side_by_side
from optc_openvino.runtime import VERSION, OpenVinoOptions, core, read

CONVOLUTIONS = frozenset(("Convolution", "GroupConvolution"))
Preferred = tuple[str, ...]
_JIT_AVX512: tuple[Preferred, ...] = (
    ("jit_avx512_dw", "jit_avx512_1x1", "jit_avx512"),
    ("jit_avx512_dw", "jit_avx512"),
)
_OTHERS: Mapping[str, tuple[Preferred, ...]] = {
    "amx": (
        ("jit_avx512_amx_dw", "jit_avx512_amx_1x1", "jit_avx512_amx"),
        ("brgconv_avx512_dw", "brgconv_avx512_1x1", "brgconv_avx512"),
        *_JIT_AVX512,
    ),
    "avx512": _JIT_AVX512,
    "avx2": (("jit_avx2_dw", "jit_avx2_1x1", "jit_avx2"), ("jit_avx2_dw", "jit_avx2")),
}
"""By the instructions that OpenVINO's own choice uses, what to try beside it: of a row, the first that a layer has."""
_LEAST_CONVOLUTIONS = 0.1
"""Share of a model's layers that are convolutions from which on it is worth compiling several times."""
_ROUNDS, _ROUND_SECONDS, _LEAST_QUERIES, _SECONDS = 3, 0.5, 2, 12.0
"""How often each is compiled and run at most, how long and how often all of them each time, and after how long no other
round begins, once there were two."""
_WORTHWHILE, _RESOLUTION = 0.97, 1.0
"""Of the time of OpenVINO's own choice, what another may take at most; and how many microseconds it has to save."""


def choose_kernels(path: Path, target: Target, given: OpenVinoOptions) -> dict[str, Preferred]:
    """Measure each convolution with every kernel that OpenVINO has for it, in turns, as the target runs it.

    OpenVINO goes by rules: its brgemm kernels come first, whatever a layer's shape. TensorRT calls such a search tactic
    selection. OpenVINO's counters average over all queries of a compilation, which one interruption spoils; so each
    is compiled several times, and the medians are compared.

    Returns:
        By name the convolutions that another kernel computes faster in the same type, and which. Nothing is measured
        for a single one: it is a layer whose formats are being compared.

    Raises:
        BackendError: OpenVINO cannot compile or run the model.
    """
    types = {node.get_friendly_name(): node.get_type_name() for node in read(path).get_ops()}
    convolutions = {name for name, kind in types.items() if kind in CONVOLUTIONS}
    if len(convolutions) < max(2, _LEAST_CONVOLUTIONS * sum(kind in LAYERS for kind in types.values())):
        return {}
    start = time.perf_counter()
    trials = [_Trial(path, (), convolutions, target, given)]
    isa = next((isa for isa in _OTHERS if any(isa in kernel for kernel in trials[0].kernels.values())), None)
    if isa is None:
        return {}
    samples: dict[str, dict[Preferred, list[float]]] = {name: defaultdict(list) for name in convolutions}
    for number in range(_ROUNDS):
        if number > 1 and time.perf_counter() - start > _SECONDS:
            break
        trials = [] if number else trials
        for preferred in ((), *_OTHERS[isa])[len(trials) :]:
            trials.append(_Trial(path, preferred, convolutions, target, given))
        own = trials[0].kernels
        _run_in_turns(trials)
        for trial in trials:
            for name, microseconds in trial.times().items():
                if _arithmetic(trial.kernels.get(name)) == _arithmetic(own.get(name)):
                    samples[name][trial.preferred].append(microseconds)
    fastest = {name: _fastest(times) for name, times in samples.items() if times[()]}
    chosen = {name: preferred for name, preferred in fastest.items() if preferred}
    write_cache(_file_of(path, target), json.dumps(chosen))
    return chosen


def recall_kernels(path: Path, target: Target) -> dict[str, Preferred] | None:
    """What :func:`choose_kernels` last chose for this model on this machine, however the batch was divided then.

    Who asks for the kernels that were measured gets those that were measured with everything else. ``None`` if there
    are none, or the file cannot be read.
    """
    try:
        found = json.loads(_file_of(path, target).read_text(encoding="utf-8"))
        return {name: tuple(map(str, preferred)) for name, preferred in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _file_of(path: Path, target: Target) -> Path:
    """Where a choice of kernels is kept, beside the choices among backends: with them it is forgotten."""
    cpu = [str(core().get_property("CPU", name)) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
    model = hashlib.sha256(path.read_bytes()).hexdigest()
    parts = {"kernels": model, "threads": target.threads, "batch": target.batch, "openvino": VERSION, "cpu": cpu}
    return cache_file(cache_folder("choices"), parts)


def write_choice(path: Path, chosen: Mapping[str, Preferred], written: Path) -> None:
    """Write a model's ``.xml`` once more, each convolution with the kernels that it is to be computed by.

    OpenVINO reads the attribute; where a CPU has none of the kernels it takes the next that it has.
    """
    tree = ET.parse(path)
    for layer in tree.iterfind("./layers/layer"):
        data, preferred = layer.find("data"), chosen.get(layer.get("name", ""))
        if data is not None and preferred and layer.get("type") in CONVOLUTIONS:
            data.set("PrimitivesPriority", ",".join(f"cpu:{kernel}" for kernel in preferred))
    tree.write(written, encoding="utf-8", xml_declaration=True)


class _Trial:
    """A compilation in which all convolutions prefer the same kernels.

    Attributes:
        preferred: those kernels; OpenVINO chooses if there are none.
        kernels: what computes each convolution.
    """

    def __init__(
        self, path: Path, preferred: Preferred, convolutions: set[str], target: Target, given: OpenVinoOptions
    ) -> None:
        self.preferred = preferred
        with tempfile.TemporaryDirectory(prefix="kernels-") as scratch:
            written = Path(scratch) / path.name
            write_choice(path, dict.fromkeys(convolutions, preferred), written)
            model = read(written, path.with_suffix(".bin"))
        compiled, self._requests = compile_and_fill(model, target, given, {"PERF_COUNT": True})
        self.kernels = {each.name: each.primitive for each in kernels(compiled) if each.name in convolutions}

    def run(self) -> None:
        """One query, its parts side by side."""
        run_side_by_side(self._requests)

    def times(self) -> dict[str, float]:
        """Microseconds that each convolution took, on average over all queries."""
        counters = self._requests[0].get_profiling_info()
        return {
            each.node_name: each.real_time.total_seconds() * 1e6 for each in counters if each.node_name in self.kernels
        }


def _run_in_turns(trials: list[_Trial]) -> None:
    start, queries = time.perf_counter(), 0
    while queries < _LEAST_QUERIES or time.perf_counter() - start < _ROUND_SECONDS:
        for trial in trials:
            trial.run()
        queries += 1


def _arithmetic(kernel: str | None) -> str:
    """The type that a kernel computes in, from a name such as ``brgconv_avx512_1x1_I8``."""
    return (kernel or "").rpartition("_")[2]


def _fastest(times: Mapping[Preferred, list[float]]) -> Preferred:
    """The kernels with the lowest median, OpenVINO's own choice where it is as good as that."""
    medians = {preferred: statistics.median(samples) for preferred, samples in times.items() if samples}
    best = min(medians, key=lambda preferred: medians[preferred])
    own = medians[()]
    return best if medians[best] <= min(_WORTHWHILE * own, own - _RESOLUTION) else ()
