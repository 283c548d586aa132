"""The contract: each way a pass can break it is caught, and the message tells its author."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

import optc
from optc.errors import OptcError, PassContractError, PluginError, UnknownNameError
from optc.program import Program


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


@pytest.fixture(scope="module")
def program() -> Program:
    return optc.capture(Small(), (torch.randn(1, 4),))


class Base(optc.Pass):
    name = "under-test"
    summary = "Breaks the contract in one way."


class Lies(Base):
    def run(self, program: Program, context: optc.PassContext) -> optc.PassResult:
        return optc.PassResult(program, modified=True)


class Hides(Base):
    def run(self, program: Program, context: optc.PassContext) -> optc.PassResult:
        _relu(program).target = torch.ops.aten.sigmoid.default
        return optc.PassResult(program, modified=False)


class DropsAnOutput(Base):
    def run(self, program: Program, context: optc.PassContext) -> optc.PassResult:
        program.graph.output_node().args = ((),)
        return optc.PassResult(program, modified=True)


class RenamesAnInput(Base):
    def run(self, program: Program, context: optc.PassContext) -> optc.PassResult:
        (x,) = program.graph.find_nodes(op="placeholder")
        with program.graph.inserting_before(x):
            new = program.graph.placeholder("other")
        x.replace_all_uses_with(new)
        program.graph.erase_node(x)
        return optc.PassResult(program, modified=True)


class WritesInPlace(Base):
    def run(self, program: Program, context: optc.PassContext) -> optc.PassResult:
        with torch.no_grad():
            next(iter(program.constants()))[1].mul_(1.0)
        return optc.PassResult(program, modified=False)


class BreaksTheOrder(Base):
    def run(self, program: Program, context: optc.PassContext) -> optc.PassResult:
        relu = _relu(program)
        program.graph._root.append(relu)
        return optc.PassResult(program, modified=True)


class MistypesANode(Base):
    def run(self, program: Program, context: optc.PassContext) -> optc.PassResult:
        relu = _relu(program)
        with program.graph.inserting_after(relu):
            bad = program.graph.call_function(torch.ops.aten.view.default, (relu, [3, 5]))
        relu.replace_all_uses_with(bad, delete_user_cb=lambda user: user is not bad)
        return optc.PassResult(program, modified=True)


class ErasesTheOutput(Base):
    def run(self, program: Program, context: optc.PassContext) -> optc.PassResult:
        program.graph.erase_node(program.graph.output_node())
        return optc.PassResult(program, modified=True)


class ChangesTheType(Base):
    def run(self, program: Program, context: optc.PassContext) -> optc.PassResult:
        relu = _relu(program)
        with program.graph.inserting_after(relu):
            half = program.graph.call_function(torch.ops.aten.to.dtype, (relu, torch.float16))
        relu.replace_all_uses_with(half, delete_user_cb=lambda user: user is not half)
        return optc.PassResult(program, modified=True)


class ReturnsNoProgram(Base):
    def run(self, program: Program, context: optc.PassContext) -> optc.PassResult:
        return optc.PassResult(program.module, modified=True)  # type: ignore[arg-type]


class ListsWordsAsChanges(Base):
    def run(self, program: Program, context: optc.PassContext) -> optc.PassResult:
        return optc.PassResult(program, False, ["x"], [3])  # type: ignore[arg-type]


class ListsChangesAsSkips(Base):
    def run(self, program: Program, context: optc.PassContext) -> optc.PassResult:
        return optc.PassResult(program, False, (), (optc.Change("a", "b"),))  # type: ignore[arg-type]


class AccountsInNumbers(Base):
    def run(self, program: Program, context: optc.PassContext) -> optc.PassResult:
        return optc.PassResult(program, False, account=3)  # type: ignore[arg-type]


class ReturnsTheWrongType(Base):
    def run(self, program: Program, context: optc.PassContext) -> optc.PassResult:
        return program  # type: ignore[return-value]


def _relu(program: Program) -> torch.fx.Node:
    (node,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    return node


@pytest.mark.parametrize(
    ("pass_class", "message"),
    [
        (Lies, "said modified=True but nothing changed"),
        (Hides, "said modified=False but the graph changed"),
        (DropsAnOutput, "changed the number of outputs from 1 to 0"),
        (RenamesAnInput, r"changed the inputs from \['x'\] to \['other'\]"),
        (WritesInPlace, "wrote into constant 'linear"),
        (BreaksTheOrder, "does not lint"),
        (MistypesANode, "does not type-check"),
        (ReturnsTheWrongType, "returned Program"),
        (ErasesTheOutput, "left no output node at the end of the graph — keep the output node"),
        (ChangesTheType, r"changed output 0 from float32 \[2, \d+\] to float16 \[2, \d+\]"),
        (ReturnsNoProgram, r"whose program is no optc\.Program"),
        (ListsWordsAsChanges, r"whose 'applied' holds something else than optc\.Change"),
        (ListsChangesAsSkips, r"whose 'skipped' holds something else than optc\.Skip"),
        (AccountsInNumbers, "whose 'account' holds something else than mappings"),
    ],
)
def test_a_broken_contract_is_caught(program: Program, pass_class: type[optc.Pass], message: str) -> None:
    before = program.fingerprint()
    with pytest.raises(PassContractError, match=message) as caught:
        pass_class()(program)
    assert "under-test" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert program.fingerprint() == before


def test_an_exception_inside_a_pass_names_the_pass_and_its_provider(program: Program) -> None:
    class Raises(Base):
        origin = "optc-some-plugin"

        def run(self, program: Program, context: optc.PassContext) -> optc.PassResult:
            raise IndexError("list index out of range")

    with pytest.raises(PluginError, match=r"pass 'under-test' \(from optc-some-plugin\) raised IndexError"):
        Raises()(program)


class Honest(Base):
    def run(self, program: Program, context: optc.PassContext) -> optc.PassResult:
        relu = _relu(program)
        linear = relu.args[0]
        assert isinstance(linear, torch.fx.Node)
        with program.graph.inserting_before(relu):
            new = program.graph.call_function(torch.ops.aten.clamp_min.default, (linear, 0.0))
        optc.rewrite.replace(relu, new)
        return optc.PassResult(program, True, (optc.Change("relu-as-clamp", "relu"),))


def test_an_honest_pass_is_recorded_and_its_new_nodes_are_typed(program: Program) -> None:
    result = Honest()(program)
    assert result.modified
    assert [r.name for r in result.program.history] == ["under-test"]
    (clamp,) = result.program.graph.find_nodes(op="call_function", target=torch.ops.aten.clamp_min.default)
    assert tuple(clamp.meta["val"].shape) == (2, 4)
    assert clamp.meta["replaces"] == "relu"
    x = torch.randn(3, 4)
    assert torch.equal(result.program.run(x)[0], program.run(x)[0])
    assert program.history == ()


class WithOptions(Base):
    class Options(optc.PassOptions):
        level: Literal["low", "high"] = "low"
        count: int = 3

    def run(self, program: Program, context: optc.PassContext) -> optc.PassResult:
        return optc.PassResult(program, modified=False)


def test_options_are_typed_and_converted_from_text() -> None:
    assert WithOptions(count="7").options.model_dump() == {"level": "low", "count": 7}


def test_an_unknown_option_suggests_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="unknown option of pass under-test 'cuont' — did you mean count"):
        WithOptions(cuont=3)


def test_a_bad_option_value_is_one_line() -> None:
    with pytest.raises(OptcError, match=r"option under-test.level='mid'.*'low' or 'high'") as caught:
        WithOptions(level="mid")
    assert "\n" not in str(caught.value)
