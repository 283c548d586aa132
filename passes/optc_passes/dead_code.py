"""Remove operators and constants nothing uses."""

from __future__ import annotations

from optc import Change, Pass, PassContext, PassResult, Program


class RemoveDeadCode(Pass):
    """Erase what no output depends on; inputs stay. All operators of a Program are functional, so none is kept for effects."""

    name = "remove-dead-code"
    summary = "Remove operators and constants that no output depends on."

    def run(self, program: Program, context: PassContext) -> PassResult:
        applied = []
        for node in reversed(list(program.graph.nodes)):
            if not node.users and node.op not in ("placeholder", "output"):
                rule = "remove-unused-constant" if node.op == "get_attr" else self.name
                applied.append(Change(rule, node.name))
                program.graph.erase_node(node)
        return PassResult(program, bool(applied), tuple(reversed(applied)))
