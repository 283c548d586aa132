"""Classification models by torchvision's names, with the transforms of their published weights."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optc.errors import OptcError, WeightsError
from optc.frontend.hub import unreachable
from optc.frontend.source import BuiltModel, ModelSource, PretrainedUnavailable
from optc.program import Preprocessing
from optc.torchvision_ops import declare_torchvision_ops

if TYPE_CHECKING:
    from torch import nn


class TorchvisionSource(ModelSource):
    """torchvision's image classifiers. Pretrained means the weights torchvision itself calls ``DEFAULT``."""

    name = "torchvision"
    summary = "torchvision's image classifiers by name: alexnet, resnet50, vit_h_14, ..."

    def names(self) -> Sequence[str]:
        models = _models()
        return models.list_models(module=models)  # type: ignore[no-any-return]

    def build(self, name: str, *, pretrained: bool, num_classes: int | None, seed: int) -> BuiltModel:
        models = _models()
        default = models.get_model_weights(name).DEFAULT
        options: dict[str, Any] = {}
        if name in ("googlenet", "inception_v3"):
            # Left out, torchvision warns and then draws from scipy's truncated normal for most of a minute.
            options["init_weights"] = False
        if pretrained:
            classes = len(default.meta["categories"])
            if num_classes not in (None, classes):
                raise WeightsError(
                    f"torchvision's pretrained weights for {name} have {classes} classes, not {num_classes}",
                    "use --weights PATH with a checkpoint of that many classes, or --weights random",
                )
            module = _pretrained(name, default, options)
            return BuiltModel(module, _preprocessing(module, default), "pretrained", str(default))
        if num_classes is not None:
            options["num_classes"] = num_classes
        try:
            module = models.get_model(name, weights=None, **options)
        except Exception as error:
            raise OptcError(f"torchvision cannot build {name}: {type(error).__name__}: {error}") from error
        return BuiltModel(module, _preprocessing(module, default), "random", f"seed {seed}")


def _models() -> Any:
    declare_torchvision_ops()
    import torchvision

    return torchvision.models


def _pretrained(name: str, weights: Any, options: dict[str, Any]) -> nn.Module:
    import torch

    cached = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    if not cached.is_file():
        reason = unreachable(weights.url)
        if reason:
            raise PretrainedUnavailable(reason)
    # torch.hub announces downloads on stdout, which belongs to the result.
    with _weights_only(), contextlib.redirect_stdout(sys.stderr):
        try:
            module: nn.Module = _models().get_model(name, weights=weights, **options)
        except OSError as error:
            raise PretrainedUnavailable(str(error)) from error
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise WeightsError(f"'{cached}' is damaged", "delete it to download it again") from error
    return module


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Let torch.load refuse anything but tensors; torchvision's builders do not ask for that themselves."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _preprocessing(module: nn.Module, weights: Any) -> Preprocessing:
    transforms = weights.transforms()
    crop, resize = transforms.crop_size[0], transforms.resize_size[0]
    # Vision transformers are built for one size; without weights it is not always the size the weights are for.
    size = int(getattr(module, "image_size", crop))
    return Preprocessing(
        input_size=(3, size, size),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
        resize=max(size, round(resize * size / crop)),
    )
