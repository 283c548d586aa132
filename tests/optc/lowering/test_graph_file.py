"""Graph files: a program comes back as it was, and a file can name nothing but registered operators."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optc import Program, capture
from optc.errors import BackendError
from optc.lowering.graph_file import GRAPH, WEIGHTS, read_graph, refusal, write_graph
from optc.ops import COMPOSITES

aten = torch.ops.aten


def round_trip(program: Program, folder: Path, batch: int = 2) -> Program:
    assert write_graph(program, folder) == (GRAPH, WEIGHTS)
    assert (folder / WEIGHTS).stat().st_mode == (folder / GRAPH).stat().st_mode
    return read_graph(folder, batch)


def call_targets(program: Program) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def test_a_program_comes_back_as_it_was(block: Program, tmp_path: Path) -> None:
    again = round_trip(block, tmp_path)
    assert call_targets(again) == call_targets(block)
    for batch in (1, 2, 3):
        x = torch.randn(batch, 3, 16, 16)
        for got, want in zip(again.run(x), block.run(x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_explicit_quantization_comes_back(cnn: Program, quantized: Callable, tmp_path: Path) -> None:
    program = quantized(cnn)
    again = round_trip(program, tmp_path)
    assert call_targets(again) == call_targets(program)
    assert {t.dtype for _, t in again.constants()} >= {torch.int8, torch.int32, torch.int64}
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again.run(x)[0], program.run(x)[0])


def test_example_inputs_have_the_batch_asked_for(block: Program, tmp_path: Path) -> None:
    again = round_trip(block, tmp_path, batch=5)
    assert again.example_inputs[0].shape == (5, 3, 16, 16)
    assert again.graph.output_node().all_input_nodes[0].meta["val"].shape == (5, 7)


class Odd(nn.Module):
    """Arguments of every kind: types, devices, infinities, layouts, sizes computed in the graph, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.second = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.randn(6, 8)[1:3, ::2])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.second(self.first(x.to(torch.bfloat16))).to(torch.float32, memory_format=torch.contiguous_format)
        y = torch.where(y > 0, y, torch.full_like(y, -math.inf)).amax(0)
        steps = torch.arange(x.shape[0] * 2, device=x.device, dtype=torch.float32) / (x.shape[0] + 1)
        z = x.reshape(x.shape[0] * 2, 2) @ self.table
        return y, steps, torch.addcmul(z, z, z, value=0.5)


def test_arguments_of_every_kind(tmp_path: Path) -> None:
    program = capture(Odd(), (torch.randn(2, 4),))
    assert operator.mul in call_targets(program)
    again = round_trip(program, tmp_path)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 4)
        for got, want in zip(again.run(x), program.run(x), strict=True):
            torch.testing.assert_close(got, want)


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    program = capture(Odd(), (torch.randn(2, 4),))
    again = round_trip(program, tmp_path)
    weights = [t for _, t in again.constants() if t.shape == (4, 4)]
    assert len({t.data_ptr() for t in weights}) == 1
    assert (tmp_path / WEIGHTS).stat().st_size < again.constant_bytes() + 2000


def test_what_cannot_be_written_is_named() -> None:
    program = capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    (x,) = program.graph.find_nodes(op="placeholder")
    graph = program.graph
    with graph.inserting_after(x):
        assert refusal(graph.call_function(torch.relu, (x,))) == "relu is not a PyTorch operator"
        assert refusal(graph.call_method("relu", (x,))) == "it is a call_method, not a call of an operator"
        assert "strides" in str(refusal(graph.call_function(aten.as_strided.default, (x, [2], [1]))))
        assert refusal(graph.call_function(aten.mul.Scalar, (x, 2j))) == "an argument is a complex"
        assert refusal(graph.call_function(aten.relu.default, (x,))) is None


@cache
def one_relu() -> Program:
    return capture(nn.ReLU(), (torch.randn(2, 4),))


def tampered(folder: Path, **changes: Any) -> Path:
    """A graph file of one relu with fields replaced."""
    write_graph(one_relu(), folder)
    document = {**json.loads((folder / GRAPH).read_text()), **changes}
    (folder / GRAPH).write_text(json.dumps(document))
    return folder


