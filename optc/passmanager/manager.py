"""The pass manager: a list of passes that is itself a pass, so it nests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from optc.errors import OptcError
from optc.passmanager.contract import Pass, PassContext, PassResult
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
        applied, skipped, modified = [], [], False
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
