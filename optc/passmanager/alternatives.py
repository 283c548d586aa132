"""Alternatives: lists of passes that are all run, so that the fastest of their results can be kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optc.errors import DataError, OptcError, UnknownNameError
from optc.ops.costs import node_costs
from optc.passmanager.contract import Pass, PassContext
from optc.passmanager.manager import PassManager, build_passes, read_pass
from optc.program import Program

AUTO = "auto"
"""The name that stands for :data:`AUTO_PASSES`."""
QUANT = "quant"
MIXED = "fuse,quant<formats=auto>"
AUTO_PASSES = ("fuse,quant", MIXED, "fuse,quant,bf16", "fuse,quant,fp16", "fuse,bf16", "fuse,fp16", "fuse")
"""Each precision a CPU or GPU may be fastest in; of the half ones :data:`OTHER_HALF` is left out. The first list tells
which backends are worth trying the others on."""
OTHER_HALF = {"cpu": "fp16", "cuda": "bf16"}
"""The pass for the type of 16 bits that is not tried on a device: GPUs compute in both, and more kernels take fp16.
Where that comes to nothing, as its numbers end at 65504, the other one is tried there."""
INTENSITY = 10.0
"""Operations for each byte of weights below which reading them takes most of a model's time (S. Williams et al.,
"Roofline", CACM 52(4), 2009). At batch 1 AlexNet has 6, MobileNetV3 11 and 20, ResNet-50 and transformers over 80."""
SEPARATOR = " | "


@dataclass(frozen=True)
class Made:
    """What alternatives came to.

    Attributes:
        programs: by the list of passes that made them.
        dropped: why there is none of other lists.
        given: what the passes had besides the model and their options: calibration data and budget, JSON-ready.
    """

    programs: Mapping[str, Program]
    dropped: Mapping[str, str]
    given: Mapping[str, Any] = field(default_factory=dict)

    def without(self, passes: str, reason: str) -> Made:
        """The same with one list dropped."""
        programs = {each: program for each, program in self.programs.items() if each != passes}
        return Made(programs, {**self.dropped, passes: reason}, self.given)


class Alternatives:
    """One or several lists of passes. Of several the one is kept whose program turns out fastest.

    Attributes:
        lists: the pass manager of each list, by its text; the text of a single list is empty.
        automatic: whether nobody asked for these lists in particular.
    """

    def __init__(self, lists: Mapping[str, PassManager], automatic: bool = False) -> None:
        self.lists, self.automatic = dict(lists), automatic

    @classmethod
    def of(
        cls,
        passes: str | Sequence[str | Pass] | PassManager | Alternatives,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Alternatives:
        """From ``"fuse,quant"``, a list of passes, ``"fuse,quant | fuse,bf16"`` or ``"auto"``.

        Args:
            options: by pass name, its options, in every list that has the pass.

        Raises:
            UnknownNameError: a pass or option nobody registered, or options for a pass that is in no list.
            OptcError: an option's value does not fit its type, or a list among several cuts the model into stages; or
                there are options for passes that are made already.
        """
        if isinstance(passes, Alternatives | PassManager):
            if options:
                raise OptcError(
                    f"options for '{next(iter(options))}' come too late for passes that are made already",
                    "give them to the passes themselves",
                )
            return passes if isinstance(passes, Alternatives) else cls({"": passes})
        if not isinstance(passes, str):
            return cls({"": build_passes(passes, options)})
        automatic = passes.strip() == AUTO
        texts = AUTO_PASSES if automatic else tuple(passes.split(SEPARATOR.strip()))
        if len(texts) == 1:
            return cls({"": build_passes(texts[0], options)})
        given = options or {}
        lists = {}
        for text in texts:
            items = [item.strip() for item in text.split(",") if item.strip()]
            names = [read_pass(item)[0] for item in items]
            lists[",".join(items)] = build_passes(items, {name: given[name] for name in names if name in given})
        known = [each.name for manager in lists.values() for each in manager.passes]
        if unused := [name for name in given if name not in known]:
            raise UnknownNameError("pass in the options", unused[0], known, hint="add it to the passes")
        if "partition" in known:
            raise OptcError("pass 'partition' cannot be in one of several lists of passes", "give one list")
        return cls(lists, automatic)

    @property
    def first(self) -> PassManager:
        """The first list."""
        return next(iter(self.lists.values()))

    def unquantized(self) -> Alternatives:
        """The same lists without the pass that quantizes; of those that then do the same, one."""
        lists: dict[str, PassManager] = {}
        for text, manager in self.lists.items():
            items = [item for item in text.split(",") if read_pass(item)[0] != QUANT]
            lists[",".join(items)] = PassManager([each for each in manager.passes if each.name != QUANT])
        return Alternatives(lists if len(lists) > 1 else {"": next(iter(lists.values()))}, self.automatic)

    def exact(self) -> Alternatives:
        """The passes of the first list that promise exact outputs."""
        return Alternatives({"": PassManager([each for each in self.first.leaves() if each.numerics.exact])})

    def run(self, program: Program, context: PassContext, progress: Callable[[str], None] = lambda text: None) -> Made:
        """Run every list; what several lists begin with is run once.

        Of several, those that fail verification, or cannot run, are left out with the reason.

        Raises:
            OptcError: every list failed, or the only one; what is wrong with data is always raised.
        """
        if len(self.lists) == 1:
            ((text, manager),) = self.lists.items()
            return Made({text: manager(program, context).program}, {}, _given(context))
        made: dict[tuple[str, ...], Program] = {(): program}
        programs: dict[str, Program] = {}
        prints: dict[str, str] = {}
        dropped: dict[str, str] = {}
        failure: OptcError | None = None
        device = context.target.device
        other = OTHER_HALF.get(device) if self.automatic else None
        stands_in = {text: any(each.name == other for each in manager.passes) for text, manager in self.lists.items()}
        for text, manager in sorted(self.lists.items(), key=lambda item: stands_in[item[0]]):
            if stands_in[text] and (device == "cpu" or text.replace("bf16", "fp16") in programs):
                continue
            if reason := self._pointless(text, manager, program, context):
                dropped[text] = reason
                continue
            progress(text)
            try:
                result = _run(manager, made, context)
            except DataError:
                raise
            except OptcError as error:
                failure, dropped[text] = failure or error, str(error)
                continue
            twin = prints.setdefault(result.fingerprint(contents=True), text)
            if twin == text:
                programs[text] = result
            else:
                dropped[text] = f"does the same as {twin} here"
        if not programs and failure is not None:
            raise failure
        return Made(programs, dropped, _given(context))

    def _pointless(self, text: str, manager: PassManager, program: Program, context: PassContext) -> str:
        """Why a list that nobody asked for cannot be faster than the others, or takes too long to find out."""
        if not self.automatic:
            return ""
        if context.target.device != "cpu":
            return "layers are measured in each format on CPUs only" if text == MIXED else ""
        if context.emulates_half and any(each.name == "bf16" for each in manager.passes):
            return "this CPU has no bfloat16 arithmetic"
        if text == MIXED:
            if not context.latency:
                return "no backend measures layers"
            costs = node_costs(program, context.target.batch)
            intensity = sum(cost.operations for cost in costs) / max(1, program.constant_bytes())
            if intensity >= INTENSITY:
                return f"weights of fewer bits save little where each byte of them is used {intensity:.0f} times"
        return ""


def _run(manager: PassManager, made: dict[tuple[str, ...], Program], context: PassContext) -> Program:
    """Run what no earlier list began with. ``made``: programs by the passes that led to them; added to."""
    path: tuple[str, ...] = ()
    for each in manager.passes:
        before, path = path, (*path, f"{each.name} {each.options!r}")
        if path not in made:
            made[path] = each(made[before], context).program
    return made[path]


def _given(context: PassContext) -> dict[str, Any]:
    data, budget = context.calibration, context.budget
    limits = (budget.metric.name, budget.metric.data, budget.max_drop) if budget else None
    return {"calibration": data.description if data is not None else None, "budget": limits}
