"""What the optimized model is made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from optc.errors import OptcError
from optc.threads import available_threads


@dataclass(frozen=True)
class Target:
    """The device and limits a program is lowered for.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        threads: intra-op threads every candidate runs with.
        batch: images per query at measurement time.
        allow_fallback: whether a runtime may run nodes elsewhere than asked for. It lists them either way: as what fell
            back if this is true, as an error if not.
        options: by name of a backend, its options that are not at their defaults.

    Raises:
        OptcError: there are no threads or no images.
    """

    device: str = "cpu"
    threads: int = field(default_factory=available_threads)
    batch: int = 1
    allow_fallback: bool = False
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, least in (("batch", self.batch), ("threads", self.threads)):
            if least < 1:
                raise OptcError(f"a target with {name}={least} is none", "give 1 or more")

    def with_options(self, backend: str, options: Mapping[str, Any]) -> Target:
        """This target with further options of a backend."""
        return replace(self, options={**self.options, backend: {**self.options.get(backend, {}), **options}})
