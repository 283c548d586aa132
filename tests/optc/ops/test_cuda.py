"""cuDNN kernels of the composites."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optc.ops import COMPOSITES, Composite, cuda

FUSED = [row for row in COMPOSITES.values() if row.is_conv and row.activation == "relu"]
OPERATORS = {row.name: operator for operator, row in COMPOSITES.items()}


def arguments(row: Composite, dtype: torch.dtype, device: str, bias: bool = True) -> tuple[Any, ...]:
    x, weight = torch.randn(2, 8, 9, 8), torch.randn(16, 8, 3, 2)
    tensors = [x, weight, torch.randn(16) if bias else None]
    if row.residual:
        tensors.append(torch.randn(2, 16, 5, 6))
    moved = [None if tensor is None else tensor.to(device, dtype) for tensor in tensors]
    return (*moved, [2, 1], [1, 0], [1, 2], 1)


@pytest.mark.gpu
@pytest.mark.parametrize("row", FUSED, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_decomposition(row: Composite, dtype: torch.dtype, bias: bool) -> None:
    args = arguments(row, dtype, "cuda", bias)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert cuda.refusal(row, args) is None
        got, want = OPERATORS[row.name](*args), row.decomposition(*args)
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("row", COMPOSITES.values(), ids=lambda row: row.name)
def test_every_composite_runs_on_cuda(row: Composite) -> None:
    if row.is_conv:
        args = arguments(row, torch.float32, "cuda")
    else:
        args = tuple(torch.randn(shape, device="cuda") for shape in ((2, 4), (4, 4), (4,), (2, 4))[: 3 + row.residual])
    torch.testing.assert_close(OPERATORS[row.name](*args), row.decomposition(*args), rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(torch.backends.cudnn.is_available(), reason="this PyTorch has cuDNN")
def test_refuses_without_cudnn() -> None:
    reason = cuda.refusal(FUSED[0], arguments(FUSED[0], torch.float32, "cpu"))
    assert reason == "this PyTorch has cuDNN missing or turned off"


REFUSED = {
    "float64": (lambda row: arguments(row, torch.float64, "cpu"), "is not used for float64"),
    "grouped": (lambda row: (*arguments(row, torch.float32, "cpu")[:-1], 2), "it is a grouped convolution"),
    "unbatched": (
        lambda row: (torch.randn(8, 9, 8), *arguments(row, torch.float32, "cpu")[1:]),
        "its input has no batch dimension or is empty",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("row", FUSED, ids=lambda row: row.name)
def test_says_why_not(monkeypatch: pytest.MonkeyPatch, row: Composite, case: str) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    make, reason = REFUSED[case]
    assert reason in (cuda.refusal(row, make(row)) or "")
    assert cuda.refusal(row, arguments(row, torch.float32, "cpu")) is None


def test_what_cudnn_has_no_kernel_for_says_so() -> None:
    row = next(row for row in COMPOSITES.values() if not row.is_conv)
    assert cuda.why_decomposed(row, ()) == f"cuDNN has no fused kernel for {row.name}"
    convolution = arguments(FUSED[0], torch.float64, "cpu")
    assert cuda.why_decomposed(FUSED[0], convolution) == cuda.refusal(FUSED[0], convolution)
