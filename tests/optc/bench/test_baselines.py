from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optc import Target
from optc.bench import baselines as baselines_module
from optc.bench.baselines import baselines
from optc.bench.measure import measure
from optc.errors import MeasurementError


class _Net(nn.Module):
    """Batch norm, a buffer of integers, shared weights and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("order", torch.arange(8).flip(0))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return {"logits": self.second(self.first(features[:, self.order])), "best": features.argmax(1)}


@pytest.fixture
def net() -> _Net:
    return _Net()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(1, 3, 16, 16)


def test_lists_what_a_cpu_with_bf16_has(net: _Net, image: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines_module, "isa", lambda: ("avx2", "avx512_bf16"))
    candidates = baselines(net, (image,), Target())
    assert [(c.name, c.precision) for c in candidates] == [
        ("eager-fp32", "float32"),
        ("eager-bf16", "bfloat16"),
        ("compile-bf16", "bfloat16"),
    ]
    assert not any(candidate.quantized for candidate in candidates)
    assert candidates[0].bytes == 0
    assert candidates[1].bytes > 0


def test_a_cpu_without_bf16_gets_compiled_float32_and_says_why_not_bf16(
    net: _Net, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines_module, "isa", lambda: ("avx2",))
    eager, *halves, compiled = baselines(net, (image,), Target())
    assert [each.name for each in halves] == ["eager-bf16", "compile-bf16"]
    for half in halves:
        with pytest.raises(MeasurementError, match="this CPU emulates bfloat16"):
            half.open()
    assert compiled.name == "compile-fp32"
    assert eager.open().precision == "float32"


def test_on_a_gpu_pytorchs_default_is_named(net: _Net, image: Tensor) -> None:
    full, *halves = baselines(net, (image,), Target("cuda"))
    assert full.precision == "float32, convolutions in TF32"
    assert {half.precision for half in halves} == {"float16"}


@pytest.fixture
def with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that emulates bfloat16 computes it all the same."""
    monkeypatch.setattr(baselines_module, "isa", lambda: ("avx2", "avx512_bf16"))


@pytest.mark.usefixtures("with_bf16")
def test_all_compute_what_the_model_computes(net: _Net, image: Tensor, capfd: pytest.CaptureFixture[str]) -> None:
    net.eval()
    expected = net(image)
    array = image.numpy()
    array.flags.writeable = False
    for candidate in baselines(net, (image,), Target(threads=1)):
        runner = candidate.open()
        logits, best = runner(array)
        assert runner.precision == candidate.precision
        assert logits.dtype == np.float32
        tolerance = 1e-5 if candidate.precision == "float32" else 0.05
        np.testing.assert_allclose(logits, expected["logits"].detach().numpy(), atol=tolerance)
        assert best.dtype == np.int64
        runner.close()
        with pytest.raises(MeasurementError, match="closed"):
            runner(array)
    assert capfd.readouterr() == ("", "")


def test_the_compiled_baseline_has_its_weights_frozen(net: _Net, image: Tensor) -> None:
    """Constants of the compiled code do not follow the module's weights."""
    torch.compiler.reset()
    cpu = torch.device("cpu")
    half = baselines_module._Converted(net.eval(), torch.bfloat16, cpu)
    module = half.get()
    runner = baselines_module._open_compiled(half, (image,))
    before = runner(image.numpy())[0]
    with torch.no_grad():
        module.conv.weight.mul_(3)  # type: ignore[operator,union-attr]
    np.testing.assert_array_equal(runner(image.numpy())[0], before)


def test_float32_on_the_cpu_is_the_model_itself_and_half_precision_leaves_it_alone(net: _Net, image: Tensor) -> None:
    before = {name: (value.dtype, value.data_ptr()) for name, value in net.state_dict(keep_vars=True).items()}
    cpu = torch.device("cpu")
    full = baselines_module._Converted(net, torch.float32, cpu)
    half = baselines_module._Converted(net, torch.bfloat16, cpu)
    assert full.get() is net
    copy = half.get()
    assert isinstance(copy, _Net)
    assert copy.conv.weight.dtype == copy.norm.running_mean.dtype == torch.bfloat16
    assert copy.order.dtype == torch.int64
    assert copy.second.weight is copy.first.weight
    after = {name: (value.dtype, value.data_ptr()) for name, value in net.state_dict(keep_vars=True).items()}
    assert after == before


@pytest.mark.usefixtures("with_bf16")
def test_a_half_precision_copy_lives_as_long_as_a_runner_needs_it(net: _Net, image: Tensor) -> None:
    eager = baselines(net, (image,), Target())[1]
    runner, again = eager.open(), eager.open()
    module = weakref.ref(runner._call)  # type: ignore[attr-defined]
    assert again._call is runner._call  # type: ignore[attr-defined]
    runner.close()
    assert module() is not None
    again.close()
    gc.collect()
    assert module() is None


@pytest.mark.usefixtures("with_bf16")
def test_a_missing_compiler_is_a_listed_reason(net: _Net, image: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nonexistent/g++",))
    torch.compiler.reset()
    with torch._inductor.utils.fresh_cache():
        result = measure(
            baselines(net, (image,), Target(threads=1))[:3],
            [(image.numpy(),)],
            Target(threads=1),
            blocks=2,
            block_seconds=0.01,
        )
    reason = result["compile-bf16"].error
    assert reason is not None
    assert "torch.compile failed" in reason
    assert "install a C++ compiler" in reason
    assert result["eager-bf16"].error is None
