"""ONNX Runtime's session options: what optc runs with against each other setting, model by model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import torch
from common import Result, publish, say

import optc
from optc import Runner, Target
from optc.bench.measure import measure
from optc.bench.results import Candidate, CandidateResult
from optc.bench.statistics import Ratio, ratio_of_medians
from optc.frontend.load import load_model
from optc.lowering.backend import Array
from optc.lowering.onnxruntime import session_options

MODELS = ("alexnet", "resnet18", "mobilenetv3_small_100", "vit_tiny_patch16_224")
PASSES = {"fp32": "fuse", "int8": "fuse,quant"}
BLOCKS, BLOCK_SECONDS = 10, 0.4
MARGIN = 1.03
IDLE_SECONDS = 0.2
DEFAULT = "as optc runs it"


def _never_spin(options: ort.SessionOptions) -> None:
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")


def _spin_for_long(options: ort.SessionOptions) -> None:
    options.add_session_config_entry("session.intra_op.spin_duration_us", "50000")


def _stop_with_the_call(options: ort.SessionOptions) -> None:
    options.add_session_config_entry("session.force_spinning_stop", "1")


def _level(name: str) -> Callable[[ort.SessionOptions], None]:
    def change(options: ort.SessionOptions) -> None:
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, name)

    return change


def _one_thread(options: ort.SessionOptions) -> None:
    options.intra_op_num_threads = 1


def _unchanged(options: ort.SessionOptions) -> None:
    pass


VARIANTS: dict[str, tuple[Callable[[ort.SessionOptions], None], bool]] = {
    DEFAULT: (_unchanged, False),
    "IO binding": (_unchanged, True),
    "never spinning": (_never_spin, False),
    "spinning for 50 ms": (_spin_for_long, False),
    "spinning within calls alone": (_stop_with_the_call, False),
    "ORT_ENABLE_EXTENDED": (_level("ORT_ENABLE_EXTENDED"), False),
    "ORT_ENABLE_LAYOUT": (_level("ORT_ENABLE_LAYOUT"), False),
    "1 thread": (_one_thread, False),
}
"""By name: what is changed in optc's session options, and whether inputs and outputs are bound."""


class Session(Runner):
    """A session with other options than optc's, called as optc calls it or through an IO binding."""

    provider = "onnxruntime"

    def __init__(self, path: Path, options: ort.SessionOptions, binding: bool, precision: str) -> None:
        self.precision = precision
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        self._binding = self._session.io_binding() if binding else None
        if self._binding is not None:
            self._binding.bind_output(self._session.get_outputs()[0].name)

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        """Run one query: one input, one output."""
        if self._binding is None:
            return tuple(self._session.run(None, {self._input: inputs[0]}))
        self._binding.bind_cpu_input(self._input, inputs[0])
        self._session.run_with_iobinding(self._binding)
        return tuple(self._binding.copy_outputs_to_cpu())


def candidates(path: Path, kind: str, target: Target) -> list[Candidate]:
    """One for each setting."""

    def opener(change: Callable[[ort.SessionOptions], None], binding: bool) -> Callable[[], Runner]:
        def load() -> Runner:
            options = session_options(target)
            change(options)
            return Session(path, options, binding, kind)

        return load

    return [Candidate(name, kind, kind == "int8", opener(*variant)) for name, variant in VARIANTS.items()]


def idle_cpu_ms(candidate: Candidate, query: Array) -> float:
    """CPU time that the process uses after a call, while it does nothing."""
    runner = candidate.open()
    for _ in range(3):
        runner(query)
    before = time.process_time()
    time.sleep(IDLE_SECONDS)
    spent = (time.process_time() - before) * 1e3
    runner.close()
    return spent


def benchmark() -> Result:
    """All settings of a model in turns, the same file, inputs and threads."""
    target = Target()
    ort.set_default_logger_severity(3)  # that a setting of optc's is changed is what is wanted
    table: list[dict[str, str | float]] = []
    raw, lost = {}, []
    for model in MODELS:
        loaded = load_model(model, weights="random")
        torch.manual_seed(0)
        images = torch.randn(8, *loaded.example_inputs[0].shape[1:])
        for kind, passes in PASSES.items():
            say(f"{model} {kind}")
            optimized = optc.optimize(
                loaded.module, loaded.example_inputs, passes, calibration=[images], backend="onnxruntime",
                measure=False, target=target,
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                artifact = optimized.save(Path(folder) / model)
                tried = candidates(artifact / "model.onnx", kind, target)
                query = images[:1].numpy()
                time.sleep(1)  # PyTorch's own workers spin for a while after the last call
                idle = {each.name: idle_cpu_ms(each, query) for each in tried}
                measured = measure(tried, [(query,)], target, together=True, blocks=BLOCKS, block_seconds=BLOCK_SECONDS)
            optimized.close()
            raw[f"{model} {kind}"] = measured.to_dict()
            ours = measured[DEFAULT]
            for each in tried:
                ratio = _ratio(measured[each.name], ours)
                if ratio.value * MARGIN < 1 and ratio.outcome == "faster":
                    lost.append(f"{each.name} on {model} {kind}")
                table.append(_row(f"{model} {kind}", measured[each.name], ratio, idle[each.name]))
    return Result(
        claim=f"No setting is shown to be faster at batch 1 than optc's by more than {MARGIN - 1:.0%}.",
        held=not lost,
        finding=f"faster: {', '.join(lost)}" if lost else "none is faster",
        table=table,
        raw=raw,
        notes=[
            "optc: ORT_ENABLE_ALL, all threads, spinning for 1 ms, run() on the caller's arrays",
            f"idle CPU ms: CPU time the process uses in the {IDLE_SECONDS * 1e3:.0f} ms after a call",
        ],
    )


def _ratio(result: CandidateResult, ours: CandidateResult) -> Ratio:
    if result.error:
        raise SystemExit(f"{result.name}: {result.error}")
    return ratio_of_medians(result.latencies_ns, ours.latencies_ns, interleaved=True)


def _row(model: str, result: CandidateResult, ratio: Ratio, idle: float) -> dict[str, str | float]:
    assert result.percentiles is not None
    return {
        "model": model,
        "setting": result.name,
        "p50 ms": result.percentiles.p50_ns / 1e6,
        "p99 ms": result.percentiles.p99_ns / 1e6,
        "ratio to optc's": "" if result.name == DEFAULT else f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
        "idle CPU ms": round(idle, 1),
    }


if __name__ == "__main__":
    publish("ort_options", benchmark)
