"""Lowering a program to one backend, or to every backend that takes it."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optc.errors import BackendError, OptcError
from optc.lowering.backend import Backend, Lowered, Runner
from optc.machine import available_memory
from optc.options import options_text
from optc.plugins.registry import ELSEWHERE, registry
from optc.target import Target

if TYPE_CHECKING:
    from optc.program import Program

AUTO = "auto"
"""The name that stands for every backend that runs here."""
_SIDE_BY_SIDE_SHARE = 0.1
"""Most of the free memory that a program's constants may take for backends to be lowered to side by side: a compiling
process and an exporter hold several copies of them each."""


_RAN_OUT = re.compile(
    r"out of memory|bad_alloc|(not enough|allocat\w*) (\w+ )*memory|memory exhausted|failed to allocate|killed signal"
    r"|no space left|disk quota",
    re.IGNORECASE,
)
"""How allocators, compilers and file systems say that they had no more to give."""


class Passing(str):
    """The reason of a failure that may go well another time, so that no choice is to be remembered."""


def reason_of(error: OptcError) -> str:
    """An error as a reason, marked if it is a :class:`Passing` one: it says so, or memory or disk space ran out."""
    passing = isinstance(error, BackendError) and error.passing
    return Passing(error) if passing or _RAN_OUT.search(str(error)) else str(error)


@dataclass(frozen=True)
class Lowering:
    """A program in one runtime's files, opened once to see what really runs.

    Attributes:
        folder: where the files are.
        provider, precision: what the runner told.
        seconds: time to lower, check and load; where other backends were lowered to meanwhile, their share included.
        passes: the list of passes that made the program, where there are several.
        options: the backend's options that it runs with besides those asked for.
    """

    backend: Backend
    lowered: Lowered
    folder: Path
    target: Target
    provider: str
    precision: str
    seconds: float
    passes: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Backend, passes and options, as tables name it."""
        return " ".join(filter(None, (self.backend.name, self.passes, options_text(self.options))))

    @property
    def files(self) -> list[Path]:
        """The runtime's files."""
        return [self.folder / name for name in self.lowered.files]

    @property
    def bytes(self) -> int:
        """Size of the files."""
        return sum(file.stat().st_size for file in self.files)

    def load(self) -> Runner:
        """A new runner over the files; the caller closes it."""
        return self.backend.load(self.folder, self.lowered.files, self.target)


def backends(name: str, target: Target) -> tuple[list[Backend], dict[str, str]]:
    """The backends that ``name`` asks for, ready to run, and why others were left out.

    Args:
        name: a backend's, or ``"auto"`` for all that run on the target and say that they may be chosen.

    Raises:
        OptcError: the backend of that name, or every one, cannot run here; carries the reasons. Or the target's options
            are for a backend not asked for, or none that it takes.
    """
    for each in target.options:
        options = registry().load("backend", each).options
        if name not in (AUTO, each):
            raise OptcError(f"the backend is '{name}', and there are options for '{each}'", "leave them out")
        options(target)
    if name != AUTO:
        return [_ready(name, target)], {}
    found: list[Backend] = []
    refused: dict[str, str] = {}
    for each in registry().all("backend"):
        with kept(refused, each, registry().get("backend", each).plugin):
            cls = registry().load("backend", each)
            if reason := cls.unavailable(target):
                refused[each] = reason
            elif cls.automatic:
                cls.simulates_quantization(target)  # asked for later where nothing keeps what goes wrong as a reason
                found.append(cls())
    for kind, each in ELSEWHERE:
        if kind == "backend" and target.device == "cpu" and each not in registry().all(kind):  # none is of another's
            refused[each] = str(registry().absent(kind, each))
    if not found:
        reasons = "; ".join(f"{each}: {reason}" for each, reason in refused.items())
        raise OptcError(f"no backend can run here: {reasons}")
    return found, refused


def _ready(name: str, target: Target) -> Backend:
    with kept({}, name, registry().get("backend", name).plugin, alone=True):
        cls = registry().load("backend", name)
        reason = cls.unavailable(target)
        if reason:
            raise OptcError(f"backend '{name}' cannot run here: {reason}")
        cls.simulates_quantization(target)
        backend: Backend = cls()
    return backend


