"""Remove operators and constants nothing uses."""

from __future__ import annotations

from optc import Change, Pass, PassContext, PassResult, Program


class RemoveDeadCode(Pass):
    """Erase what no output depends on; inputs stay. No operator of a Program has effects to keep it for."""

    name = "remove-dead-code"
    summary = "Remove operators and constants that no output depends on."

    def run(self, program: Program, context: PassContext) -> PassResult:
        applied, constants = [], []
        for node in reversed(list(program.graph.nodes)):
            if not node.users and node.op not in ("placeholder", "output"):
                if node.op == "get_attr":
                    constants.append(node.name)
                else:
                    applied.append(Change(self.name, node.name))
                program.graph.erase_node(node)
        if constants:
            applied.append(Change("remove-unused-constants", constants[-1], f"{len(constants)} in all"))
        return PassResult(program, bool(applied), tuple(reversed(applied)))
