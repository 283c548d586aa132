"""From what the user typed to a model with weights: names, factories, files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from optc.errors import OptcError, UnknownNameError, WeightsError
from optc.evaluation import evaluation_mode, set_evaluation_mode
from optc.frontend.source import BuiltModel, ModelSource, PretrainedUnavailable
from optc.frontend.weights import Checkpoint, apply_checkpoint, classes_in_checkpoint, read_checkpoint
from optc.paths import user_path
from optc.plugins.registry import blamed, registry
from optc.program import ModelInfo


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, where it came from, and one example per input (batch first)."""

    module: nn.Module
    info: ModelInfo
    example_inputs: tuple[Tensor, ...]


def load_model(spec: str, weights: str = "pretrained", num_classes: int | None = None, seed: int = 0) -> LoadedModel:
    """Load a model by name, ``source:name``, ``package.module:factory`` or ``.pt2`` file.

    A bare name is looked up in the model sources in the order they are registered: timm's wins over torchvision's.

    Args:
        weights: ``"pretrained"`` (random, with a note in ``info.notes``, where they cannot be had), ``"random"``, or
            the path of a checkpoint, whose number of classes the model then takes on.
        num_classes: size of the classifier; ``None`` for the model's or the checkpoint's own.
        seed: seeds random weights; torch's random state is left as it was.

    Raises:
        UnknownNameError: no source knows the name; suggests the closest.
        WeightsError: the checkpoint cannot be read or does not fit.
        PluginError: the model source raised something else; names the plugin.
    """
    source, name = find_source(spec)
    checkpoint = None if weights in ("pretrained", "random") else read_checkpoint(user_path(weights))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if weights == "pretrained":
            built = _pretrained_or_random(source, name, num_classes, seed)
        else:
            built = _built(source, name, False, num_classes, seed)
        inputs = built.example_inputs
        if inputs is None:
            inputs = (torch.randn(1, *built.preprocessing.input_size),)
        _initialize(built.module, inputs)
        if checkpoint is not None:
            built = _with_checkpoint(source, name, built, num_classes, seed, checkpoint)
    if weights == "random" and built.weights != "random":
        raise WeightsError(f"'{spec}' brings its own weights", "leave --weights random away")
    info = ModelInfo(name, source.name, built.weights, built.weights_detail, built.preprocessing, built.notes)
    set_evaluation_mode(built.module)
    return LoadedModel(built.module, info, inputs)


def _initialize(module: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Let lazy layers take the sizes that the example inputs have.

    Raises:
        CaptureError: the model does not run on them.
    """
    import torch
    from torch.nn.parameter import is_lazy

    from optc.frontend.capture import capture_error

    if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
        try:
            with torch.no_grad(), evaluation_mode(module):
                module(*inputs)
        except Exception as error:
            raise capture_error(module, error) from error


def find_source(spec: str) -> tuple[ModelSource, str]:
    """The source a model comes from and its name there.

    Raises:
        UnknownNameError: no source knows it; suggests the closest names of all.
    """
    table = registry().all("model source")
    prefix, colon, name = spec.partition(":")
    if colon and prefix in table:
        source = _source(prefix)
        if not _claims(source, name):
            raise UnknownNameError(f"{prefix} model", name, _names(source))
        return source, name
    known: dict[str, None] = {}
    hints = ["give a timm or torchvision name, package.module:factory, or a .pt2 file"]
    for each in table:
        try:
            source = _source(each)
            if _claims(source, spec):
                return source, spec
            known |= dict.fromkeys(_names(source))
        except OptcError as error:  # others may know it
            hints.append(str(error))
    raise UnknownNameError("model", spec, known, hint="; ".join(hints))


def _source(name: str) -> ModelSource:
    source: ModelSource = registry().make("model source", name)
    return source


def _claims(source: ModelSource, name: str) -> bool:
    with blamed("model source", source.name, source.origin):
        return source.claims(name)


def _names(source: ModelSource) -> Sequence[str]:
    with blamed("model source", source.name, source.origin):
        return source.names()


def _built(source: ModelSource, name: str, pretrained: bool, num_classes: int | None, seed: int) -> BuiltModel:
    with blamed("model source", source.name, source.origin):
        return source.build(name, pretrained=pretrained, num_classes=num_classes, seed=seed)


def _pretrained_or_random(source: ModelSource, name: str, num_classes: int | None, seed: int) -> BuiltModel:
    try:
        return _built(source, name, True, num_classes, seed)
    except PretrainedUnavailable as reason:
        built = _built(source, name, False, num_classes, seed)
        note = (
            f"pretrained weights for {name} could not be downloaded ({reason.message}):"
            " using random weights; accuracy cannot be measured"
        )
        return replace(built, notes=(note, *built.notes))


def _with_checkpoint(
    source: ModelSource, name: str, built: BuiltModel, num_classes: int | None, seed: int, checkpoint: Checkpoint
) -> BuiltModel:
    classes = classes_in_checkpoint(built.module, checkpoint)
    if classes is not None and num_classes is None and built.weights == "random":
        built = _built(source, name, False, classes, seed)
    apply_checkpoint(built.module, name, checkpoint)
    return replace(built, weights=checkpoint.file, weights_detail=f"sha256:{checkpoint.sha256}")
