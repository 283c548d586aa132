"""What optc itself adds to a run on AlexNet: all but calibration's forward passes, exporting and measuring."""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import Result, publish

LIMIT_SECONDS = 5.0
BATCH, BATCHES = 8, 16
_START = time.perf_counter()


class Clock:
    """Adds up the time spent inside calls that are not optc's own."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._depth = 0

    def wrap(self, owner: object, name: str, label: str) -> None:
        """Time every call of ``owner.name``; a call within a timed one is not counted twice."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.add(label, time.perf_counter() - start)

        setattr(owner, name, timed)

    def add(self, label: str, seconds: float) -> None:
        """Count time that was not optc's."""
        self.seconds[label] = self.seconds.get(label, 0.0) + seconds


class TimedCalibration:
    """Batches; what goes by between handing one out and being asked for the next is its forward pass."""

    description = "digits train"

    def __init__(self, batches: list[tuple[Any, ...]], clock: Clock) -> None:
        self._batches, self._clock = batches, clock

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for batch in self._batches:
            start = time.perf_counter()
            yield batch
            self._clock.add("calibration's forward passes", time.perf_counter() - start)


def benchmark() -> Result:
    """The steps of ``optc optimize alexnet --data digits``, from a fresh interpreter to the saved artifact."""
    import torch

    import optc
    from optc.frontend.load import load_model
    from optc.plugins.registry import registry

    clock = Clock()
    start = time.perf_counter()
    importlib.import_module("torch.export._trace")
    clock.add("importing torch's exporter", time.perf_counter() - start)
    clock.wrap(torch.export, "export", "torch.export")
    clock.wrap(torch.export.ExportedProgram, "run_decompositions", "torch.export")
    clock.wrap(torch.onnx, "export", "torch.onnx.export")
    marks = {"importing": time.perf_counter() - _START - clock.seconds["importing torch's exporter"]}

    start = time.perf_counter()
    loaded = load_model("alexnet", weights="random")
    split = registry().load("dataset", "digits")().split("train", loaded.info.preprocessing)
    batches = [(images,) for images, _ in split.batches(BATCH, BATCH * BATCHES)]
    marks["building the model, reading the data"] = time.perf_counter() - start

    optimized = optc.optimize(
        loaded.module,
        loaded.example_inputs,
        "fuse,quant",
        backend="onnxruntime",
        calibration=TimedCalibration(batches, clock),
        verification=batches[:1],
        measure=False,
        info=loaded.info,
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        optimized.save(Path(folder) / "artifact")
    marks["saving the artifact"] = time.perf_counter() - start
    whole = time.perf_counter() - _START
    own = whole - sum(clock.seconds.values())
    steps = {**marks, **optimized.report.seconds}
    return Result(
        claim=f"optc adds at most {LIMIT_SECONDS:.0f} s to AlexNet's calibration, export and measurement.",
        held=own <= LIMIT_SECONDS,
        finding=f"{own:.1f} s added, of {whole:.1f} s in all",
        table=[
            *({"part": f"step: {step}", "seconds": seconds} for step, seconds in steps.items()),
            *({"part": f"not counted: {label}", "seconds": seconds} for label, seconds in clock.seconds.items()),
            {"part": "all but what is not counted", "seconds": own},
        ],
        raw={
            "steps": steps,
            "not_counted": clock.seconds,
            "passes": {record.name: record.notes.get("timing") for record in optimized.report.passes},
            "whole": whole,
        },
    )


if __name__ == "__main__":
    publish("overhead", benchmark)
