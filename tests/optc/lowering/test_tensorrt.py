"""The tensorrt backend: what needs no GPU on the CPU, the engine itself where there is a GPU and TensorRT."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch.fx.passes.split_utils import split_by_tags

import optc
from optc import PassContext, Program, Target
from optc.errors import BackendError, OptcError
from optc.lowering.graph_file import read_graph, write_graph
from optc.lowering.tensorrt import RUN_SCRIPT, TensorRtBackend, _fitting
from optc.lowering.tensorrt_build import export, partition_report, refuse_partition
from optc.lowering.tensorrt_engine import check_batch, read_facts, refuse_others
from optc.lowering.tensorrt_quant import quantize_op, quantize_ops, tensorrt_form
from optc.passmanager.manager import build_passes

CUDA = Target("cuda")
MISSING = TensorRtBackend.unavailable(CUDA)
needs_tensorrt = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
INPUTS = [{"name": "x", "shape": [None, 3, 16, 16], "dtype": "float32"}]


class Noise:
    description = "noise"

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter([(torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)),)])


def passed(program: Program, passes: str) -> Program:
    return build_passes(passes, None)(program, PassContext(CUDA, Noise())).program


def exported(program: Program, folder: Path) -> torch.export.ExportedProgram:
    """What the backend hands to Torch-TensorRT, on the CPU."""
    write_graph(tensorrt_form(program), folder)
    moved = read_graph(folder, 2)
    return export(quantize_ops(moved), CUDA)


@pytest.mark.skipif(MISSING is None, reason="TensorRT is installed")
def test_without_tensorrt_one_line_says_what_to_install() -> None:
    for device in ("cpu", "cuda"):
        reason = TensorRtBackend.unavailable(Target(device))
        assert reason is not None
        assert "\n" not in reason
    if MISSING and "not installed" in MISSING:
        major, minor = torch.__version__.split(".")[:2]
        assert f"pip install 'torch-tensorrt=={major}.{minor}.*' nvidia-modelopt requests --extra-index-url" in MISSING
        with pytest.raises(OptcError, match="backend 'tensorrt' cannot run here"):
            optc.optimize(torch.nn.ReLU(), (torch.randn(1, 3),), [], backend="tensorrt", target=CUDA)


def test_what_is_handed_over_has_quantize_ops_and_a_bounded_batch(captured_cnn: Program, tmp_path: Path) -> None:
    result = exported(passed(captured_cnn, "fuse,quant"), tmp_path)
    targets = [node.target for node in result.graph.nodes]
    assert targets.count(quantize_op()) > 8
    assert not any("quantized_decomposed" in str(target) for target in targets)
    (bounds,) = result.range_constraints.values()
    assert (bounds.lower, bounds.upper) == (1, 128)


@pytest.mark.parametrize("passes", ["fuse", "fuse,fp16", "bf16"])
def test_what_is_handed_over_computes_what_the_graph_does(captured_block: Program, passes: str, tmp_path: Path) -> None:
    program = passed(captured_block, passes)
    x = torch.randn(7, 3, 16, 16)
    for output, expected in zip(exported(program, tmp_path).module()(x), program.run(x), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)


def partition(program: Program, outside: set[str], folder: Path) -> fx.GraphModule:
    """The decomposed program, split as Torch-TensorRT splits (the same function of PyTorch's) around some operators."""
    module = exported(program, folder).run_decompositions().module(check_guards=False)
    number, before, tags = 0, None, []
    for node in module.graph.nodes:
        if node.op == "call_function":
            kind = "gpu" if str(node.target) in outside else "acc"
            number += before not in (None, kind)
            before = kind
            node.tag = f"_run_on_{kind}_{number}"
            if node.tag not in tags:
                tags.append(node.tag)
    split = split_by_tags(module, tags)
    assert isinstance(split, fx.GraphModule)
    return split


def test_the_report_names_the_layers_of_the_captured_graph(captured_cnn: Program, tmp_path: Path) -> None:
    partitioned = partition(captured_cnn, {"aten._adaptive_avg_pool2d.default"}, tmp_path)
    rows, engines = partition_report(partitioned, lambda node: f"no converter for {node.target}")
    assert engines == 2
    assert rows == [{"layer": "adaptive_avg_pool2d", "reason": "no converter for aten._adaptive_avg_pool2d.default"}]


def test_an_operator_that_was_decomposed_is_reported_once(captured_block: Program, tmp_path: Path) -> None:
    partitioned = partition(captured_block, {"aten.bmm.default", "aten._softmax.default"}, tmp_path)
    rows, engines = partition_report(partitioned, lambda node: "left out")
    assert engines > 1
    assert rows.count({"layer": "scaled_dot_product_attention", "reason": "left out"}) == 1


def test_a_whole_model_is_one_engine(captured_cnn: Program, tmp_path: Path) -> None:
    assert partition_report(partition(captured_cnn, set(), tmp_path), lambda node: "") == ([], 1)


def test_an_unpartitioned_graph_has_no_engine(captured_cnn: Program, tmp_path: Path) -> None:
    module = exported(captured_cnn, tmp_path).module(check_guards=False)
    rows, engines = partition_report(module, lambda node: "left out")
    assert engines == 0
    assert {"layer": "conv2d", "reason": "left out"} in rows


def test_the_refusal_of_a_partition_has_every_reason_and_says_why() -> None:
    rows = [{"layer": f"conv2d_{n}", "reason": "no converter for a"} for n in range(5)]
    error = refuse_partition([*rows, {"layer": "roll", "reason": "no converter for b"}], 3)
    assert str(error) == (
        "TensorRT takes this model in 3 engines, not in one: no converter for a (conv2d_0, conv2d_1, conv2d_2 "
        "and 2 more); no converter for b (roll) "
        "— a partitioned model cannot be saved without pickle: use another backend"
    )


def test_batches_the_engine_was_not_built_for_are_refused() -> None:
    check_batch(4, (1, 4))
    check_batch(5, None)
    with pytest.raises(
        BackendError, match="batches of 1 to 4, not of 5 — optimize the model with a target whose batch is 5"
    ):
        check_batch(5, (1, 4))


@pytest.mark.parametrize(
    ("here", "reason"),
    [
        (("11.1.0", "NVIDIA H100", (9, 0)), "was built by TensorRT 11.0.0, this is 11.1.0"),
        (("11.0.0", "NVIDIA L4", (8, 9)), r"was built for a NVIDIA H100 \(9.0\), this GPU is a NVIDIA L4 \(8.9\)"),
    ],
)
def test_an_engine_of_another_tensorrt_or_gpu_is_refused(here: tuple[str, str, tuple[int, int]], reason: str) -> None:
    facts = {"tensorrt": "11.0.0", "gpu": "NVIDIA H100", "capability": [9, 0]}
    refuse_others(Path("model.engine"), facts, "11.0.0", "NVIDIA H100", (9, 0))
    with pytest.raises(BackendError, match=reason):
        refuse_others(Path("model.engine"), facts, *here)


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "cannot read"), ("[]", "does not say"), ('{"tensorrt": "11"}', "does not say gpu")]
)
def test_damaged_facts_are_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    path.write_text(text)
    with pytest.raises(BackendError, match=reason):
        read_facts(path)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((200, 3, 16, 16)), "the engine was built for batches of 1 to 128, not of 200"),
        (np.float32(1), "input x has the shape [], the model takes [1, 3, 16, 16]"),
    ],
)
def test_the_run_script_says_what_does_not_fit_the_engine(
    array: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))  # inputs are looked at first
    (tmp_path / "run.py").write_text(RUN_SCRIPT.read_text())
    (tmp_path / "engine.json").write_text(json.dumps({"inputs": INPUTS, "batches": [1, 128]}))
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(SystemExit, match=re.escape(said)):
        runpy.run_path(str(tmp_path / "run.py"))["main"]([str(tmp_path / "x.npy")])


