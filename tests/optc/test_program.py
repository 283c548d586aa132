"""Programs: forks share tensors, fingerprints see structure and constants, outputs nest as the model's did."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from torch import nn

import optc


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.linear(x)
        return {"logits": y, "positive": y.relu()}


@pytest.fixture
def program() -> optc.Program:
    torch.manual_seed(0)
    return optc.capture(TwoOutputs(), (torch.randn(1, 4),))


def test_a_fork_shares_tensors_and_not_the_graph(program: optc.Program) -> None:
    fork = program.fork()
    assert [t.data_ptr() for _, t in fork.constants()] == [t.data_ptr() for _, t in program.constants()]
    fork.graph.erase_node(fork.graph.output_node())
    assert program.graph.output_node() is not None
    program.graph.lint()


def test_the_fingerprint_is_stable_over_forks_and_sees_structure_and_constants(program: optc.Program) -> None:
    fork = program.fork()
    assert fork.fingerprint() == program.fingerprint()
    (relu,) = fork.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    relu.target = torch.ops.aten.sigmoid.default
    assert fork.fingerprint() != program.fingerprint()
    other = program.fork()
    name, tensor = next(iter(other.constants()))
    optc.program.graph_module(other.module, other.graph)
    parent, _, leaf = name.rpartition(".")
    setattr(other.module.get_submodule(parent), leaf, nn.Parameter(tensor.clone()))
    assert other.fingerprint() != program.fingerprint()


def test_the_fingerprint_of_contents_names_functions_without_their_address() -> None:
    program = optc.capture(nn.Linear(4, 4), (torch.randn(1, 4),))
    with program.graph.inserting_before(program.graph.output_node()):
        node = program.graph.call_function(torch.sym_float, (2,))
    assert isinstance(node.target, types.FunctionType), "one of Python's"
    before, function = program.fingerprint(contents=True), node.target
    elsewhere = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    node.target = functools.update_wrapper(elsewhere, function)
    assert program.fingerprint(contents=True) == before


def test_outputs_are_flat_and_the_nesting_is_kept(program: optc.Program) -> None:
    x = torch.randn(5, 4)
    outputs = program.run(x)
    assert [tuple(o.shape) for o in outputs] == [(5, 3), (5, 3)]
    assert program.output_spec is not None
    nested = torch.utils._pytree.tree_unflatten(list(outputs), program.output_spec)
    assert set(nested) == {"logits", "positive"}


def test_every_node_knows_its_static_shape(program: optc.Program) -> None:
    shapes = [tuple(node.meta["val"].shape) for node in program.graph.nodes if node.op == "call_function"]
    assert shapes == [(2, 3), (2, 3)]


def test_shared_storages_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8, bias=False)
            self.b = nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    assert optc.capture(Tied(), (torch.randn(1, 8),)).constant_bytes() == 8 * 8 * 4


def test_the_text_of_a_graph_shows_shapes(program: optc.Program) -> None:
    assert "aten.linear.default" in program.text()
    assert "float32[2, 3]" in program.text()
