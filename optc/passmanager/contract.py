"""The pass contract: what a pass is given, what it returns, and what its base class holds it to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, final

from optc.errors import PassContractError
from optc.machine import emulates_bf16, isa, saturates_int8
from optc.options import Options, checked
from optc.target import Target

if TYPE_CHECKING:
    from torch import Tensor

    from optc.budget import Budget
    from optc.program import Program


@dataclass(frozen=True)
class Numerics:
    """What a pass promises about the model's outputs, each compared with the captured model's.

    Attributes:
        exact: the outputs move by float rounding only.
        min_sqnr_db: for an approximate pass, the least signal-to-quantization-noise ratio of the outputs, in dB
            (10·log10(Σ ref² / Σ (ref − out)²)).
        min_top1_agreement: for an approximate pass, the least share of verification samples (0 to 1) whose arg-max
            stays the same; ``None`` does not check it.
    """

    exact: bool = True
    min_sqnr_db: float | None = None
    min_top1_agreement: float | None = None


EXACT = Numerics()


@dataclass(frozen=True)
class Change:
    """One rewrite that was made: ``rule`` (short kebab-case), the ``node`` it was made at, an optional ``detail``."""

    rule: str
    node: str
    detail: str = ""


@dataclass(frozen=True)
class Skip:
    """One rewrite that was considered and not made, with the reason in plain words."""

    rule: str
    node: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What :meth:`Pass.run` returns.

    Attributes:
        program: the program after the pass.
        modified: whether its graph or constants differ from what came in; checked against a fingerprint.
        applied: each rewrite made.
        skipped: each rewrite considered and not made, with a reason.
        account: rows of what a choice rests on, JSON-ready; kept in the record's notes.
    """

    program: Program
    modified: bool
    applied: tuple[Change, ...] = ()
    skipped: tuple[Skip, ...] = ()
    account: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class PassRecord:
    """What the history keeps of one leaf pass: JSON-ready, written into the artifact's manifest.

    Attributes:
        notes: what instruments have to say of it, by instrument name (such as ``{"timing": {"seconds": 0.12}}``).
    """

    name: str
    options: dict[str, Any]
    modified: bool
    applied: tuple[Change, ...]
    skipped: tuple[Skip, ...]
    notes: dict[str, Any] = field(default_factory=dict)


class Calibration(Protocol):
    """Input batches an approximate pass may look at; never what accuracy is evaluated on."""

    @property
    def description(self) -> str:
        """Where the batches come from, for the manifest (dataset, split, count, content hash)."""

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield tuples of input tensors, one per placeholder, dtype and shape as the program's inputs."""


class Instrument:
    """Watches passes from outside. Override what is needed; hooks fire for leaf passes only.

    ``after_pass`` fires in the order given and ``before_pass`` in reverse: the first instrument is the innermost.
    """

    name: ClassVar[str] = "instrument"

    def should_run(self, pass_: Pass, program: Program) -> bool:
        """Asked before each leaf pass; ``False`` skips it."""
        return True

    def before_pass(self, pass_: Pass, program: Program) -> None:
        """Called just before ``pass_`` runs on ``program``."""

    def after_pass(self, pass_: Pass, before: Program, after: Program, record: PassRecord) -> Any:
        """Called when ``pass_`` has run and its contract holds; a returned value is kept in ``record.notes[name]``."""


class Latency(Protocol):
    """Measures programs on a backend."""

    def __call__(self, programs: Sequence[Program], seconds: float = 0.0) -> list[float]:
        """Seconds that a query takes with each program, quickly found; NaN for what the backend cannot run.

        Args:
            seconds: how long to go on where the fastest are close.
        """
        ...