VALUE = {"value": 0}
CODE = "__import__('os').mkdir('{}')"
HOSTILE = {
    "a Python function": {"calls": [["f", "os.system", ["true"], {}]]},
    "an attribute of an operator": {"calls": [["f", "aten.relu.__class__", [VALUE], {}]]},
    "a dotted path": {"calls": [["f", "aten.relu.default.__class__", [VALUE], {}]]},
    "library loading": {"calls": [["f", "load_library", ["x.so"], {}]]},
    "a file read": {"calls": [["f", "aten.from_file.default", ["/etc/passwd"], {}]]},
    "an unknown operator": {"calls": [["f", "nobody.made_this.default", [VALUE], {}]]},
    "an odd type": {"inputs": [{"name": "x", "shape": [None, 4], "dtype": "nn"}]},
    "an odd argument type": {"calls": [["f", "aten.relu.default", [{"dtype": "ops"}], {}]]},
    "a missing value": {"outputs": [{"value": 99}]},
    "a missing constant": {"constants": ["nothing"]},
    "another format": {"format": "else"},
    "a newer version": {"version": 99},
    "a list of arguments by name": {"calls": [["f", "aten.relu.default", [VALUE], [1]]]},
    "a dictionary": {"calls": [["f", "aten.relu.default", [{"a": 1, "b": 2}], {}]]},
    "an argument of another": {"calls": [["f", "aten.relu.default", [VALUE], {"approximate": "none"}]]},
    "an argument by name of a function on numbers": {"calls": [["f", "_operator.neg", [], {"a": VALUE}]]},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_files_that_name_anything_else_are_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(BackendError):
        read_graph(tampered(tmp_path, **HOSTILE[case]), batch=1)


def test_names_and_strings_in_a_file_never_become_code(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    code = CODE.format(marker)
    folder = tampered(
        tmp_path,
        inputs=[{"name": f"x): {code}\n#", "shape": [None, 4], "dtype": "float32"}],
        calls=[[f"y = {code}\n", "aten.gelu.default", [VALUE], {"approximate": "none"}]],
    )
    program = read_graph(folder, batch=1)
    program.run(torch.randn(1, 4))
    for key in (f"a={code}, b", f"a = 0)\r{code}\rdef _(self):\r    pass #"):
        with pytest.raises(BackendError, match=r"aten\.gelu\.default takes no argument .a"):
            read_graph(tampered(tmp_path, calls=[["y", "aten.gelu.default", [VALUE], {key: "none"}]]), batch=1)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["x\n", "", "a b", "1", "print"])
def test_any_name_of_a_call_can_be_read(name: str, tmp_path: Path) -> None:
    program = read_graph(tampered(tmp_path, calls=[[name, "aten.relu.default", [VALUE], {}]]), batch=1)
    assert program.run(-torch.ones(1, 4))[0].shape == (1, 4)


def test_missing_or_broken_files(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cannot read the graph"):
        read_graph(tmp_path, batch=1)
    tampered(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(BackendError, match="cannot read the graph"):
        read_graph(tmp_path, batch=1)


@pytest.mark.parametrize("target", COMPOSITES, ids=str)
def test_composites_are_kept(target: Any, tmp_path: Path) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            other = (x,) if COMPOSITES[target].residual else ()
            weight = torch.ones(4, 4, 1, 1) if COMPOSITES[target].is_conv else torch.ones(4, 4)
            return target(x, weight, None, *other)

    x = torch.randn(2, 4, 3, 3) if COMPOSITES[target].is_conv else torch.randn(2, 4)
    program = capture(Model(), (x,))
    again = round_trip(program, tmp_path)
    assert target in call_targets(again)
    torch.testing.assert_close(again.run(x)[0], program.run(x)[0])


@pytest.mark.parametrize("operator", ["aten.from_file.default", "aten.from_file.out", "aten.add_.Tensor"])
def test_operators_that_read_files_or_write_to_tensors_are_refused(
    operator: str, block: Program, tmp_path: Path
) -> None:
    write_graph(block, tmp_path)
    text = (tmp_path / GRAPH).read_text()
    target = next(str(target) for target in call_targets(block) if str(target).startswith("aten."))
    (tmp_path / GRAPH).write_text(text.replace(f'"{target}"', f'"{operator}"'))
    assert operator in (tmp_path / GRAPH).read_text()
    with pytest.raises(BackendError, match=f"the graph calls {operator}: it (reads a file|writes to what it is given)"):
        read_graph(tmp_path, 2)


class Conjugates(nn.Module):
    """A constant, its conjugate, and the negative of one: views of memory that read it otherwise."""

    def __init__(self) -> None:
        super().__init__()
        factor = torch.randn(4, dtype=torch.complex64)
        self.register_buffer("factor", factor)
        self.register_buffer("conjugate", factor.conj())
        self.register_buffer("negative", factor.conj().imag)

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(x * self.factor + 2 * x * self.conjugate) + self.negative[:, None]


def test_constants_that_are_conjugates_of_others_come_back(tmp_path: Path) -> None:
    model = Conjugates()
    program = capture(model, (torch.randn(2, 4),))
    assert len({program.fingerprint(contents=contents) for contents in (True, False)}) == 2
    again, x = round_trip(program, tmp_path), torch.randn(2, 4)
    torch.testing.assert_close(again.run(x)[0], program.run(x)[0])
    torch.testing.assert_close(again.run(x)[0], model(x))
