"""Models by timm's names, with timm's own data configuration."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from optc.errors import OptcError, WeightsError
from optc.frontend.hub import unreachable
from optc.frontend.source import BuiltModel, ModelSource, PretrainedUnavailable
from optc.program import Preprocessing
from optc.torchvision_ops import declare_torchvision_ops

if TYPE_CHECKING:
    from torch import nn


class TimmSource(ModelSource):
    """PyTorch Image Models. ``name.tag`` picks one of several published weights, as in timm."""

    name = "timm"
    summary = "PyTorch Image Models by name: vit_huge_patch14_224, resnet50, convnext_tiny.fb_in22k, ..."

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.names())

    def names(self) -> Sequence[str]:
        return _timm().list_models()  # type: ignore[no-any-return]

    def claims(self, name: str) -> bool:
        architecture, _, tag = name.partition(".")
        return architecture in self._names and (not tag or name in _timm().list_models(pretrained=True))

    def build(self, name: str, *, pretrained: bool, num_classes: int | None, seed: int) -> BuiltModel:
        timm = _timm()
        options = {} if num_classes is None else {"num_classes": num_classes}
        if pretrained:
            config = timm.models.get_pretrained_cfg(name)
            if num_classes is not None and config is not None and num_classes != config.num_classes:
                raise WeightsError(
                    f"timm's pretrained weights for {name} have {config.num_classes} classes, not {num_classes}",
                    "use --weights PATH with a checkpoint of that many classes, or --weights random",
                )
            with _weights_at_hand(name, config), _quiet():
                try:
                    module = timm.create_model(name, pretrained=True)
                except (OSError, RuntimeError) as error:
                    raise PretrainedUnavailable(str(error)) from error
            tag = getattr(config, "tag", None) or "default"
            detail, weights = f"timm {timm.__version__} {name.partition('.')[0]}.{tag}", "pretrained"
        else:
            try:
                module = timm.create_model(name, pretrained=False, **options)
            except Exception as error:
                raise OptcError(f"timm cannot build {name}: {type(error).__name__}: {error}") from error
            detail, weights = f"seed {seed}", "random"
        preprocessing, notes = _preprocessing(module)
        return BuiltModel(module, preprocessing, weights, detail, notes=notes)


def _timm() -> Any:
    declare_torchvision_ops()
    import timm

    return timm


def _preprocessing(module: nn.Module) -> tuple[Preprocessing, tuple[str, ...]]:
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(module)
    channels, height, width = config["input_size"]
    notes: tuple[str, ...] = ()
    if config["crop_mode"] != "center":
        notes = (f"timm prepares images for this model with crop mode '{config['crop_mode']}'; optc crops the centre",)
    return (
        Preprocessing(
            input_size=(channels, height, width),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            resize=math.floor(min(height, width) / config["crop_pct"]),
        ),
        notes,
    )


@contextmanager
def _weights_at_hand(name: str, config: Any) -> Iterator[None]:
    """Make sure the weights are cached (then no request is made) or that their hub answers.

    Raises:
        PretrainedUnavailable: neither; timm itself would retry for most of a minute.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from timm.models import _hub

    if config is None or not config.has_weights:
        raise PretrainedUnavailable("timm publishes none for this model")
    if not config.hf_hub_id:
        reason = unreachable(config.url)
        if reason and not _hub.check_cached_file(config.url):
            raise PretrainedUnavailable(reason)
        yield
        return
    repository, revision = _hub.hf_split(config.hf_hub_id)
    wanted = config.hf_hub_filename or _hub.HF_WEIGHTS_NAME
    files = (*_hub._get_safe_alternatives(wanted), wanted)
    if any(isinstance(try_to_load_from_cache(repository, file, revision=revision), str) for file in files):
        offline = constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = offline
        return
    reason = unreachable(constants.ENDPOINT)
    if reason:
        raise PretrainedUnavailable(reason)
    yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the hub clients' retry and cache chatter off the user's terminal; errors are raised, not logged."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "httpx", "timm")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.getEffectiveLevel(), logging.ERROR))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
