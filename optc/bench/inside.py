"""What a report tells besides latency: time by layer and memory, of an artifact and of the model it was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from optc.bench.layers import LayerProfile, artifact_layers, program_layers
from optc.bench.memory import Memory, artifact_memory, program_memory
from optc.bench.peaks_cache import peaks
from optc.errors import one_line
from optc.frontend.capture import capture
from optc.lowering.artifact import Artifact
from optc.target import Target

Found = TypeVar("Found")


@dataclass(frozen=True)
class Inside:
    """Layers and memory before and after; ``None`` where they could not be had, for the reasons in ``missing``."""

    layers_before: LayerProfile | None
    layers_after: LayerProfile | None
    memory: tuple[Memory, ...]
    missing: tuple[str, ...]


def look_inside(
    artifact: Artifact | None,
    module: nn.Module | None,
    inputs: Sequence[Tensor],
    target: Target,
    progress: Callable[[str], None] = lambda text: None,
) -> Inside:
    """Profile and weigh an artifact and the model it was made from; either may be missing.

    Nothing is raised for what cannot be had: each reason is kept.
    """
    missing: list[str] = []
    memory: list[Memory | None] = []
    before = after = None

    def tried(what: str, call: Callable[..., Found], *args: Any) -> Found | None:
        progress(what)
        try:
            return call(*args)
        except Exception as error:  # a plugin's profiler may raise anything
            missing.append(f"{what}: {one_line(error)}")
            return None

    if target.device != "cpu":
        missing.append(f"the time of each layer is told on the CPU only, not on '{target.device}'")
    known = peaks(target.threads) if target.device == "cpu" else None
    if module is not None and (program := tried("capturing the model", capture, module, tuple(inputs))) is not None:
        if known:
            before = tried("layers before", program_layers, program, target, known)
        memory.append(tried("memory before", program_memory, program, target))
    if artifact is not None:
        if known:
            after = tried("layers after", artifact_layers, artifact, target, known)
        memory.append(tried("memory after", artifact_memory, artifact, target))
    return Inside(before, after, tuple(each for each in memory if each), tuple(missing))