@pytest.mark.gpu
@needs_tensorrt
@pytest.mark.parametrize("passes", ["fuse", "fuse,fp16", "fuse,bf16", "fuse,quant"])
@pytest.mark.parametrize("name", ["captured_cnn", "captured_block"])
def test_the_engine_computes_what_the_graph_does(
    name: str, passes: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    program = passed(request.getfixturevalue(name), passes)
    backend = TensorRtBackend()
    lowered = backend.lower(program, CUDA, tmp_path)
    assert (lowered.details["engines"], lowered.details["not_tensorrt"]) == (1, {})
    runner = backend.load(tmp_path, lowered.files, CUDA)
    assert "TF32 off" in runner.provider
    for batch in (1, 7, 128):
        x = torch.randn(batch, 3, 16, 16)
        for output, expected in zip(runner(x.numpy()), program.run(x), strict=True):
            reference = expected.float().numpy()
            noise = np.square(output - reference).sum()
            assert noise <= np.square(reference).sum() * (1e-2 if "quant" in passes else 1e-3)
    with pytest.raises(BackendError, match="batches of 1 to 128, not of 129"):
        runner(np.zeros((129, 3, 16, 16), np.float32))
    runner.close()


@pytest.mark.gpu
@needs_tensorrt
def test_a_saved_engine_runs_again_and_is_refused_elsewhere(captured_cnn: Program, tmp_path: Path) -> None:
    backend = TensorRtBackend()
    lowered = backend.lower(captured_cnn, CUDA, tmp_path)
    x = np.ones((3, 3, 16, 16), np.float32)
    first = backend.load(tmp_path, lowered.files, CUDA)(x)
    np.testing.assert_array_equal(backend.load(tmp_path, lowered.files, CUDA)(x)[0], first[0])
    facts = json.loads((tmp_path / "engine.json").read_text())
    (tmp_path / "engine.json").write_text(json.dumps(facts | {"gpu": "another"}))
    with pytest.raises(BackendError, match="was built for a another"):
        backend.load(tmp_path, lowered.files, CUDA)
    (tmp_path / "engine.json").write_text(json.dumps(facts))
    (tmp_path / "model.engine").write_bytes(b"not an engine")
    with pytest.raises(BackendError, match="TensorRT cannot read the engine"):
        backend.load(tmp_path, lowered.files, CUDA)


def test_no_more_example_samples_are_compared_than_an_engine_takes(captured_cnn: Program) -> None:
    many = replace(captured_cnn, example_inputs=(torch.randn(300, 3, 16, 16),))
    assert [len(each) for each in _fitting(many, CUDA).example_inputs] == [128]
    assert [len(each) for each in _fitting(many, replace(CUDA, batch=200)).example_inputs] == [200]
    assert len(_fitting(replace(many, dynamic_batch=False), CUDA).example_inputs[0]) == 300