@dataclass(frozen=True)
class PassContext:
    """What a pass may know besides the program.

    Attributes:
        target: what the program will be lowered for.
        calibration: batches for passes that need activation ranges; ``None`` if there are none.
        instruments: watchers called around every leaf pass, innermost first.
        progress: called with a short text while a pass works (``"calibrating 12/32"``).
        budget: what may be lost of the task's metric, if the user says. Approximate passes ask it about what they make;
            its data is neither calibration's nor what accuracy is reported on.
        isa: instruction sets of the target's CPU that decide how int8 and bf16 run, as Linux spells them (``avx2``,
            ``avx512_vnni``, ``amx_int8`` …); this machine's unless said otherwise, ``None`` where nobody knows.
        note: called with a line that the user must see before the work goes on; kept in the report.
        latency: by backend, measures programs on it. Empty where nobody measures.
        node_times: measures a program's nodes in eager PyTorch, given the device (``"cpu"`` or ``"cuda"``), threads and
            images: median seconds of each by name, zero for what takes none. ``None`` where nobody measures.
        memory: bytes that the target's CPU processes may take together; ``None`` where nobody knows.
    """

    target: Target = field(default_factory=Target)
    calibration: Calibration | None = None
    instruments: Sequence[Instrument] = ()
    progress: Callable[[str], None] = lambda text: None
    budget: Budget | None = None
    isa: tuple[str, ...] | None = field(default_factory=isa)
    note: Callable[[str], None] = lambda text: None
    latency: Mapping[str, Latency] = field(default_factory=dict)
    node_times: Callable[[Program, str, int, int], Mapping[str, float]] | None = None
    memory: int | None = None

    @property
    def emulates_half(self) -> bool:
        """Whether the target converts bfloat16 and float16 to float32 and back for each operator."""
        return self.target.device == "cpu" and emulates_bf16(self.isa)

    @property
    def saturates_int8(self) -> bool:
        """Whether the target's int8 kernels add pairs of products in 16 bits, so that 8-bit weights may overflow."""
        return self.target.device == "cpu" and saturates_int8(self.isa)


class PassOptions(Options):
    """Base of a pass's typed options: frozen, unknown names refused. ``Field(description=…)`` documents each."""


class Pass(ABC):
    """A named transformation of a :class:`~optc.Program`.

    Subclasses set ``name`` and ``summary``, may set ``numerics`` and ``Options``, and write :meth:`run`. Calling the
    pass runs it under the contract: ``run`` gets a fork it may edit in place; afterwards the graph must lint, inputs
    and outputs must be what they were, ``modified`` must be honest and no shared tensor may have been written to.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    numerics: Numerics = EXACT
    Options: ClassVar[type[PassOptions]] = PassOptions
    origin: str = "this module"
    """Who provides the pass; set by the registry and named in errors."""

    def __init__(self, **options: Any) -> None:
        self.options = checked(self.Options, options, f"pass {self.name}", f"optc passes {self.name}")

    @abstractmethod
    def run(self, program: Program, context: PassContext) -> PassResult:
        """Transform ``program`` (a fork: edit it in place or build a new one) and say what was done and not done."""

    def leaves(self) -> Iterator[Pass]:
        """The passes that do the work: itself, or for a group its members."""
        yield self

    def __call__(self, program: Program, context: PassContext | None = None) -> PassResult:
        """Run under the contract and the context's instruments.

        Raises:
            PassContractError: the pass broke the contract.
            PluginError: the pass raised; the message names the pass and who provides it.
        """
        context = context or PassContext()
        if not all(instrument.should_run(self, program) for instrument in context.instruments):
            return PassResult(program, modified=False)
        for instrument in reversed(context.instruments):
            instrument.before_pass(self, program)
        return self._run_checked(program, context)

    @final
    def _run_checked(self, program: Program, context: PassContext) -> PassResult:
        from optc.passmanager import checks

        guard = checks.ContractGuard(self, program)
        with checks.blame(self):
            result = self.run(program.fork(), context)
        after = guard.check(result)
        record = PassRecord(
            name=self.name,
            options=self.options.model_dump(mode="json"),
            modified=result.modified,
            applied=result.applied,
            skipped=result.skipped,
            notes={"account": list(result.account)} if result.account else {},
        )
        for instrument in context.instruments:
            with checks.blame(self, f", {instrument.name}:"):
                note = instrument.after_pass(self, program, after, record)
            if note is not None:
                record.notes[instrument.name] = note
        after = replace(after, history=(*program.history, record))
        return replace(result, program=after)

    def __repr__(self) -> str:
        return f"<pass {self.name}>"


__all__ = [
    "EXACT",
    "Calibration",
    "Change",
    "Instrument",
    "Numerics",
    "Pass",
    "PassContext",
    "PassContractError",
    "PassOptions",
    "PassRecord",
    "PassResult",
    "Skip",
]
