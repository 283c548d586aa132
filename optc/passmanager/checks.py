"""Holding a pass to its contract: lint, honest ``modified``, same inputs and outputs, untouched shared tensors."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor, fx

from optc.errors import PassContractError
from optc.passmanager.contract import Change, Pass, PassResult, Skip
from optc.plugins.registry import blamed
from optc.program import Program, complete_meta, graph_module, version

_ENTRIES = (
    ("applied", Change, "optc.Change"),
    ("skipped", Skip, "optc.Skip"),
    ("account", Mapping, "mappings, JSON-ready"),
)


def blame(pass_: Pass, where: str = " raised") -> AbstractContextManager[None]:
    """Turn whatever a pass, or an instrument looking at what it made, raises into a :class:`PluginError` that names the
    pass and its provider.
    """
    return blamed("pass", pass_.name, pass_.origin, where)


class ContractGuard:
    """Remembers what must not change while a pass runs, and checks it afterwards."""

    def __init__(self, pass_: Pass, before: Program) -> None:
        self._pass = pass_
        self._fingerprint = before.fingerprint()
        self._versions = [(name, tensor, version(tensor)) for name, tensor in before.constants()]
        self._inputs = [node.name for node in before.graph.find_nodes(op="placeholder")]
        self._outputs = [_kind(output) for output in _outputs(before.graph)]
        self._before = before

    def check(self, result: PassResult) -> Program:
        """Return the result's program, cleaned of unreferenced constants and with complete ``meta["val"]``.

        Raises:
            PassContractError: the contract is broken; the message tells the pass's author how to mend it.
        """
        if not isinstance(result, PassResult):
            raise self._broken(f"returned {type(result).__name__}", "return an optc.PassResult from run()")
        for field, kind, holds in _ENTRIES:
            entries = getattr(result, field)
            if not isinstance(entries, (tuple, list)) or not all(isinstance(each, kind) for each in entries):
                raise self._broken(
                    f"returned a PassResult whose '{field}' holds something else than {holds}",
                    f"make it a tuple of {holds}",
                )
        after = result.program
        if not isinstance(after, Program):
            raise self._broken("returned a PassResult whose program is no optc.Program", "give it the changed program")
        for name, tensor, before in self._versions:
            if version(tensor) != before:
                raise self._broken(
                    f"wrote into constant '{name}', which other programs share",
                    "build a new tensor and add it under a new name",
                )
        inputs = [node.name for node in after.graph.find_nodes(op="placeholder")]
        if inputs != self._inputs:
            raise self._broken(f"changed the inputs from {self._inputs} to {inputs}", "keep every placeholder")
        if next(iter(reversed(after.graph.nodes))).op != "output":
            raise self._broken("left no output node at the end of the graph", "keep the output node")
        outputs, expected = len(_outputs(after.graph)), len(self._outputs)
        if outputs != expected:
            raise self._broken(f"changed the number of outputs from {expected} to {outputs}", "keep every output")
        modified = after.fingerprint() != self._fingerprint
        if modified and not result.modified:
            raise self._broken("said modified=False but the graph changed", "return modified=True when it does")
        if result.modified and not modified:
            raise self._broken("said modified=True but nothing changed", "return modified=False when nothing does")
        if not modified:
            return self._before
        try:
            after.graph.lint()
        except Exception as error:
            raise self._broken(
                f"left a graph that does not lint: {error}", "check the order and users of nodes"
            ) from error
        after = replace(after, module=graph_module(after.module, after.graph))
        try:
            complete_meta(after)
        except Exception as error:
            raise self._broken(f"made a node that does not type-check: {error}", "check its arguments") from error
        for number, (was, output) in enumerate(zip(self._outputs, _outputs(after.graph), strict=True)):
            if was and _kind(output) != was:
                raise self._broken(
                    f"changed output {number} from {was} to {_kind(output)}", "give out the types and shapes that were"
                )
        return after

    def _broken(self, what: str, mend: str) -> PassContractError:
        return PassContractError(f"pass '{self._pass.name}' (from {self._pass.origin}) {what}", mend)


def _outputs(graph: fx.Graph) -> tuple[fx.node.Argument, ...]:
    outputs = graph.output_node().args[0]
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def _kind(output: object) -> str:
    """Type and shape of an output at the example inputs, for messages; empty where that is not known."""
    value = output.meta.get("val") if isinstance(output, fx.Node) else None
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}" if isinstance(value, Tensor) else ""
