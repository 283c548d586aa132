"""Quick latencies: what a query is, and what cannot run."""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

import optc
from optc.bench.latency import latencies
from optc.errors import BackendError
from optc.lowering.backend import Array, Lowered, Runner
from optc.lowering.eager import EagerBackend
from optc.program import Program
from optc.target import Target


class Watched(EagerBackend):
    """Eager PyTorch that notes the batch of each query, and refuses models of three outputs."""

    def __init__(self) -> None:
        self.batches: set[int] = set()
        self.opened = self.open = self.most = 0

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        if program.graph.output_node().args[0][0].meta["val"].shape[-1] == 3:  # type: ignore[index, union-attr]
            raise BackendError("three are too many")
        lowered = super().lower(program, target, folder)
        self.batches.clear()  # what was asked to compare it with the graph
        return lowered

    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> Runner:
        runner, batches, backend = super().load(folder, files, target), self.batches, self
        self.opened += 1
        self.open += 1
        self.most = max(self.most, self.open)

        class Noting(Runner):
            provider, precision = runner.provider, runner.precision

            def close(self) -> None:
                backend.open -= 1
                runner.close()

            def __call__(self, *inputs: Array) -> tuple[Array, ...]:
                batches.add(len(inputs[0]))
                return runner(*inputs)

        return Noting()


def captured(outputs: int, dynamic: bool = True) -> Program:
    program = optc.capture(nn.Linear(4, outputs).eval(), (torch.randn(2, 4),))
    assert program.dynamic_batch
    program.dynamic_batch = dynamic
    return program


def test_a_query_has_the_targets_batch_where_that_may_vary() -> None:
    for batch, dynamic, asked in ((1, True, 1), (2, True, 2), (1, False, 2)):
        backend = Watched()
        (seconds,) = latencies([captured(5, dynamic)], backend, Target(threads=1, batch=batch))
        assert backend.batches == {asked}
        assert np.isfinite(seconds)


def test_what_cannot_be_lowered_takes_no_number() -> None:
    found = latencies([captured(3), captured(5)], Watched(), Target(threads=1))
    assert math.isnan(found[0])
    assert found[1] > 0


class Broken(Watched):
    """Has bugs: in lowering models of six outputs, in loading those of seven, in running those of eight."""

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        self.outputs = program.graph.output_node().args[0][0].meta["val"].shape[-1]  # type: ignore[index, union-attr]
        if self.outputs == 6:
            raise NotImplementedError("six")
        lowered = super().lower(program, target, folder)
        (folder / f"{self.outputs}").touch()
        return lowered

    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> Runner:
        loads = len(list(folder.glob("loaded*")))
        (folder / f"loaded{loads}").touch()
        if loads and (folder / "7").exists():  # the first time it is compared with the graph
            raise KeyError("seven")
        return Failing() if loads and (folder / "8").exists() else super().load(folder, files, target)


class Failing(Runner):
    provider = precision = ""

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        raise ZeroDivisionError("eight")


def test_a_bug_in_a_backend_takes_no_number_either() -> None:
    backend = Broken()
    found = latencies([captured(outputs) for outputs in (5, 6, 7, 8)], backend, Target(threads=1))
    assert found[0] > 0
    assert all(map(math.isnan, found[1:]))
    assert backend.open == 0


def test_rivals_are_opened_twice_and_all_closed() -> None:
    backend = Watched()
    found = latencies([captured(5), captured(6)], backend, Target(threads=1))
    assert all(seconds > 0 for seconds in found)
    checked = 2  # lowering loads each to compare it with the graph
    assert backend.opened in (checked + 4, checked + 3), "again half-way, unless one was hopeless by then"
    assert backend.most == 2
    assert backend.open == 0


class Sleeping(Watched):
    """Takes 0.4 milliseconds for each of the model's outputs, and counts the queries of each."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = Counter[int]()

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        outputs = program.graph.output_node().args[0][0].meta["val"].shape[-1]  # type: ignore[index, union-attr]
        (folder / str(outputs)).touch()
        return super().lower(program, target, folder)

    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> Runner:
        runner, queries = super().load(folder, files, target), self.queries
        outputs = next(int(path.name) for path in folder.iterdir() if path.name.isdigit())

        class Slept(Runner):
            provider, precision = runner.provider, runner.precision

            def close(self) -> None:
                runner.close()

            def __call__(self, *inputs: Array) -> tuple[Array, ...]:
                queries[outputs] += 1
                time.sleep(outputs / 2500)
                return runner(*inputs)

        return Slept()


def test_what_is_close_to_the_fastest_goes_on_for_the_time_given() -> None:
    quick, long = Sleeping(), Sleeping()
    programs = [captured(outputs) for outputs in (20, 21, 30)]
    latencies(programs, quick, Target(threads=1))
    latencies(programs, long, Target(threads=1), seconds=2.0)
    assert quick.queries[20] == quick.queries[21] == quick.queries[30] == long.queries[30]
    assert min(long.queries[20], long.queries[21]) > 1.5 * quick.queries[20]
