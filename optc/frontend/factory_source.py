"""Models from the user's own code: ``package.module:factory``. The one place that runs it, because it was asked to."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optc.errors import OptcError, UnknownNameError
from optc.frontend.source import BuiltModel, ModelSource
from optc.plugins.registry import RAISED
from optc.program import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor, nn

_SPEC = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class FactorySource(ModelSource):
    """Imports a module from the current folder or the environment and calls a factory in it without arguments.

    The factory returns an ``nn.Module``, or ``(module, example_inputs)`` with one tensor per positional argument.
    """

    name = "factory"
    summary = "your own code: package.module:factory returns an nn.Module or (module, example_inputs)"

    def names(self) -> Sequence[str]:
        return ()

    def claims(self, name: str) -> bool:
        return _SPEC.fullmatch(name) is not None

    def build(self, name: str, *, pretrained: bool, num_classes: int | None, seed: int) -> BuiltModel:
        if not self.claims(name):
            raise OptcError(f"'{name}' does not name a factory", "write package.module:factory")
        if num_classes is not None:
            raise OptcError(f"'{name}' decides its own number of classes", "build it in the factory")
        module, inputs = _call(name)
        detail = f"as {name} returned them"
        if inputs is None:
            note = f"{name} returned no example inputs: assuming one image of 3x224x224 and ImageNet's mean and std"
            return BuiltModel(module, Preprocessing(), "given", detail, notes=(note,))
        image = inputs[0]
        preprocessing = Preprocessing()
        if len(inputs) == 1 and image.ndim == 4:
            channels, height, width = image.shape[1:]
            preprocessing = Preprocessing(
                input_size=(channels, height, width),
                mean=Preprocessing.mean[:channels],
                std=Preprocessing.std[:channels],
                resize=round(256 / 224 * min(height, width)),
            )
        return BuiltModel(module, preprocessing, "given", detail, inputs)


def _call(spec: str) -> tuple[nn.Module, tuple[Tensor, ...] | None]:
    from torch import Tensor, nn

    module_name, _, attribute = spec.partition(":")
    with _folder_importable(), redirect_stdout(sys.stderr):  # what it prints is no result of optc's
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
                raise OptcError(
                    f"there is no module '{error.name}' for '{spec}'",
                    "run optc in the folder that holds it, or install it",
                ) from None
            raise _raised(f"importing {module_name}", error) from error
        except RAISED as error:
            raise _raised(f"importing {module_name}", error) from error
        if not hasattr(module, attribute):
            raise UnknownNameError(f"factory in {module_name}", attribute, _callables(module))
        factory = getattr(module, attribute)
        try:
            made = factory if isinstance(factory, nn.Module) else factory()
        except RAISED as error:
            raise _raised(f"calling {spec}", error) from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if not isinstance(model, nn.Module) or not (inputs is None or _are_tensors(inputs)):
        raise OptcError(
            f"{spec} returned {_type_name(made)}", "return an nn.Module or (nn.Module, tuple of example input tensors)"
        )
    return model, None if inputs is None else tuple(inputs)


@contextmanager
def _folder_importable() -> Iterator[None]:
    """Put the current folder first on the import path, as ``python -m`` does, for as long as user code loads."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _callables(module: Any) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]


def _are_tensors(value: object) -> bool:
    from torch import Tensor

    return isinstance(value, (tuple, list)) and len(value) > 0 and all(isinstance(item, Tensor) for item in value)


def _type_name(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_type_name(item) for item in value)})"
    return type(value).__name__


def _raised(doing: str, error: BaseException) -> OptcError:
    """One line for an exception of the user's code, with the place it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}"
    else:
        own = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
        where = f"{own[-1].filename}:{own[-1].lineno}" if own else ""
    place = f" ({where})" if where else ""
    if isinstance(error, SystemExit):
        hint = "take the call out, or put it under if __name__ == '__main__'"
        return OptcError(f"{doing} called sys.exit({error.code!r}){place}", hint)
    return OptcError(f"{doing} raised {type(error).__name__}: {error}{place}")
