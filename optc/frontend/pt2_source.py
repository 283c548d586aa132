"""Models from ``.pt2`` files written by ``torch.export.save``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optc.errors import OptcError
from optc.frontend.batch_sizes import CONDITIONS, OWN_BATCHES, limits
from optc.frontend.pt2_safety import checked_copy
from optc.frontend.source import BuiltModel, ModelSource
from optc.paths import user_path
from optc.program import Preprocessing

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class Pt2Source(ModelSource):
    """Loads an exported program, weights inside. Files whose loading could run code are refused."""

    name = "pt2"
    summary = "a file written by torch.export.save: path/to/model.pt2"

    def names(self) -> Sequence[str]:
        return ()

    def claims(self, name: str) -> bool:
        return name.endswith(".pt2")

    def build(self, name: str, *, pretrained: bool, num_classes: int | None, seed: int) -> BuiltModel:
        from torch import Tensor

        path = user_path(name)
        if num_classes is not None:
            raise OptcError(f"'{name}' has its number of classes built in", "leave num_classes away")
        exported = load_exported(path)
        args, kwargs = exported.example_inputs or ((), {})
        if kwargs or not args or not all(isinstance(value, Tensor) for value in args):
            raise OptcError(f"'{name}' takes other inputs than positional tensors", "export it with args=(tensor, ...)")
        preprocessing = Preprocessing()
        if args[0].ndim == 4:
            channels, height, width = args[0].shape[1:]
            preprocessing = Preprocessing(
                input_size=(channels, height, width), resize=round(256 / 224 * min(height, width))
            )
        note = f"{path.name} does not say how images are prepared for it: assuming ImageNet's mean and std"
        module = exported.module(check_guards=False)
        module.meta[CONDITIONS] = tuple(exported._guards_code)
        notes = [note]
        _, most = limits(module.graph)
        if most is not None and most >= OWN_BATCHES:
            notes.append(f"{path.name} was exported for batches up to {most}: what it computes for more is not known")
        return BuiltModel(module, preprocessing, "given", f"inside {path.name}", tuple(args), tuple(notes))


def load_exported(path: Path) -> ExportedProgram:
    """Load a ``.pt2`` file by way of :func:`~optc.frontend.pt2_safety.checked_copy`.

    Raises:
        OptcError: it cannot be loaded, or loading it could run code.
    """
    import torch

    log = logging.getLogger("torch.export")
    with checked_copy(path) as copy:
        level = log.level
        log.setLevel(logging.CRITICAL)  # It logs the traceback of what it then raises.
        try:
            return torch.export.load(copy)
        except Exception as error:
            raise OptcError(f"'{path}' cannot be loaded: {error}", "was it written by a newer PyTorch?") from error
        finally:
            log.setLevel(level)
