"""AlexNet int8 through onnxruntime: optc's file against onnxruntime's own ``quantize_static``, in the same run."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import Result, publish, say
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from tools.peer import int8_saturates
from torch import Tensor, nn

import optc
from optc import Target
from optc.bench.measure import measure
from optc.bench.results import Candidate, Measurement
from optc.bench.statistics import Ratio, ratio_of_medians
from optc.frontend.load import load_model
from optc.plugins.registry import registry

CALIBRATION_BATCHES, BATCH = 8, 8
BLOCKS, BLOCK_SECONDS = 10, 0.5
PEERS = {
    f"quantize_static {types}{'' if per_channel else ' per tensor'}": (activation, per_channel)
    for types, activation in (("u8s8", QuantType.QUInt8), ("s8s8", QuantType.QInt8))
    for per_channel in (True, False)
}
"""By name: the type of activations, and whether each channel has a scale of its own."""


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """The calibration batches as onnxruntime wants them."""

    def __init__(self, name: str, batches: Sequence[Tensor]) -> None:
        self._rest = iter([{name: batch.numpy()} for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._rest, None)


def calibration_batches(model: str, info: optc.ModelInfo) -> list[Tensor]:
    """Training images of the digits, as the model wants them."""
    dataset = registry().load("dataset", "digits")()
    split = dataset.split("train", info.preprocessing)
    return [images for images, _ in split.batches(BATCH, CALIBRATION_BATCHES * BATCH)]


def peer_files(module: nn.Module, batches: list[Tensor], folder: Path) -> dict[str, Path]:
    """onnxruntime's own int8 models of the same weights, as its documentation says to make them on a CPU."""
    exported, prepared = folder / "float32.onnx", folder / "prepared.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (batches[0],),
            str(exported),
            dynamo=True,
            external_data=False,
            input_names=["input"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    quant_pre_process(str(exported), str(prepared), skip_symbolic_shape=True)
    files = {"onnxruntime float32": exported}
    for name, (activation, per_channel) in PEERS.items():
        files[name] = folder / f"{name.replace(' ', '-')}.onnx"
        say(name)
        quantize_static(
            str(prepared),
            str(files[name]),
            _Reader("input", batches),
            quant_format=QuantFormat.QDQ,
            per_channel=per_channel,
            reduce_range=int8_saturates(),
            activation_type=activation,
            weight_type=QuantType.QInt8,
        )
    return files


def benchmark() -> Result:
    """The same weights, calibration images, inputs, session options and threads for all."""
    logging.getLogger().setLevel(logging.ERROR)
    target = Target()
    loaded = load_model("alexnet", weights="random")
    batches = calibration_batches("alexnet", loaded.info)
    say("optc fuse,quant")
    optimized = optc.optimize(
        loaded.module,
        loaded.example_inputs,
        "fuse,quant",
        backend="onnxruntime",
        calibration=batches,
        measure=False,
        target=target,
    )
    backend = registry().load("backend", "onnxruntime")()
    with tempfile.TemporaryDirectory() as folder:
        files = peer_files(loaded.module, batches, Path(folder))
        candidates = [Candidate("optc", "int8", True, optimized.load)]
        for name, file in files.items():
            load = lambda file=file: backend.load(file.parent, (file.name,), target)  # noqa: E731
            candidates.append(Candidate(name, "", "quantize" in name, load))
        query = [(batches[0][:1].numpy(),)]
        measured = measure(
            candidates, query, target, reopen=True, blocks=BLOCKS, block_seconds=BLOCK_SECONDS, progress=say
        )
        sizes = {"optc": sum(file.stat().st_size for file in optimized.files)}
        sizes |= {name: file.stat().st_size for name, file in files.items()}
    failures = [f"{result.name}: {result.error}" for result in measured.results if result.error]
    if failures:
        raise SystemExit("; ".join(failures))
    best = min(PEERS, key=lambda name: _p50(measured, name))
    ratios = {name: _ratio(measured, name) for name in PEERS}
    return Result(
        claim="AlexNet int8 by optc in onnxruntime takes at most 1.0 times the best of quantize_static's (p50).",
        held=ratios[best].value <= 1.0,
        finding=f"optc / {best}: {ratios[best].value:.3f} [{ratios[best].low:.3f}, {ratios[best].high:.3f}]"
        + (": INCONCLUSIVE, the interval contains 1" if ratios[best].outcome == "no difference" else ""),
        table=[_row(measured, name, sizes[name]) for name in ("optc", *files)],
        raw={"measurement": measured.to_dict(), "ratios": {name: vars(ratio) for name, ratio in ratios.items()}},
        notes=[f"{name}: {warning}" for name in ("optc", *files) for warning in measured[name].warnings],
    )


def _p50(measured: Measurement, name: str) -> float:
    found = measured[name].percentiles
    return found.p50_ns if found else float("inf")


def _ratio(measured: Measurement, peer: str) -> Ratio:
    return ratio_of_medians(measured["optc"].latencies_ns, measured[peer].latencies_ns, interleaved=True)


def _row(measured: Measurement, name: str, size: int) -> dict[str, str | float]:
    found = measured[name].percentiles
    if found is None:
        raise SystemExit(f"{name} was not measured")
    return {
        "candidate": name,
        "p50 ms": found.p50_ns / 1e6,
        "p90 ms": found.p90_ns / 1e6,
        "p99 ms": found.p99_ns / 1e6,
        "MB": size / 1e6,
        "queries": found.count,
    }


if __name__ == "__main__":
    publish("ort_static", benchmark)
