from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import optc
from optc_openvino.backend import OpenVinoBackend
from optc_openvino.execution import Kernel, not_int8, precision
from optc_openvino.runner import OTHER_BATCHES, OpenVinoRunner
from optc_openvino.runtime import OpenVinoOptions, read, reason

TARGET = optc.Target(threads=2)


@pytest.fixture
def runner(two_inputs: Path) -> OpenVinoRunner:
    return OpenVinoRunner(read(two_inputs / "model.xml"), TARGET)


def pair(batch: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return tuple(generator.standard_normal((batch, 4)).astype(np.float32) for _ in range(2))  # type: ignore[return-value]


def test_inputs_and_outputs_keep_their_order(runner: OpenVinoRunner) -> None:
    zulu, alpha = pair(1)
    first, second = runner(zulu, alpha)
    np.testing.assert_allclose(first, zulu - 2 * alpha, rtol=1e-6)
    np.testing.assert_allclose(second, zulu + alpha, rtol=1e-6)


def test_outputs_are_the_callers_to_keep(runner: OpenVinoRunner) -> None:
    inputs = pair(1)
    before = [array.copy() for array in inputs]
    first = runner(*inputs)
    kept = [output.copy() for output in first]
    second = runner(*pair(1, seed=1))
    for output, copy, other in zip(first, kept, second, strict=True):
        assert not np.shares_memory(output, other)
        np.testing.assert_array_equal(output, copy)
    np.testing.assert_array_equal(inputs, before)


def test_any_array_will_do(runner: OpenVinoRunner) -> None:
    zulu, alpha = pair(3)
    expected = runner(zulu, alpha)[0]
    locked = zulu.copy()
    locked.flags.writeable = False
    np.testing.assert_array_equal(runner(locked, np.asfortranarray(alpha))[0], expected)
    wide = np.zeros((3, 8), np.float32)
    wide[:, ::2] = alpha
    np.testing.assert_array_equal(runner(zulu, wide[:, ::2])[0], expected)


def test_batches_beside_the_targets_are_compiled_when_asked_for_and_few_are_kept(runner: OpenVinoRunner) -> None:
    assert not runner._others
    for batch in (1, 2, 5, 3, 2, 1):
        zulu, alpha = pair(batch)
        np.testing.assert_allclose(runner(zulu, alpha)[0], zulu - 2 * alpha, rtol=1e-6)
    assert len(runner._others) == OTHER_BATCHES
    assert [shapes[0][0] for shapes in runner._others] == [3, 2]


@pytest.mark.parametrize("given", [{"hint": "latency"}, {"hint": "throughput"}, {"streams": 2}], ids=str)
def test_threads_do_not_disturb_each_other(two_inputs: Path, given: dict[str, Any]) -> None:
    runner = OpenVinoRunner(read(two_inputs / "model.xml"), TARGET, OpenVinoOptions(**given))

    def call(seed: int) -> float:
        zulu, alpha = pair(1 + seed % 2, seed)
        return float(np.abs(runner(zulu, alpha)[0] - (zulu - 2 * alpha)).max())

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(call, range(200))) < 1e-5


def test_with_the_throughput_hint_a_call_need_not_wait_for_another(two_inputs: Path) -> None:
    runner = OpenVinoRunner(read(two_inputs / "model.xml"), TARGET, OpenVinoOptions(hint="throughput"))
    assert runner.concurrency == 2, "one for each thread"
    assert runner._requests is not None
    for batch in (1, 3):
        zulu, alpha = pair(batch)
        runner(zulu, alpha)  # compiles for the batch
        requests = runner._requests_for((zulu.shape, alpha.shape))
        lent = requests.get()  # as a call that runs holds it
        np.testing.assert_allclose(runner(zulu, alpha)[1], zulu + alpha, rtol=1e-6)
        requests.put(lent)
        assert requests.qsize() == runner.concurrency


def test_fewer_threads_than_were_asked_for_are_told(two_inputs: Path) -> None:
    model = read(two_inputs / "model.xml")
    asked = 4 * (os.cpu_count() or 1)
    assert re.search(rf", \d+ of {asked} threads$", OpenVinoRunner(model, optc.Target(threads=asked)).provider)
    assert "threads" not in OpenVinoRunner(model, optc.Target(threads=1)).provider


