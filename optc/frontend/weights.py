"""Checkpoints: reading them without executing anything, and checking that they fit a model."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from optc.errors import WeightsError

_NESTS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 3


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint file by parameter name, and the file's name and SHA-256."""

    file: str
    sha256: str
    state: Mapping[str, Tensor]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a ``.safetensors`` file, or a ``.pt``/``.pth`` file of nothing but tensors. Never executes code from it.

    Tensors stay memory-mapped where the format allows. A state dict nested in a training checkpoint is found, and
    prefixes that wrappers leave on every name (``module.``, ``_orig_mod.``, ``model.``) are taken off.

    Raises:
        WeightsError: there is no such file, or it is not such a checkpoint.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise WeightsError(f"weights file '{path}' {what}", "--weights takes pretrained, random or a checkpoint file")
    if path.suffix == ".safetensors":
        try:
            state: Any = load_file(path)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"'{path}' is not a readable safetensors file: {error}") from error
    elif path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        state = _torch_load(path)
    else:
        raise WeightsError(f"'{path}' is no kind of checkpoint optc reads", "use .safetensors, .pt or .pth")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Checkpoint(path.name, sha256, _state_dict(path, state))


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"'{path}' holds Python objects besides tensors, which optc does not load",
            "save model.state_dict() as safetensors",
        ) from None
    except Exception as first:
        try:  # Files from before PyTorch 1.6 cannot be memory-mapped.
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception:
            raise WeightsError(f"'{path}' is not a readable PyTorch checkpoint: {first}") from first


def _state_dict(path: Path, state: Any) -> dict[str, Tensor]:
    for nest in _NESTS:
        if isinstance(state, dict) and isinstance(state.get(nest), dict):
            state = state[nest]
            break
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())
    ):
        raise WeightsError(f"'{path}' holds no state dict (names to tensors)", "save model.state_dict()")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def _named_as(ours: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state by a module's own names: where that is a wrapper itself, prefixes were taken off that belong there."""
    prefix = ""
    for each in _PREFIXES:
        if ours and all(name.startswith(prefix + each) for name in ours):
            prefix += each
    if not prefix or ours.keys() & state.keys():
        return state
    return {prefix + name: value for name, value in state.items()}


def classes_in_checkpoint(module: nn.Module, checkpoint: Checkpoint) -> int | None:
    """Number of classes of a checkpoint's classifier, if that is all in which it differs from the model.

    So it is when every tensor of another shape differs in its first dimension alone, and all by the same two sizes.
    """
    sizes = set()
    own = module.state_dict()
    state = _named_as(own, checkpoint.state)
    for name, ours in own.items():
        theirs = state.get(name)
        if theirs is not None and theirs.shape != ours.shape:
            if theirs.ndim != ours.ndim or theirs.ndim == 0 or theirs.shape[1:] != ours.shape[1:]:
                return None
            sizes.add((theirs.shape[0], ours.shape[0]))
    return sizes.pop()[0] if len(sizes) == 1 else None


def apply_checkpoint(module: nn.Module, model: str, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint into a module, converting data types as needed.

    Args:
        model: what to call the module in errors.

    Raises:
        WeightsError: a name is missing or unexpected, or a shape differs; names the first few.
    """
    ours = module.state_dict()
    state = _named_as(ours, checkpoint.state)
    # Batch norm counts its training batches there; inference never reads it and old checkpoints lack it.
    missing = [n for n in ours if n not in state and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in state if n not in ours]
    misshapen = [
        f"{name} is {_shape(value)}, the model's {_shape(ours[name])}"
        for name, value in state.items()
        if name in ours and value.shape != ours[name].shape
    ]
    problems = [
        f"{len(names)} {kind} ({_few(names)})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise WeightsError(f"'{checkpoint.file}' does not fit {model}: {', '.join(problems)}", "is it this model's?")
    module.load_state_dict(state, strict=False)


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return "; ".join(names[:_SHOWN]) + ("; ..." if len(names) > _SHOWN else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
