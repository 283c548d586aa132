"""What type checkers must make of the public interface; checked by mypy, never run."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import torch

import optc
from optc import Backend, Lowered, Pass, PassContext, PassManager, PassResult, Program, Runner, Skip, Target
from optc.lowering.backend import Array


def captures(model: torch.nn.Module, image: torch.Tensor) -> None:
    program = optc.capture(model, (image,))
    assert_type(program, Program)
    assert_type(program.run(image), tuple[torch.Tensor, ...])
    assert_type(program.fork(), Program)


class Nothing(Pass):
    name = "nothing"
    summary = "Do nothing."

    def run(self, program: Program, context: PassContext) -> PassResult:
        assert_type(context.target, Target)
        return PassResult(program, modified=False)


def runs(program: Program) -> None:
    result = PassManager([Nothing()])(program)
    assert_type(result, PassResult)
    assert_type(result.program, Program)
    assert_type(result.skipped, tuple[Skip, ...])


def lowers(backend: Backend, program: Program, image: Array) -> None:
    lowered = backend.lower(program, Target(), Path())
    assert_type(lowered, Lowered)
    runner = backend.load(Path(), lowered.files, Target())
    assert_type(runner, Runner)
    assert_type(runner(image), tuple[Array, ...])


class Wrong(Pass):
    name = "wrong"
    summary = "Forget to return a result."

    def run(self, program: Program, context: PassContext) -> None:  # type: ignore[override]
        return None


Target(device=3)  # type: ignore[arg-type]
Pass()  # type: ignore[abstract]
