from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from optc import Program, Target, capture
from optc.errors import BackendError
from optc.lowering import onnxruntime as backend_module
from optc.lowering.onnx_export import LEAST_OPSET
from optc.lowering.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeRunner
from optc.lowering.onnxruntime_session import first_line
from optc.plugins.registry import registry

Quantize = Callable[[Program], Program]
TARGET = Target(threads=2)


@pytest.fixture(scope="module")
def loaded(captured_cnn: Program, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., OnnxRuntimeRunner]:
    """A session on one lowering of ``cnn``, with the options given."""
    backend, folder = OnnxRuntimeBackend(), tmp_path_factory.mktemp("cnn")
    files = backend.lower(captured_cnn, TARGET, folder).files
    return lambda **options: backend.load(folder, files, replace(TARGET, options={"onnxruntime": options}))


def sqnr_db(reference: np.ndarray, output: np.ndarray) -> float:
    return float(10 * np.log10(np.square(reference).sum() / np.square(reference - output).sum()))


def test_it_is_registered() -> None:
    assert registry().load("backend", "onnxruntime") is OnnxRuntimeBackend


def test_a_float_program_runs_as_float(cnn: Program, tmp_path: Path) -> None:
    backend = OnnxRuntimeBackend()
    lowered = backend.lower(cnn, TARGET, tmp_path)
    runner = backend.load(tmp_path, lowered.files, TARGET)
    assert runner.provider == "onnxruntime CPUExecutionProvider"
    assert runner.precision == "float32"
    assert float(lowered.details["check"]["sqnr_db"]) > 100
    assert list(lowered.details["providers"]) == ["CPUExecutionProvider"]
    assert lowered.details["fallback"] == []
    assert "not_int8" not in lowered.details
    for batch in (1, 3, 8):
        x = torch.randn(batch, 3, 16, 16)
        (output,) = runner(x.numpy())
        assert output.dtype == np.float32
        assert sqnr_db(cnn.run(x)[0].numpy(), output) > 100


@pytest.mark.parametrize(("name", "layers"), [("cnn", 4), ("block", 4)])
def test_an_int8_program_runs_integer_kernels(
    name: str, layers: int, tmp_path: Path, quantized: Quantize, request: pytest.FixtureRequest
) -> None:
    program = quantized(request.getfixturevalue(name))
    backend = OnnxRuntimeBackend()
    lowered = backend.lower(program, TARGET, tmp_path)
    runner = backend.load(tmp_path, lowered.files, TARGET)
    x = torch.randn(3, 3, 16, 16)
    int8 = int(runner.precision.removeprefix("int8 (").split()[0])
    # A convolution whose output is not quantized again keeps its float kernel in ONNX Runtime; the runner must say so.
    assert runner.precision == (
        f"int8 ({int8} of {layers} layers)"
        if int8 == layers
        else f"int8 ({int8} of {layers} layers, {layers - int8} float32)"
    )
    assert int8 >= 2
    for ours, graph in zip(runner(x.numpy()), program.run(x), strict=True):
        assert sqnr_db(graph.numpy(), ours) > 30


def test_several_inputs_keep_their_order(tmp_path: Path) -> None:
    class Minus(nn.Module):
        def forward(self, zulu: Tensor, alpha: Tensor) -> Tensor:
            return zulu - 2 * alpha

    program = capture(Minus(), (torch.randn(2, 4), torch.randn(2, 4)))
    backend = OnnxRuntimeBackend()
    runner = backend.load(tmp_path, backend.lower(program, TARGET, tmp_path).files, TARGET)
    zulu, alpha = np.ones((5, 4), np.float32), np.full((5, 4), 3, np.float32)
    np.testing.assert_array_equal(runner(zulu, alpha)[0], zulu - 2 * alpha)


def test_a_file_that_computes_something_else_is_refused(
    cnn: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optc.lowering import onnx_export

    export = onnx_export.export_onnx

    def damage(program: Program, path: Path, opset: int) -> object:
        """What a broken exporter would do: one weight differs."""
        result = export(program, path, opset)
        model = onnx.load(path)
        weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
        array = numpy_helper.to_array(weight).copy()
        array.flat[0] += 0.5
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))
        onnx.save(model, path)
        return result

    monkeypatch.setattr(onnx_export, "export_onnx", damage)
    with pytest.raises(BackendError, match=r"output 'output'.*SQNR .* dB \(at least 60 dB expected\)"):
        OnnxRuntimeBackend().lower(cnn, TARGET, tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_files_onnxruntime_cannot_read_get_one_line(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(BackendError, match=r"onnxruntime refuses model\.onnx") as caught:
        OnnxRuntimeBackend().load(tmp_path, ("model.onnx",), TARGET)
    assert "\n" not in str(caught.value)


def test_a_missing_data_file_is_refused(block: Program, tmp_path: Path) -> None:
    from optc.lowering.onnx_export import export_onnx

    files, _ = export_onnx(block, tmp_path / "model.onnx", external_data_bytes=1000)
    (tmp_path / files[1]).unlink()
    with pytest.raises(BackendError, match=r"refuses model\.onnx"):
        OnnxRuntimeBackend().load(tmp_path, files, TARGET)


@pytest.mark.parametrize(
    "options", [{"io_binding": True}, {"spin_us": 0}, {"optimization": "none"}, {"optimization": "layout"}], ids=str
)
def test_options_change_how_it_runs_and_not_what(
    cnn: Program, options: dict[str, object], loaded: Callable[..., OnnxRuntimeRunner]
) -> None:
    runner = loaded(**options)
    kernels = {kernel.operator for kernel in runner.kernels}
    assert ("ReorderOutput" in kernels) == (options.get("optimization") != "none"), kernels
    for batch in (1, 3):
        x = torch.randn(batch, 3, 16, 16)
        (first,), (second,) = runner(x.numpy()), runner(2 * x.numpy())
        assert sqnr_db(cnn.run(x)[0].numpy(), first) > 100, "the next call leaves an output alone"
        assert sqnr_db(cnn.run(2 * x)[0].numpy(), second) > 100
    runner.close()
    with pytest.raises(BackendError, match="closed"):
        runner(x.numpy())


@pytest.mark.parametrize("io_binding", [False, True])
def test_several_threads_may_call_at_once(
    cnn: Program, io_binding: bool, loaded: Callable[..., OnnxRuntimeRunner]
) -> None:
    runner = loaded(io_binding=io_binding)
    inputs = [torch.randn(2, 3, 16, 16) for _ in range(200)]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda x: runner(x.numpy())[0], inputs))
    for x, output in zip(inputs, outputs, strict=True):
        assert sqnr_db(cnn.run(x)[0].numpy(), output) > 100


