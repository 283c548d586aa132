"""The helpers passes share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import optc
from optc import rewrite
from optc.program import Program

aten = torch.ops.aten


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2).transpose(1, 2)
        return self.linear(y) + y.mean() + y.sum() + y.amax()


@pytest.fixture
def program() -> Program:
    return optc.capture(Small(), (torch.randn(2, 3, 6, 6),))


def _only(program: Program, target: object) -> torch.fx.Node:
    (node,) = rewrite.calls(program, target)
    return node


def test_argument_by_position_keyword_or_default(program: Program) -> None:
    conv = _only(program, aten.conv2d.default)
    assert rewrite.argument(conv, "weight").target == "conv.weight"
    assert rewrite.argument(conv, "groups") == 1
    with pytest.raises(KeyError, match="no argument 'dims'"):
        rewrite.argument(conv, "dims")


def test_set_argument_fills_in_the_defaults_before_it(program: Program) -> None:
    conv = _only(program, aten.conv2d.default)
    rewrite.set_argument(conv, "padding", [1, 1])
    assert len(conv.args) == 5
    assert rewrite.argument(conv, "stride") in (1, [1, 1])
    assert rewrite.argument(conv, "padding") == [1, 1]
    rewrite.set_argument(conv, "bias", None)
    assert conv.args[2] is None


def test_added_constants_get_names_of_their_own(program: Program) -> None:
    output = program.graph.output_node()
    names = [str(rewrite.add_constant(program, output, "a.weight", torch.zeros(1)).target) for _ in range(3)]
    assert names == ["a_weight", "a_weight_1", "a_weight_2"]


def test_dims_say_what_varies(program: Program) -> None:
    batch, *rest = rewrite.dims(_only(program, aten.conv2d.default)) or ()
    assert isinstance(batch, str)
    assert rest == [4, 4, 4]
    with program.graph.inserting_before(program.graph.output_node()):
        new = program.graph.call_function(aten.relu.default, (_only(program, aten.linear.default),))
    assert rewrite.dims(new) is None


def test_labels_name_the_module(program: Program) -> None:
    assert rewrite.label(_only(program, aten.conv2d.default)) == "conv2d (conv)"
    assert rewrite.label(next(rewrite.calls(program, aten.mean.default))) == "mean"


def test_used_by_names_at_most_two(program: Program) -> None:
    transposed = _only(program, aten.transpose.int)
    linear = _only(program, aten.linear.default)
    assert rewrite.used_by(transposed, besides=linear) == "mean, sum_1 and 1 more"
    assert rewrite.used_by(linear, besides=transposed) == next(rewrite.calls(program, aten.add.Tensor)).name


def test_erase_unused_erases_only_what_nothing_uses(program: Program) -> None:
    linear = _only(program, aten.linear.default)
    bias = rewrite.argument(linear, "bias")
    rewrite.set_argument(linear, "bias", None)
    rewrite.erase_unused((bias, bias, rewrite.argument(linear, "weight"), 3, None))
    names = {str(node.target) for node in program.graph.find_nodes(op="get_attr")}
    assert "linear.weight" in names
    assert "linear.bias" not in names


class Viewed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 4, 2).relu().view(-1, 8).exp()


def test_loosened_layouts_turn_the_views_behind_them_into_reshapes() -> None:
    program = optc.capture(Viewed(), (torch.randn(2, 8),))
    first, second = rewrite.calls(program, aten.view.default)
    rewrite.loosen_layout([first])
    assert (first.target, second.target) == (aten.view.default, aten.reshape.default)
    assert program.graph.find_nodes(op="call_function", target=aten.reshape.default) == [second]
    rewrite.loosen_layout(program.graph.find_nodes(op="placeholder"))
    assert first.target is aten.reshape.default


class Outputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x.relu()
        return y[:, :1], y.exp().clone().flatten(1), x.clone()


def test_copies_that_outputs_need() -> None:
    program = optc.capture(Outputs(), (torch.randn(2, 8, 2),))
    names = {node.name for node in rewrite.returned(program)}
    assert names >= {"relu", "clone", "clone_1"}
    assert names.isdisjoint({"x", "exp"})
    relu, exp = _only(program, aten.relu.default), _only(program, aten.exp.default)
    computed, given = rewrite.calls(program, aten.clone.default)
    (x,) = program.graph.find_nodes(op="placeholder")
    assert rewrite.needed_copy(program, computed, exp) is None
    assert rewrite.needed_copy(program, exp, relu) is None
    assert rewrite.needed_copy(program, given, x) == "an output would be the same tensor as x"
    assert rewrite.needed_copy(program, computed, relu) == "two outputs would be the same tensor"


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        pairs = self.linear(x.relu()).exp()
        return torch.view_as_real(torch.view_as_complex(pairs)).as_strided((2, 4), (4, 1), 0)


def test_loosened_layouts_put_a_copy_before_what_wants_dense_values() -> None:
    program = optc.capture(Complex(), (torch.randn(2, 2, 2),), dynamic_batch=False)
    exp = _only(program, aten.exp.default)
    exp.meta["stage"] = 1
    _only(program, aten.view_as_complex.default).meta["stage"] = 2
    for _ in range(2):  # the second time the copy is there
        rewrite.loosen_layout([exp.args[0]])
        rewrite.loosen_layout(program.graph.find_nodes(op="placeholder"))
        copy = _only(program, aten.clone.default)
        assert copy.args == (exp,)
        assert _only(program, aten.view_as_complex.default).args == (copy,)
        assert copy.meta["stage"] == 2
        assert copy.meta["val"].is_contiguous()
        assert rewrite.dims(copy) == rewrite.dims(exp)


def test_strides_are_read_up_to_where_they_are_made() -> None:
    program = optc.capture(Complex(), (torch.randn(2, 2, 2),), dynamic_batch=False)
    names = {node.name for node in rewrite.strides_read(program)}
    assert {"linear", "exp", "view_as_complex", "view_as_real"} == names
    assert not rewrite.strides_read(optc.capture(Viewed(), (torch.randn(2, 8),)))
