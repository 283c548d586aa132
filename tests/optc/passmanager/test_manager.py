"""Pass managers nest, and are built from text."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import optc
from optc.errors import OptcError, UnknownNameError
from optc.passmanager.manager import PassManager, build_passes, parse_options
from optc.program import Program


class AddZero(optc.Pass):
    name = "add-zero"
    summary = "Add zero to the output."

    def run(self, program: Program, context: optc.PassContext) -> optc.PassResult:
        output = program.graph.output_node()
        (value,) = output.args[0]  # type: ignore[misc]
        with program.graph.inserting_before(output):
            new = program.graph.call_function(torch.ops.aten.add.Tensor, (value, 0.0))
        output.args = ((new,),)
        return optc.PassResult(program, True, (optc.Change("add-zero", new.name),))


@pytest.fixture(scope="module")
def program() -> Program:
    return optc.capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.randn(1, 4),))


def test_managers_nest_and_history_holds_leaf_passes(program: Program) -> None:
    nested = PassManager([AddZero(), PassManager([AddZero(), AddZero()])])
    result = nested(program)
    assert [record.name for record in result.program.history] == ["add-zero"] * 3
    assert result.program.operator_count() == program.operator_count() + 3
    assert len(result.applied) == 3
    assert [leaf.name for leaf in nested.leaves()] == ["add-zero"] * 3


def test_an_empty_manager_changes_nothing(program: Program) -> None:
    result = PassManager([])(program)
    assert not result.modified
    assert result.program is program


def test_build_from_text_with_options() -> None:
    manager = build_passes("fuse, quant", {"quant": {"observer": "entropy"}})
    assert [pass_.name for pass_ in manager.passes] == ["fuse", "quant"]
    assert manager.passes[1].options.model_dump()["observer"] == "entropy"


def test_a_pass_that_is_named_twice_has_its_options_twice() -> None:
    manager = build_passes("quant, quant<block=64>", {"quant": {"observer": "mse"}})
    assert [pass_.options.model_dump()["observer"] for pass_ in manager.passes] == ["mse", "mse"]


def test_a_name_carries_options_as_in_llvm() -> None:
    manager = build_passes(
        "fuse, quant<observer = mse;block=64>", {"quant": {"observer": "entropy", "percentile": "99"}}
    )
    options = manager.passes[1].options.model_dump()
    assert (options["observer"], options["block"], options["percentile"]) == ("mse", 64, 99.0)
    for text in ("quant<observer>", "quant<observer=mse", "quant observer=mse>", "quant<=3>", "fuse,quant<a=1>b"):
        with pytest.raises(OptcError, match=r"PASS<OPTION=VALUE;OPTION=VALUE>"):
            build_passes(text)


def test_build_accepts_objects_among_names() -> None:
    assert [pass_.name for pass_ in build_passes(["fuse", AddZero()]).passes] == ["fuse", "add-zero"]


@pytest.mark.parametrize(
    ("passes", "options", "message"),
    [
        ("fuze", {}, "unknown pass 'fuze' — did you mean fuse"),
        ("fuse", {"quant": {"observer": "entropy"}}, "unknown pass in the options 'quant'"),
        ("quant", {"quant": {"obsever": "entropy"}}, "did you mean observer"),
    ],
)
def test_mistakes_are_one_line_with_a_suggestion(passes: str, options: dict[str, dict[str, str]], message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        build_passes(passes, options)


def test_options_are_read_from_assignments() -> None:
    assert parse_options(["a-b.c=d=e", "a-b.f=1"]) == {"a-b": {"c": "d=e", "f": "1"}}
    for text in ("quant", "quant.x", "quant=3", ".x=3", "quant.=3"):
        with pytest.raises(OptcError, match=r"write it as PASS.OPTION=VALUE"):
            parse_options([text])