def test_workers_hardly_spin_after_a_call(loaded: Callable[..., OnnxRuntimeRunner]) -> None:
    x = np.zeros((64, 3, 16, 16), np.float32)

    def spent(runner: OnnxRuntimeRunner) -> list[float]:
        """CPU time in the 0.3 s after each of five calls."""
        found = []
        for _ in range(5):
            runner(x)
            before = time.process_time()
            time.sleep(0.3)
            found.append(time.process_time() - before)
        return found

    # Other threads may run meanwhile, and a worker that a busy machine did not wake for the call does not spin.
    assert 5 * min(spent(loaded())) < max(spent(loaded(spin_us=200_000)))


def test_a_device_onnxruntime_lacks_is_refused_with_the_mend() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert "optc[gpu]" in (OnnxRuntimeBackend.unavailable(Target(device="cuda")) or "")
    assert OnnxRuntimeBackend.unavailable(TARGET) is None
    assert "not on 'tpu'" in (OnnxRuntimeBackend.unavailable(Target(device="tpu")) or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_provider_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert "sees no GPU" in (OnnxRuntimeBackend.unavailable(Target(device="cuda")) or "")


def test_it_has_integer_kernels_on_the_cpu_alone() -> None:
    assert not OnnxRuntimeBackend.simulates_quantization(TARGET)
    assert OnnxRuntimeBackend.simulates_quantization(Target(device="cuda"))


def test_loading_leaves_no_profile_behind(cnn: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    backend = OnnxRuntimeBackend()
    folder = tmp_path / "model"
    folder.mkdir()
    backend.load(folder, backend.lower(cnn, TARGET, folder).files, TARGET).close()
    assert not list(scratch.iterdir())
    assert [file.name for file in folder.iterdir()] == ["model.onnx"]


def test_loading_needs_no_torch() -> None:
    import subprocess
    import sys

    code = f"import sys, {backend_module.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Picky(OnnxRuntimeBackend):
    """Has kernels for the oldest opset alone, as the CUDA provider has for some operators."""

    fits: ClassVar[int] = LEAST_OPSET

    @classmethod
    def opsets(cls, device: str) -> Sequence[int]:
        return OnnxRuntimeBackend.opsets("cuda")

    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> OnnxRuntimeRunner:
        (found,) = (each.version for each in onnx.load(folder / files[0]).opset_import if not each.domain)
        if found != self.fits:
            raise BackendError(f"no kernels in opset {found}")
        return super().load(folder, files, target)


def test_an_older_opset_is_written_where_the_newest_has_no_kernels(
    block: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "older").mkdir()
    lowered = Picky().lower(block, Target(threads=1), tmp_path / "older")
    assert lowered.details["opset"] == LEAST_OPSET
    assert lowered.details["check"]["sqnr_db"] > 100
    assert "Attention" not in lowered.details["operators"]
    monkeypatch.setattr(Picky, "fits", 0)
    with pytest.raises(BackendError, match="no kernels in opset 23"):
        Picky().lower(block, Target(threads=1), tmp_path)


@pytest.mark.parametrize("wrong", [(), (np.zeros((1, 4, 16, 16), np.float32),), (np.zeros((1, 3, 16, 16)),)])
def test_wrong_inputs_get_one_line(wrong: tuple[Any, ...], loaded: Callable[..., OnnxRuntimeRunner]) -> None:
    runner = loaded()
    with pytest.raises(BackendError, match=r"the model takes 1 inputs, not 0|cannot run the model on this: ") as caught:
        runner(*wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "told"),
    [("refused\nby me", "refused"), ("takes only:\n  * a or\n  * b\n", "takes only: * a or * b"), ("", "ValueError")],
)
def test_an_error_is_told_in_one_line_that_is_whole(said: str, told: str) -> None:
    assert first_line(ValueError(said)) == told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_file_made_for_a_gpu_says_what_it_takes_to_load_it(captured_cnn: Program, tmp_path: Path) -> None:
    backend = OnnxRuntimeBackend()
    files = backend.lower(captured_cnn, TARGET, tmp_path).files
    cuda = replace(TARGET, device="cuda")
    with pytest.raises(BackendError) as caught:
        backend.load(tmp_path, files, cuda)
    assert str(caught.value) == OnnxRuntimeBackend.unavailable(cuda)
