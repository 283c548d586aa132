from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import optc
from optc import BackendError, PassContext, Program, Target
from optc.lowering import kernel_times
from optc.lowering.backend import Backend
from optc.lowering.null import NullBackend
from optc.passmanager.manager import build_passes
from optc.plugins.registry import registry


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_times, "SECONDS", 0.01)


class Batches(list[tuple[torch.Tensor, ...]]):
    description = "random"


class Small(nn.Module):
    """A convolution, a residual, an attention and a linear layer; a bias is zero, as untrained ones are once fused.

    The first convolution has a batch norm, which the exporter merges into it where the fuse pass did not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.norm = nn.BatchNorm2d(64)
        self.mix = nn.Conv2d(64, 64, 3, padding=1)
        nn.init.zeros_(self.mix.bias)  # type: ignore[arg-type]
        self.head = nn.Linear(64, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.mix(x) + x)
        tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)
        tokens = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.head(tokens.squeeze(1).mean(1))


@pytest.fixture(scope="module", params=["", "fuse,quant"], ids=["plain", "quantized"])
def program(request: pytest.FixtureRequest) -> Program:
    torch.manual_seed(0)
    inputs = (torch.randn(2, 3, 16, 16),)
    captured = optc.capture(Small().eval(), inputs)
    if not request.param:
        return captured
    return build_passes(request.param)(captured, PassContext(calibration=Batches([inputs] * 4))).program


@pytest.mark.parametrize("name", ["eager", "onnxruntime", "openvino"])
def test_a_profile_names_the_layers_of_the_graph(name: str, program: Program, tmp_path: Path) -> None:
    pytest.importorskip({"eager": "torch"}.get(name, name))
    backend: Backend = registry().load("backend", name)()
    target = Target(threads=1)
    lowered = backend.lower(program, target, tmp_path)
    times = backend.profile(tmp_path, lowered.files, target, (np.ones((1, 3, 16, 16), np.float32),))
    origins = lowered.details.get("origins")
    ran = {origins.get(node, "") if origins else node for kernel in times for node in kernel.nodes}
    layers = {node.name for node in program.graph.nodes if "conv2d" in str(node.target) or "linear" in str(node.target)}
    assert len(layers) == 3
    assert layers <= ran
    assert all(kernel.seconds >= 0 for kernel in times)
    assert sum(kernel.seconds for kernel in times) > 0
    kinds = {kernel.kind for kernel in times for node in kernel.nodes if (origins or {}).get(node, node) in layers}
    quantized = any("::quantize_" in str(getattr(node.target, "_schema", "")) for node in program.graph.nodes)
    assert ("int8" in kinds) == (quantized and name != "eager")


def test_a_backend_without_a_profiler_says_so(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="the null backend cannot tell how long its operators take"):
        NullBackend().profile(tmp_path, (), Target(), ())


def test_the_median_is_of_queries_after_warming_up() -> None:
    warm_up = [("a", 9.0)] * kernel_times.WARM_UP
    found = kernel_times.medians([*warm_up, ("a", 1.0), ("a", 3.0), ("a", 2.0)], kernel_times.WARM_UP + 3)
    assert found == {"a": 2.0}


def test_an_operator_that_runs_twice_in_a_query_counts_twice() -> None:
    calls = kernel_times.WARM_UP + 2
    assert kernel_times.medians([("a", 1.0), ("b", 5.0), ("a", 2.0)] * calls, calls) == {"a": 3.0, "b": 5.0}
