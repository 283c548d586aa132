"""The pass manager: a list of passes that is itself a pass, so it nests."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optc.errors import OptcError, UnknownNameError
from optc.passmanager.contract import Change, Pass, PassContext, PassResult, Skip
from optc.plugins.registry import registry
from optc.program import Program


class PassManager(Pass):
    """Runs passes in order. Its members run under the contract and the instruments; the group adds nothing to them."""

    name = "pass-manager"
    summary = "Run a list of passes in order."

    def __init__(self, passes: Sequence[Pass] = (), **options: object) -> None:
        super().__init__(**options)
        self.passes = tuple(passes)

    def leaves(self) -> Iterator[Pass]:
        for pass_ in self.passes:
            yield from pass_.leaves()

    def run(self, program: Program, context: PassContext) -> PassResult:
        applied: list[Change] = []
        skipped: list[Skip] = []
        modified = False
        for pass_ in self.passes:
            result = pass_(program, context)
            program = result.program
            modified |= result.modified
            applied += result.applied
            skipped += result.skipped
        return PassResult(program, modified, tuple(applied), tuple(skipped))

    def __call__(self, program: Program, context: PassContext | None = None) -> PassResult:
        return self.run(program, context or PassContext())

    def __repr__(self) -> str:
        return f"<{self.name}: {', '.join(pass_.name for pass_ in self.passes)}>"


def build_passes(
    passes: str | Sequence[str | Pass], options: Mapping[str, Mapping[str, Any]] | None = None
) -> PassManager:
    """A pass manager from ``"fuse,quant"`` or a list of names and :class:`Pass` objects.

    A name may carry options of its own, written as LLVM's ``opt`` has it: ``"fuse,quant<formats=auto;block=64>"``.

    Args:
        options: by pass name, its options; values given as text are converted to the option's type.

    Raises:
        UnknownNameError: a pass or option nobody registered, or options for a pass that is not in the list.
        OptcError: an option's value does not fit its type, or the text cannot be read.
    """
    items: Sequence[str | Pass] = passes.split(",") if isinstance(passes, str) else passes
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, (str, Pass)) for item in items):
        raise OptcError(
            f"passes are {passes!r}", "give names as in 'fuse,quant', or a list of names and optc.Pass objects"
        )
    given, used = options or {}, set[str]()
    built = []
    for item in items:
        if isinstance(item, Pass):
            built.append(item)
            continue
        name, own = read_pass(item)
        if name:
            built.append(registry().make("pass", name, **{**given.get(name, {}), **own}))
            used.add(name)
    if unused := [name for name in given if name not in used]:
        raise UnknownNameError("pass in the options", unused[0], [p.name for p in built], hint="add it to the passes")
    return PassManager(built)


def read_pass(text: str) -> tuple[str, dict[str, str]]:
    """``"quant<formats=auto;block=64>"`` → ``("quant", {"formats": "auto", "block": "64"})``.

    Raises:
        OptcError: the text is not of that form.
    """
    match = re.fullmatch(r"\s*([^<>]*?)\s*(?:<([^<>]*)>\s*)?", text)
    parts = [part.partition("=") for part in (match[2] or "").split(";") if part.strip()] if match else []
    if match is None or not all(name.strip() and equals for name, equals, _ in parts):
        raise OptcError(f"cannot read pass '{text.strip()}'", "write it as PASS or PASS<OPTION=VALUE;OPTION=VALUE>")
    return match[1], {name.strip(): value.strip() for name, _, value in parts}


def parse_options(assignments: Sequence[str]) -> dict[str, dict[str, str]]:
    """``["quant.observer=entropy"]`` → ``{"quant": {"observer": "entropy"}}``.

    Raises:
        OptcError: an assignment is not of the form ``PASS.OPTION=VALUE``.
    """
    options: dict[str, dict[str, str]] = {}
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        pass_name, dot, option = path.partition(".")
        if not (equals and dot and pass_name and option):
            raise OptcError(f"cannot read option '{assignment}'", "write it as PASS.OPTION=VALUE")
        options.setdefault(pass_name, {})[option] = value
    return options
