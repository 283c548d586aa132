"""What the user asks to measure: artifacts, folders of artifacts, models. Each becomes candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optc.errors import MeasurementError
from optc.lowering.manifest import NAME

if TYPE_CHECKING:
    from optc.bench.inside import Inside
    from optc.bench.results import Candidate
    from optc.program import Preprocessing
    from optc.progress import Progress
    from optc.target import Target


@dataclass(frozen=True)
class Subject:
    """One target.

    Attributes:
        name: as the user typed it, or the artifact's folder.
        candidates: for a batch size, what to measure: one for an artifact, the baselines for a model. Their inputs are
            one query of that batch.
        weights: where its weights come from, such as ``"pretrained"`` or ``"random"``.
        parameters: how many it has; of an artifact, how many the captured model had. ``None`` if unknown.
        accuracy: top-1 as its manifest has it, 0 to 1; ``None`` if unknown.
        accuracy_data: what that is of.
        preprocessing: how its images are made.
        is_artifact: whether it is one, not a model.
        batch: images in the queries that it was optimized for; 1 for a model.
        device: where it runs.
        look_inside: profiles its layers and weighs its memory; told of each step.
    """

    name: str
    candidates: Callable[[int], list[Candidate]]
    weights: str
    parameters: int | None
    accuracy: float | None
    accuracy_data: str
    preprocessing: Preprocessing
    is_artifact: bool
    batch: int
    device: str
    look_inside: Callable[[Callable[[str], None]], Inside]

    def images(self, batch: int) -> int:
        """How many images its queries have where ``batch`` are asked for: as many, unless it takes one number only."""
        return len(self.candidates(batch)[0].inputs[0][0])


def subjects(names: Sequence[str], weights: str, target: Target, progress: Progress) -> list[Subject]:
    """Everything the names stand for; of a folder of artifacts, each artifact.

    Raises:
        OptcError: a name is no model, a folder no artifact and without any.
    """
    found: list[Subject] = []
    for name in names:
        if not Path(name).is_dir():
            found.append(_model(name, weights, target, progress))
            continue
        inside = sorted(path.parent for path in Path(name).glob(f"*/{NAME}"))
        is_collection = inside and not (Path(name) / NAME).exists()
        found += [_artifact(folder, target) for folder in (inside if is_collection else [Path(name)])]
    return found


def device_of(found: Sequence[Subject]) -> str:
    """The device that all of them run on.

    Raises:
        MeasurementError: they run on several.
    """
    by_device = {each.device: each.name for each in found}
    if len(by_device) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in by_device.items())
        raise MeasurementError(f"the targets run on different devices: {where}", "profile them one after another")
    return next(iter(by_device))


def queries_of(batch: int) -> str:
    """What a query of that many images is called."""
    return f"queries of {batch} image{'s' if batch > 1 else ''}"


def _artifact(folder: Path, target: Target) -> Subject:
    from optc.bench.inside import look_inside
    from optc.bench.results import Candidate
    from optc.budget import ACCURACY
    from optc.lowering.artifact import load_artifact

    artifact = load_artifact(folder)
    manifest = artifact.manifest
    name = str(folder)
    target = replace(target, device=manifest.target.get("device", target.device))
    quantized = "int8" in artifact.precision or "int4" in artifact.precision

    def candidates(batch: int) -> list[Candidate]:
        queries, of_batch = (artifact.example_query(batch),), replace(target, batch=batch)
        return [
            Candidate(name, artifact.precision, quantized, lambda: artifact.runner(of_batch), artifact.bytes, queries)
        ]

    model_bytes = manifest.report.get("model_bytes")
    accuracy = manifest.report.get("accuracy") or {}
    return Subject(
        name=name,
        candidates=candidates,
        weights=str(manifest.model.get("weights", "")),
        parameters=model_bytes // 4 if model_bytes else None,
        accuracy=accuracy["after"] if accuracy.get("metric") == ACCURACY and _is_share(accuracy.get("after")) else None,
        accuracy_data=f"when it was optimized, on {accuracy.get('data') or 'data that it does not name'}",
        preprocessing=_preprocessing(manifest.model["preprocessing"]),
        is_artifact=True,
        batch=manifest.target.get("batch", 1),
        device=target.device,
        look_inside=lambda told: look_inside(artifact, None, (), target, told),
    )


def _model(name: str, weights: str, target: Target, progress: Progress) -> Subject:
    import torch

    from optc.bench.baselines import baselines
    from optc.bench.inside import look_inside
    from optc.cli.model import load
    from optc.frontend.batch_sizes import takes_one_batch
    from optc.lowering.agreement import as_array

    loaded, _ = load(name, weights, None, 0, progress)

    def candidates(batch: int) -> list[Candidate]:
        query = loaded.example_inputs
        if not takes_one_batch(loaded.module, query):
            query = tuple(torch.cat([tensor[:1]] * batch) for tensor in query)
        arrays = (tuple(map(as_array, query)),)
        return [
            replace(each, name=f"{name} {each.name}", inputs=arrays) for each in baselines(loaded.module, query, target)
        ]

    return Subject(
        name=name,
        candidates=candidates,
        weights=loaded.info.weights,
        parameters=sum(parameter.numel() for parameter in loaded.module.parameters()),
        accuracy=None,
        accuracy_data="",
        preprocessing=loaded.info.preprocessing,
        is_artifact=False,
        batch=1,
        device=target.device,
        look_inside=lambda told: look_inside(None, loaded.module, loaded.example_inputs, target, told),
    )


def _is_share(value: object) -> bool:
    """Whether a manifest has a number there: metrics that are NaN are written as text."""
    return isinstance(value, float | int) and math.isfinite(value)


def _preprocessing(entry: Mapping[str, Any]) -> Preprocessing:
    """What a manifest says, whose lists were tuples."""
    from optc.program import Preprocessing

    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Preprocessing(**fields)