def lower(backend: Backend, program: Program, target: Target, folder: Path) -> Lowering:
    """Lower to one backend into ``folder`` (made here), load the result once, and compare it with the graph where the
    backend has not.

    Raises:
        BackendError: the backend cannot lower the program or load what it wrote, or that computes something else.
    """
    with _begun(backend, program, target, folder) as finish:
        return finish()


@contextmanager
def _begun(backend: Backend, program: Program, target: Target, folder: Path) -> Iterator[Callable[[], Lowering]]:
    start = time.perf_counter()
    folder.mkdir()
    with backend.started(program, target, folder) as finish:

        def rest() -> Lowering:
            lowered = finish()
            if absent := [name for name in lowered.files if not (folder / name).is_file()]:
                raise BackendError(f"backend '{backend.name}' (from {backend.origin}) wrote no {', '.join(absent)}")
            if not (lowered.provider and "check" in lowered.details):
                lowered = _looked_at(backend, lowered, program, target, folder)
            seconds = time.perf_counter() - start
            return Lowering(backend, lowered, folder, target, lowered.provider, lowered.precision, seconds)

        yield rest


def _looked_at(backend: Backend, lowered: Lowered, program: Program, target: Target, folder: Path) -> Lowered:
    """What a backend wrote, with what a runner over it tells, compared with the graph where the backend has not."""
    from optc.lowering.agreement import check_agreement  # imports torch

    with closing(backend.load(folder, lowered.files, target)) as runner:
        details = dict(lowered.details)
        if "check" not in details:
            details["check"] = check_agreement(backend.name, program, runner, target.batch).details()
        return replace(lowered, details=details, provider=runner.provider, precision=runner.precision)


def lower_all(
    chosen: list[Backend],
    program: Program,
    target: Target,
    folder: Path,
    progress: Callable[[str], None],
    needed: bool = True,
) -> tuple[list[Lowering], dict[str, str]]:
    """Lower to each backend into a folder of its name; those that cannot are returned with their reason.

    Backends that compile in a process of their own do so while the others are lowered, where memory allows and none of
    those measures meanwhile.

    Args:
        needed: whether one has to.

    Raises:
        BackendError: none can, or the only one cannot, and one is ``needed``.
    """
    done: list[Lowering] = []
    refused: dict[str, str] = {}
    alone = needed and len(chosen) == 1
    with ExitStack() as stack:
        begun: dict[str, Callable[[], Lowering]] = {}
        quiet = any(backend.measures_to_lower(target) for backend in chosen)
        if not quiet and program.constant_bytes() <= _SIDE_BY_SIDE_SHARE * available_memory():
            for backend in filter(has_own_process, chosen):
                with kept(refused, backend.name, backend.origin, alone):
                    context = _begun(backend, program, target, folder / backend.name)
                    begun[backend.name] = stack.enter_context(context)
        for backend in sorted(chosen, key=has_own_process):
            if backend.name in refused:
                continue
            progress(f"lowering to {backend.name}")
            with kept(refused, backend.name, backend.origin, alone):
                finish = begun.get(backend.name)
                done.append(finish() if finish else lower(backend, program, target, folder / backend.name))
    for name in refused:  # what they wrote until then may be gigabytes
        shutil.rmtree(folder / name, ignore_errors=True)
    if not done and needed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        passing = any(isinstance(reason, Passing) for reason in refused.values())
        raise BackendError(f"no backend takes this model: {reasons}", passing=passing)
    return done, refused


def has_own_process(backend: Backend) -> bool:
    """Whether a backend compiles in a process of its own: it takes seconds then, however small the program."""
    return type(backend).started is not Backend.started


@contextmanager
def kept(
    refused: dict[str, str], name: str, origin: str, alone: bool = False, key: str | None = None
) -> Iterator[None]:
    """Keep a backend's refusal as a reason under ``key``, its name by default, unless it was the only one asked for.

    What is not raised on purpose counts as :class:`Passing`.

    Args:
        name, origin: of the backend; what goes wrong inside it has both.
    """
    key = name if key is None else key
    try:
        yield
    except OptcError as error:
        if alone:
            raise
        refused[key] = reason_of(error)
    except Exception as error:
        text = next(iter(str(error).strip().splitlines()), "")
        what = f"backend '{name}' (from {origin}) raised {type(error).__name__}: {text}"
        if alone:
            raise BackendError(what, "run with -v for the traceback", passing=True) from error
        refused[key] = Passing(what)