def test_a_batch_is_divided_among_streams_where_they_divide_it(two_inputs: Path) -> None:
    target = optc.Target(threads=2, batch=6)
    runner = OpenVinoRunner(read(two_inputs / "model.xml"), target, OpenVinoOptions(streams=4))
    assert runner.provider.endswith(", 2 streams"), "4 do not divide 6"
    assert runner.concurrency == 1, "a call takes them all"
    for batch, together in ((6, 2), (4, 4), (3, 1), (1, 1)):
        zulu, alpha = pair(batch)
        first, second = runner(zulu, alpha)
        np.testing.assert_allclose(first, zulu - 2 * alpha, rtol=1e-6)
        np.testing.assert_allclose(second, zulu + alpha, rtol=1e-6)
        free = runner._requests_for((zulu.shape, alpha.shape))
        requests = free.get()
        assert [request.get_input_tensor(0).shape[0] for request in requests] == [batch // together] * together
        free.put(requests)
    with pytest.raises(optc.BackendError, match=r"openvino cannot give the model inputs of shape \(6, 4\), \(4, 4\)"):
        runner(pair(6)[0], pair(4)[0])


def test_a_cache_that_cannot_be_made_is_one_line_with_the_mend(
    two_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    target = optc.Target(threads=2, options={"openvino": {"cache": True}})
    with pytest.raises(optc.BackendError, match=r"cannot cache in .*: Not a directory") as caught:
        OpenVinoBackend().load(two_inputs, ("model.xml", "model.bin"), target)
    assert "XDG_CACHE_HOME" in str(caught.value)


def test_a_cached_model_is_loaded_and_says_the_same(
    alexnet_int8: optc.Optimized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = alexnet_int8.save(tmp_path / "alexnet")
    target = optc.Target(threads=2, options={"openvino": {"cache": True}})
    plain, first, second = (
        OpenVinoBackend().load(folder, ("model.xml", "model.bin"), each) for each in (TARGET, target, target)
    )
    (blob,) = (tmp_path / "optc" / "openvino").iterdir()
    assert blob.stat().st_size > (folder / "model.bin").stat().st_size // 2
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    assert {each.precision for each in (plain, first, second)} == {plain.precision}
    for each in (first, second):
        np.testing.assert_array_equal(each(image)[0], plain(image)[0])
        each.close()


@pytest.mark.parametrize(
    ("shapes", "dtype", "message"),
    [
        ([(1, 4)], np.float32, r"the model takes 2 inputs \(zulu, alpha\), not 1"),
        ([(1, 4), (1, 5)], np.float32, r"input 'alpha' has shape \(1, 5\), the model takes \(batch, 4\)"),
        ([(4,), (4,)], np.float32, r"input 'zulu' has shape \(4,\), the model takes \(batch, 4\)"),
        ([(1, 4), (1, 4)], np.float64, "input 'zulu' is float64, the model takes float32"),
        ([(2, 4), (3, 4)], np.float32, r"openvino cannot give the model inputs of shape \(2, 4\), \(3, 4\)"),
    ],
)
def test_wrong_inputs_get_one_line(
    shapes: list[tuple[int, ...]], dtype: type, message: str, runner: OpenVinoRunner
) -> None:
    with pytest.raises(optc.BackendError, match=message) as caught:
        runner(*[np.zeros(shape, dtype) for shape in shapes])
    assert "\n" not in str(caught.value)


def test_a_model_of_one_batch_size_takes_no_other(tmp_path: Path) -> None:
    program = optc.capture(nn.Linear(8, 3), (torch.randn(2, 8),), dynamic_batch=False)
    backend = OpenVinoBackend()
    runner = backend.load(tmp_path, backend.lower(program, TARGET, tmp_path).files, TARGET)
    x = torch.randn(2, 8)
    np.testing.assert_allclose(runner(x.numpy())[0], program.run(x)[0].numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(optc.BackendError, match=r"has shape \(1, 8\), the model takes \(2, 8\)"):
        runner(np.zeros((1, 8), np.float32))


def test_a_closed_runner_says_so(runner: OpenVinoRunner) -> None:
    runner.close()
    with pytest.raises(optc.BackendError, match="closed"):
        runner(*pair(1))


def kernel(kind: str, weights: str = "", is_layer: bool = True, name: str = "a") -> Kernel:
    return Kernel(name, ("a", "b"), kind, f"some_{kind}", is_layer, weights)


def kernels(**counts: int) -> list[Kernel]:
    return [kernel(kind, name=f"{kind}_{number}") for kind, count in counts.items() for number in range(count)]


QKV = [kernel("int8", name=name) for name in ("qkv/0", "qkv/1/DequantizationMultiply", "qkv/2")]


@pytest.mark.parametrize(
    ("executed", "expected"),
    [
        ([kernel("float32"), kernel("int8", is_layer=False)], "float32"),
        (kernels(int8=2), "int8 (2 of 2 layers)"),
        (kernels(int8=2, float32=3), "int8 (2 of 5 layers, 3 float32)"),
        (kernels(int4=1, int8=1), "int4 (1 of 2 layers, 1 int8)"),
        (kernels(bfloat16=2, float32=1), "bfloat16 (2 of 3 layers, 1 float32)"),
        ([*QKV, kernel("float32")], "int8 (1 of 2 layers, 1 float32)"),
        ([kernel("float32", is_layer=False)], "float32"),
        ([], "no arithmetic"),
    ],
)
def test_precision_counts_layers(executed: list[Kernel], expected: str) -> None:
    assert precision(executed) == expected


def test_a_quantized_layer_is_found_by_its_name_or_its_weights() -> None:
    executed = [kernel("int8", "v"), kernel("float32", "w")]
    assert not_int8(executed, {"b": "v"}) == {}
    assert not_int8(executed, {"c": "w"}) == {"w": "OpenVINO chose the float32 kernel some_float32"}
    assert not_int8(executed, {"d": "x.weight.T"}) == {"x.weight": "OpenVINO runs no such layer"}


def test_an_error_of_openvino_is_cut_to_the_line_that_tells() -> None:
    text = (
        "Exception from src/inference/src/cpp/core.cpp:93:\n"
        "Check 'a == b' failed at src/core/src/thing.cpp:12:\n"
        "While validating node 'x':\nIncorrect weights in bin file!\n\n\n"
    )
    assert reason(text) == "While validating node 'x': Incorrect weights in bin file!"
    deeper = text.replace("Incorrect", "Check 'c' failed at src/core/src/a.hpp:3:\nInner:\nIncorrect")
    assert reason(deeper) == "While validating node 'x': Inner: Incorrect weights in bin file!"
    assert reason("plain") == "plain"
    assert reason("") == "no reason given"


def test_the_run_script_divides_nothing_that_the_model_does_not_take(tmp_path: Path) -> None:
    class Turned(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 8) + x.reshape(2, 8).mean(0)

    made = optc.optimize(Turned(), torch.randn(2, 8), "fuse", backend="openvino", measure=False)
    artifact = made.save(tmp_path / "made")
    for rows in (2, 4):
        np.save(tmp_path / f"{rows}.npy", np.ones((rows, 8), np.float32))
    command = [sys.executable, "-I", artifact / "run.py"]
    fits = subprocess.run([*command, tmp_path / "2.npy"], capture_output=True, text=True)
    assert fits.stdout.startswith("output shape: (2, 8)"), fits.stderr
    other = subprocess.run([*command, tmp_path / "4.npy"], capture_output=True, text=True)
    assert other.stderr == "input x has the shape (4, 8), the model takes (2, 8)\n"
    np.save(tmp_path / "number.npy", np.float32(1))
    number = subprocess.run([*command, tmp_path / "number.npy"], capture_output=True, text=True)
    assert number.stderr == "input x has the shape (), the model takes (2, 8)\n"
    manifest = json.loads((artifact / "manifest.json").read_text())
    (artifact / "manifest.json").write_text(json.dumps({**manifest, "required_isa": ["avx3|avx4", "fpu|avx5"]}))
    refused = subprocess.run([*command, tmp_path / "2.npy"], capture_output=True, text=True)
    assert refused.stderr == "the model was made for a CPU with avx3 or avx4: optimize it again here\n"
