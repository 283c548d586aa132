"""The backend and runner interfaces: a program becomes files, files become something that runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from optc.errors import BackendError
from optc.lowering.kernel_times import KernelTime
from optc.options import Options, checked
from optc.target import Target

if TYPE_CHECKING:
    from torch import Tensor

    from optc.program import Program

Array = NDArray[Any]


@dataclass(frozen=True)
class Lowered:
    """What a backend wrote.

    Attributes:
        files: file names inside the folder, the one to load first.
        details: facts worth keeping in the manifest (opset, operator counts, decomposed composites, fallbacks).
        run_script: text of the artifact's ``run.py``, which runs the files with the runtime alone; empty if there is
            none, and then ``details["no_run_script"]`` may say why.
        required_isa: instruction sets that the files were compiled for, as Linux spells them; a CPU that lacks one is
            refused. Of those that ``|`` separates one will do.
        provider, precision: of a runner over the files for the target, where :meth:`Backend.lower` opened one;
            otherwise one is opened to see.
    """

    files: tuple[str, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    run_script: str = ""
    required_isa: tuple[str, ...] = ()
    provider: str = ""
    precision: str = ""


class Runner(ABC):
    """A loaded model. Callable on arrays; says what really runs, not what was asked for.

    Attributes:
        provider: the runtime and execution provider in use, such as ``"onnxruntime CPUExecutionProvider"``.
        precision: what the arithmetic runs in, such as ``"float32"``, ``"bfloat16"`` or ``"int8 (8 of 8 layers)"``.
        concurrency: how many calls, each from a thread of its own, are worth making at a time.
    """

    provider: str
    precision: str
    concurrency: int = 1

    @abstractmethod
    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        """Run one query: one array per model input, batch first, as float32 unless the model says otherwise."""

    def run_tensors(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run one query on tensors, for a caller that has those; where they are and their types may change.

        By way of arrays, unless the runtime takes tensors: types that numpy has not go as float32.
        """
        import torch

        from optc.lowering.agreement import as_array

        return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in self(*map(as_array, inputs)))

    def close(self) -> None:
        """Free what the runner holds; calling it afterwards is an error."""


class BackendOptions(Options):
    """Base of a backend's typed options: frozen, unknown names refused. ``Field(description=…)`` documents each."""


class Backend(ABC):
    """Lowers programs to one runtime. Never rewrites semantics; may decompose composite operators.

    Subclasses set ``name`` and ``summary``, may set ``Options``, and write :meth:`lower` and :meth:`load`.

    Attributes:
        automatic: whether ``--backend auto`` may choose it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    automatic: ClassVar[bool] = True
    Options: ClassVar[type[BackendOptions]] = BackendOptions
    origin: str = "this module"

    @classmethod
    def options(cls, target: Target) -> Any:
        """The backend's options, of the class :attr:`Options`: the target's, where it does not say the defaults.

        Raises:
            UnknownNameError: the target has an option that the backend does not take.
            OptcError: a value does not fit its type.
        """
        return checked(
            cls.Options, target.options.get(cls.name, {}), f"backend {cls.name}", f"optc backends {cls.name}"
        )

    @classmethod
    def unavailable(cls, target: Target) -> str | None:
        """Why the backend cannot run here (one line with the mend), or ``None`` if it can."""
        return None

    @classmethod
    def simulates_quantization(cls, target: Target) -> bool:
        """Whether quantized layers are computed in float there, so that no format of them saves time."""
        return False

    @classmethod
    def measures_to_lower(cls, target: Target) -> bool:
        """Whether :meth:`lower` measures, so that nothing is to be lowered to another backend meanwhile."""
        return False

    @abstractmethod
    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        """Write the runtime's own files into ``folder``.

        Raises:
            BackendError: the program cannot be lowered; names the nodes and reasons.
        """

    @contextmanager
    def started(self, program: Program, target: Target, folder: Path) -> Iterator[Callable[[], Lowered]]:
        """Begin to lower, as a context; calling what it gives does the rest and returns what :meth:`lower` would.

        A backend that compiles in a process of its own starts it on entry, so that others can lower meanwhile, and
        stops it on exit if it still runs.
        """
        yield partial(self.lower, program, target, folder)

    def variants(self, lowered: Lowered, target: Target, folder: Path) -> Sequence[tuple[Mapping[str, Any], Lowered]]:
        """Other ways to run what :meth:`lower` wrote that may be faster on the target; each is measured beside it.

        Nothing else is measured or compiled meanwhile, so that this may measure.

        Args:
            folder: where ``lowered.files`` are; files of other names may be added.

        Returns:
            Options of the backend's own, of those that the target does not give, and ``lowered`` as it is with them,
            which may have another run script and other files.
        """
        return ()

    @abstractmethod
    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> Runner:
        """Load what :meth:`lower` wrote. Runs no Python from the files; machine code is what a backend may load.

        Raises:
            BackendError: the runtime refuses the files.
        """

    def profile(
        self, folder: Path, files: tuple[str, ...], target: Target, inputs: Sequence[Array]
    ) -> Sequence[KernelTime]:
        """How long each operator takes for a query of ``inputs``, by the runtime's own profiler, in order.

        Raises:
            BackendError: the runtime has no such profiler, or refuses the files.
        """
        raise BackendError(f"the {self.name} backend cannot tell how long its operators take")


__all__ = ["Array", "Backend", "BackendOptions", "Lowered", "Runner"]
