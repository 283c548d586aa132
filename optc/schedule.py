"""GPipe's forward schedule: when each stage receives, computes and sends each microbatch, and what that comes to.

Huang et al., GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism (2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """What one stage does with one microbatch; times in seconds since the batch began.

    Attributes:
        receive, compute: when each begins.
        computed: when computing ends; after that the stage may wait for the next one.
        send: when sending begins.
        end: when the stage is free for the next microbatch.
    """

    stage: int
    microbatch: int
    receive: float
    compute: float
    computed: float
    send: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """A batch on its way through the stages.

    Attributes:
        slots: by stage, one for each microbatch.
        seconds: until the last microbatch is out of the last stage.
        period: seconds between two microbatches once all stages work: what the slowest one takes.
        bubble: share of all stages' time, 0 to 1, in which they do not compute.
    """

    slots: tuple[tuple[Slot, ...], ...]
    seconds: float
    period: float
    bubble: float

    @property
    def ideal_bubble(self) -> float:
        """The bubble of equal stages that send for nothing: (stages - 1) / (microbatches + stages - 1)."""
        stages, microbatches = len(self.slots), len(self.slots[0])
        return (stages - 1) / (microbatches + stages - 1)


def schedule(compute: Sequence[float], transfer: Sequence[float], microbatches: int) -> Schedule:
    """Run a batch through the stages, on paper.

    A transfer keeps both of its stages busy, and begins when both are free: the one that sends has computed, the one
    that receives has sent on what it had before. So a stage takes what it receives, computes and sends, one after the
    other, and the slowest one sets the pace.

    Args:
        compute: seconds of each stage for a microbatch.
        transfer: seconds from each stage but the last to the next.
        microbatches: how many there are in the batch.
    """
    stages = len(compute)
    free = [0.0] * stages
    slots: list[list[Slot]] = [[] for _ in range(stages)]
    for microbatch in range(microbatches):
        received = start = free[0]
        for stage in range(stages):
            computed = start + compute[stage]
            last = stage == stages - 1
            sent = computed if last else max(computed, free[stage + 1])
            end = computed if last else sent + transfer[stage]
            slots[stage].append(Slot(stage, microbatch, received, start, computed, sent, end))
            free[stage] = end
            received, start = sent, end
    seconds = free[-1]
    busy = microbatches * sum(compute)
    takes = [
        sum(transfer[max(stage - 1, 0) : stage]) + each + sum(transfer[stage : stage + 1])
        for stage, each in enumerate(compute)
    ]
    return Schedule(tuple(map(tuple, slots)), seconds, max(takes), 1 - busy / (stages * seconds) if seconds else 0.0)
