"""Batches of model inputs as callers give them, and calls in batches of the one size that a model may take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from optc.errors import DataError

if TYPE_CHECKING:
    from optc.passmanager.contract import Calibration
    from optc.program import Program


class Batches:
    """Any iterable of tensors or tuples of tensors as a :class:`~optc.Calibration`.

    Where the program takes one batch size only, they are put together and cut to it; what is left over at the end is
    not used.

    Args:
        what: what the batches are, for errors.

    Raises:
        DataError: when iterated: a batch does not fit the program.
    """

    def __init__(
        self, batches: Iterable[Tensor | tuple[Tensor, ...]], program: Program, what: str = "calibration"
    ) -> None:
        self.description = getattr(batches, "description", "batches given by the caller")
        self._batches = batches if hasattr(batches, "__len__") else list(batches)
        self._what = what
        self._examples = program.example_inputs
        self._size = fixed_batch(program)
        # A fixed program may have inputs that are no batch: then none can be put together or cut.
        self._as_they_are = self._size is not None and any(len(each) != self._size for each in self._examples)

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]  # lists and calibrations have one

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        held: tuple[Tensor, ...] | None = None
        for number, batch in enumerate(self._batches, 1):
            tensors = (batch,) if isinstance(batch, Tensor) else tuple(batch)
            self._check(tensors, f"{self._what} batch {number} of '{self.description}'")
            tensors = tuple(tensor.to(example.device) for tensor, example in zip(tensors, self._examples, strict=True))
            if self._size is None or self._as_they_are:
                yield tensors
            else:
                held = tensors if held is None else tuple(map(torch.cat, zip(held, tensors, strict=True)))
                while len(held[0]) >= self._size:
                    yield tuple(tensor[: self._size] for tensor in held)
                    held = tuple(tensor[self._size :] for tensor in held)

    def _check(self, tensors: tuple[Tensor, ...], what: str) -> None:
        wanted = self._examples
        if len(tensors) != len(wanted):
            raise DataError(f"{what} has {len(tensors)} tensors, the model takes {len(wanted)}", "give one per input")
        for tensor, example in zip(tensors, wanted, strict=True):
            if tensor.shape[1:] != example.shape[1:] or tensor.dtype != example.dtype:
                raise DataError(f"{what} is {_kind(tensor)}, the model takes {_kind(example)}", "give what it takes")
            if self._as_they_are and len(tensor) != len(example):
                taken = tuple(example.shape)
                raise DataError(f"{what} has a tensor of {tuple(tensor.shape)}", f"the model takes {taken} only")


def _kind(tensor: Tensor) -> str:
    sizes = ", ".join(["batch", *map(str, tensor.shape[1:])]) if tensor.ndim else ""
    return f"{str(tensor.dtype).removeprefix('torch.')} ({sizes})"


def as_calibration(
    given: Calibration | Iterable[Tensor | tuple[Tensor, ...]] | None, program: Program
) -> Calibration | None:
    """What the caller gave, as calibration batches that the program takes."""
    return None if given is None else Batches(given, program)


def fixed_batch(program: Program) -> int | None:
    """The one batch size a program takes; ``None`` if it takes any."""
    return None if program.dynamic_batch else program.example_inputs[0].shape[0]


def at_batch(inputs: tuple[Tensor, ...], program: Program, batch: int) -> tuple[Tensor, ...]:
    """Inputs with as many samples as a query has: cut, or repeated; as they are where the program takes no other."""
    if fixed_batch(program) is not None:
        return inputs
    samples = torch.arange(batch) % len(inputs[0])
    return tuple(tensor[samples.to(tensor.device)] for tensor in inputs)


def first_samples(batches: Iterable[tuple[Tensor, ...]], program: Program) -> tuple[Tensor, ...]:
    """As many samples as the program's example inputs have, which are given back if there are too few.

    Runtimes are compared with the graph on example inputs. On noise, activations leave the ranges that calibration
    found, and a runtime that fuses a rounding away does not clip them there as the graph does.
    """
    wanted = program.example_inputs
    taken: list[tuple[Tensor, ...]] = []
    for batch in batches:
        taken.append(batch)
        if sum(len(tensors[0]) for tensors in taken) >= len(wanted[0]):
            return tuple(
                torch.cat(column)[: len(example)].to(example.device)
                for column, example in zip(zip(*taken, strict=True), wanted, strict=True)
            )
    return wanted


def in_batches_of(size: int | None, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` for any number of samples, though it takes ``size`` at a time: the last part is filled up by repeating
    its last sample. ``None`` leaves it as it is. Outputs are tensors with the batch first.
    """
    if size is None:
        return call

    def batched(*inputs: Tensor) -> Any:
        count = len(inputs[0])
        indices = torch.arange(-(-count // size) * size).clamp(max=count - 1)
        parts = [call(*(tensor[part] for tensor in inputs)) for part in indices.split(size)]
        return pytree.tree_map(lambda *tensors: torch.cat(tensors)[:count], *parts)

    return batched
