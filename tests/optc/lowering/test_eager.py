"""The eager backend: what it runs equals the graph, and it says what it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import optc
from optc import Program, Target, capture
from optc.errors import BackendError
from optc.lowering.eager import EagerBackend, EagerRunner
from optc.plugins.registry import registry


def loaded(program: Program, folder: Path, target: Target | None = None) -> EagerRunner:
    backend, target = EagerBackend(), target or Target()
    lowered = backend.lower(program, target, folder)
    assert {path.name for path in folder.iterdir()} == set(lowered.files)
    runner = backend.load(folder, lowered.files, target)
    assert isinstance(runner, EagerRunner)
    return runner


@pytest.mark.parametrize("name", ["cnn", "block"])
def test_outputs_equal_the_graphs(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> None:
    program: Program = request.getfixturevalue(name)
    runner = loaded(program, tmp_path)
    for batch in (1, 2, 4):
        x = torch.randn(batch, 3, 16, 16)
        for got, want in zip(runner(x.numpy()), program.run(x), strict=True):
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_closed_runner_says_so(cnn: Program, tmp_path: Path) -> None:
    runner, x = loaded(cnn, tmp_path), torch.zeros(1, 3, 16, 16)
    runner.close()
    runner.close()
    for run in (lambda: runner(x.numpy()), lambda: runner.run_tensors(x)):
        with pytest.raises(BackendError, match="this runner is closed"):
            run()


def test_composites_stay_composites_in_the_file(tmp_path: Path) -> None:
    program = registry().load("pass", "fuse")()(capture_cnn()).program
    lowered = EagerBackend().lower(program, Target(), tmp_path)
    assert lowered.details["composites"] == {"optc.conv2d_relu.default": 1, "optc.conv2d_add_relu.default": 1}
    called = [target for _, target, _, _ in json.loads((tmp_path / "graph.json").read_text())["calls"]]
    assert lowered.details["operators"] == len(called)
    assert "optc.conv2d_add_relu.default" in called


def capture_cnn() -> Program:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return (self.conv(x) + x).relu()

    return capture(Residual(), (torch.randn(1, 3, 8, 8),))


def test_says_what_runs(cnn: Program, tmp_path: Path) -> None:
    runner = loaded(cnn, tmp_path)
    assert runner.precision == "float32"
    if torch.backends.mkldnn.is_available():
        assert runner.provider == "eager cpu (oneDNN: 4 of 4 layers)"
        assert runner.left == {}


def test_what_the_kernels_compute_is_compared_with_the_graph(cnn: Program, tmp_path: Path) -> None:
    lowered = EagerBackend().lower(cnn, Target(threads=1), tmp_path)
    check = lowered.details["check"]
    assert check["bound_db"] == 60
    assert float(check["sqnr_db"]) > 100


def test_says_what_onednn_does_not_run(tmp_path: Path) -> None:
    program = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).double(), (torch.randn(2, 4).double(),))
    runner = loaded(program, tmp_path)
    assert runner.precision == "float64"
    assert runner.provider == "eager cpu (oneDNN: 0 of 1 layers)"
    (reason,) = runner.left.values()
    lowered = EagerBackend().lower(program, Target(threads=1), tmp_path)
    assert lowered.details["not_onednn"] == {"linear (0)": reason}
    (output,) = runner(np.ones((3, 4)))
    assert output.dtype == np.float64


def test_simulates_explicit_quantization_and_says_so(cnn: Program, quantized: Callable, tmp_path: Path) -> None:
    program = quantized(cnn)
    runner = loaded(program, tmp_path)
    assert runner.precision == "float32, simulating 4 quantizations"
    x = torch.randn(2, 3, 16, 16)
    # Values at the edge between two steps may round either way.
    np.testing.assert_allclose(runner(x.numpy())[0], program.run(x)[0], atol=0.02)
    if torch.backends.mkldnn.is_available():
        assert runner.left == {}


class Half(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(8, 8).to(dtype), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        return y, self.last(y.float())


@pytest.mark.parametrize(("dtype", "returned"), [(torch.bfloat16, np.float32), (torch.float16, np.float16)])
def test_half_precision_comes_and_goes_as_numpy(dtype: torch.dtype, returned: type, tmp_path: Path) -> None:
    model = Half(dtype)
    x = torch.randn(2, 8).to(dtype)
    runner = loaded(capture(model, (x,)), tmp_path)
    name = str(dtype).removeprefix("torch.")
    assert runner.precision == f"{name} (1 of 2 layers), float32 (1 of 2 layers)"
    first, second = runner(x.float().numpy())
    assert first.dtype == returned
    assert second.dtype == np.float32
    with torch.no_grad():
        np.testing.assert_allclose(first, model(x)[0].float(), rtol=2e-2, atol=2e-2)


def test_takes_arrays_as_they_come(cnn: Program, tmp_path: Path) -> None:
    """Read-only, reversed, transposed and float64 arrays; none is written to."""
    runner = loaded(cnn, tmp_path)
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    (want,) = runner(x)
    before = x.copy()
    frozen = x.copy()
    frozen.flags.writeable = False
    for array in (frozen, np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1], x.astype(np.float64), np.asfortranarray(x)):
        np.testing.assert_allclose(runner(array)[0], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(x, before)


def test_threads_are_the_targets(cnn: Program, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        runner = loaded(cnn, tmp_path, Target(threads=1))
        torch.set_num_threads(2)
        runner(np.zeros((1, 3, 16, 16), np.float32))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_wrong_number_of_inputs(cnn: Program, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="takes 1 inputs, not 2"):
        loaded(cnn, tmp_path)(np.zeros(1), np.zeros(1))


def test_names_what_it_cannot_write(cnn: Program, tmp_path: Path) -> None:
    program = cnn.fork()
    node = next(iter(program.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)))
    node.target = torch.relu
    with pytest.raises(BackendError, match=r"cannot write relu.*relu is not a PyTorch operator"):
        EagerBackend().lower(program, Target(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_closed_model_gives_back_what_the_gpu_holds(
    cnn: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = loaded(cnn, tmp_path)
    freed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    runner.close()
    assert freed == [True]


def test_unavailable_devices_are_explained() -> None:
    assert EagerBackend.unavailable(Target()) is None
    assert "cpu or cuda" in str(EagerBackend.unavailable(Target(device="tpu")))
    if not torch.cuda.is_available():
        assert "sees no GPU" in str(EagerBackend.unavailable(Target(device="cuda")))


def test_is_registered() -> None:
    assert registry().load("backend", "eager") is EagerBackend


@pytest.mark.gpu
def test_runs_on_cuda(tmp_path: Path) -> None:
    program = registry().load("pass", "fuse")()(capture_cnn()).program
    runner = loaded(program, tmp_path, Target(device="cuda"))
    assert runner.provider == "eager cuda (cuDNN)"
    assert runner.precision == "float32"
    x = torch.randn(2, 3, 8, 8)
    np.testing.assert_allclose(runner(x.numpy())[0], program.run(x)[0], rtol=1e-4, atol=1e-5)  # not in TF32


def test_a_view_of_an_input_takes_arrays_of_any_layout(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 2)).eval()
    program = optc.capture(model, (torch.randn(2, 3, 4, 5),))
    backend = EagerBackend()
    runner = backend.load(tmp_path, backend.lower(program, Target(threads=1), tmp_path).files, Target(threads=1))
    images = np.random.default_rng(0).standard_normal((2, 4, 5, 3)).astype(np.float32).transpose(0, 3, 1, 2)
    expected = model(torch.from_numpy(images.copy())).detach()
    torch.testing.assert_close(torch.from_numpy(runner(images)[0]), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(runner.run_tensors(torch.from_numpy(images))[0], expected, rtol=1e-4, atol=1e-5)
