"""LoadGen's accuracy mode: every labelled image once, the answers logged by LoadGen and read back from its log."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from optc import machine
from optc.bench.loadgen import log_files, start_test
from optc.bench.settings import Scenario, loadgen_settings
from optc.bench.suts import BatchSystem
from optc.data.dataset import Split
from optc.errors import MeasurementError
from optc.lowering.backend import Runner
from optc.lowering.manifest import sha256

LOG = "mlperf_log_accuracy.json"
_MEMORY_SHARE = 0.5
_BATCH = 32


@dataclass(frozen=True)
class AccuracyResult:
    """``correct`` of ``total`` images of ``dataset`` were given their label's class, by LoadGen's log."""

    name: str
    scenario: Scenario
    correct: int
    total: int
    dataset: str

    @property
    def top1(self) -> float:
        """Share of correct images, 0 to 1."""
        return self.correct / self.total

    @property
    def sentence(self) -> str:
        """What was found, for people."""
        found = f"{self.name} in {self.scenario}: top-1 {self.top1:.2%}"
        return f"{found}, {self.correct} of {self.total} images ({self.dataset})."


def measure_accuracy(
    scenario: Scenario,
    runner: Runner,
    split: Split,
    name: str,
    *,
    model: str,
    batch: int,
    check_classes: Callable[[int], None] | None = None,
    user_conf: Path | None = None,
    log_folder: Path | None = None,
) -> AccuracyResult:
    """Run LoadGen's AccuracyOnly mode over a labelled split.

    Beside LoadGen's log goes ``accuracy.txt``, as MLPerf's own scripts write it.

    Args:
        model: name for keys in ``user_conf``.
        batch: samples to run at once, where the scenario's queries have several or the runner takes no other number.
        check_classes: the dataset's, see :meth:`optc.Dataset.check_classes`.

    Raises:
        DataError: an image cannot be decoded, or the model's outputs are not the dataset's classes.
        MeasurementError: the split has no labels or does not fit into memory; the runner raised, or does not give
            scores per class.
    """
    labels = split.labels
    if labels is None:
        raise MeasurementError(f"'{split.dataset}' has no labels", "give labelled --data")
    samples = _in_memory(split)
    system = BatchSystem(runner, samples, name, batch, classes=True)
    try:
        scores = system.run([0])[0]
    except Exception as error:
        raise MeasurementError(f"it cannot run one image: {type(error).__name__}: {error}") from error
    if scores.ndim != 2 or len(scores) != 1:
        raise MeasurementError(f"it gives outputs of the shape {scores.shape} for an image, not scores per class")
    if check_classes is not None:
        check_classes(scores.shape[1])
    # In Server, answers are no faster for being asked for at a rate.
    settings = loadgen_settings(scenario, model, {"server_target_qps": 1e6}, user_conf, accuracy=True)
    with log_files(log_folder) as folder:
        start_test(system, settings, len(samples), folder)
        system.raise_failure()
        answers = _answers(folder / LOG)
        if sorted(answers) != list(range(len(samples))):
            raise MeasurementError(f"LoadGen logged {len(answers)} of {len(samples)} answers", "is the disk full?")
        correct = sum(int(answers[index] == label) for index, label in enumerate(labels))
        result = AccuracyResult(name, scenario, correct, len(labels), split.description)
        if log_folder is not None:
            line = f"accuracy={100 * result.top1:.3f}%, good={correct}, total={len(labels)}"
            (folder / "accuracy.txt").write_text(f"{line}\nhash={sha256(folder / LOG)}\n")
    return result


def _answers(path: Path) -> dict[int, int]:
    """Class by sample, from LoadGen's log."""
    entries = json.loads(path.read_text())
    return {entry["qsl_idx"]: int(np.frombuffer(bytes.fromhex(entry["data"]), np.float32)[0]) for entry in entries}


def _in_memory(split: Split) -> Sequence[tuple[np.ndarray, ...]]:
    samples: list[tuple[np.ndarray, ...]] = []
    for images, _ in split.batches(_BATCH):
        if not samples:
            need, free = images[:1].nbytes * len(split), machine.available_memory()
            if need > _MEMORY_SHARE * free:
                raise MeasurementError(
                    f"the {len(split)} images of '{split.dataset}' take {need / 1e9:.1f} GB, over half the free memory",
                    "give --data with fewer images",
                )
        samples += [(image[None].numpy(),) for image in images]
    return samples
