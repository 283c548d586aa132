"""The model-source interface: where models come from by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from optc.errors import OptcError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optc.program import Preprocessing


@dataclass(frozen=True)
class BuiltModel:
    """A model as its source built it.

    Attributes:
        module: the model; training flags as the source left them.
        preprocessing: how its inputs are made, from the model's own configuration.
        weights: ``"pretrained"``, ``"random"`` or ``"given"`` (the source decides, as a user's factory does).
        weights_detail: what pins the weights down: a tag, a seed or a hash.
        example_inputs: one tensor per positional argument, batch first; ``None`` for one random image.
        notes: lines the user must see.
    """

    module: nn.Module
    preprocessing: Preprocessing
    weights: str
    weights_detail: str = ""
    example_inputs: tuple[Tensor, ...] | None = None
    notes: tuple[str, ...] = field(default=())


class PretrainedUnavailable(OptcError):
    """Pretrained weights exist but cannot be had now (no network), or there are none; the message is the reason."""


class ModelSource(ABC):
    """Builds models by name. Subclasses set ``name`` and ``summary``; users write ``NAME`` or ``source:NAME``."""

    name: ClassVar[str]
    summary: ClassVar[str]
    origin: str = "this module"

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Every model name the source knows, listed without building any; empty if names are open-ended."""

    def claims(self, name: str) -> bool:
        """Whether a name without ``source:`` in front is this source's."""
        return name in self.names()

    @abstractmethod
    def build(self, name: str, *, pretrained: bool, num_classes: int | None, seed: int) -> BuiltModel:
        """Build a model.

        Args:
            name: one of :meth:`names`, or one that :meth:`claims` accepts.
            pretrained: load the weights the source publishes; otherwise initialise them at random.
            num_classes: size of the classifier; ``None`` for the model's own.
            seed: seeds random weights; the caller has seeded torch with it already.

        Raises:
            PretrainedUnavailable: pretrained weights were asked for and cannot be had.
            OptcError: the model cannot be built.
        """
