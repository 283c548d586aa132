"""What a target's int8 kernels take: 7-bit weights where 8 bits would overflow, and a line that says so beforehand."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import optc
from optc import machine
from optc_passes.quant import Quant
from optc_passes.quantizer import SATURATES, Int8Kernels

PRODUCT = """
import sys, torch
onednn = torch.ops.onednn
scales, zeros = torch.ones(64), torch.zeros(64, dtype=torch.int64)
for limit in map(int, sys.argv[1:]):
    x, w = torch.full((4, 64), 255, dtype=torch.uint8), torch.full((64, 64), limit, dtype=torch.int8)
    packed = onednn.qlinear_prepack(w, None)
    y = onednn.qlinear_pointwise(x, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    print(int(y[0, 0]))
"""


class Batches:
    description = "test batches"

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([(torch.randn(8, 3, 8, 8),)])


class Rows:
    description = "rows from -1.1 to 1"

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([(torch.linspace(-1.1, 1.0, 8 * 64).view(8, 64),)])


def _products(*limits: int) -> list[int]:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    ran = subprocess.run(
        [sys.executable, "-c", PRODUCT, *map(str, limits)], env=environment, capture_output=True, text=True, check=True
    )
    return [int(line) for line in ran.stdout.split()]


@pytest.mark.skipif("avx2" not in (machine.isa() or ()), reason="needs an x86 CPU with AVX2, whose kernels saturate")
def test_avx2_kernels_overflow_with_8_bits_and_not_with_7() -> None:
    full, reduced = Int8Kernels(), Int8Kernels.of(optc.PassContext(isa=("avx2",)))
    overflown, exact = _products(full.weight_limit, reduced.weight_limit)
    assert overflown < 255 * full.weight_limit * 64
    assert exact == 255 * reduced.weight_limit * 64


@pytest.mark.parametrize(
    ("isa", "limit"),
    [
        (("avx2",), 64),
        (("avx2", "avx512f"), 64),
        (("avx2", "avx_vnni"), 127),
        (("avx2", "avx512f", "avx512_vnni"), 127),
        (("amx_int8",), 127),
        (None, 127),
    ],
)
def test_weights_fit_the_instruction_set(isa: tuple[str, ...] | None, limit: int) -> None:
    torch.manual_seed(0)
    program = optc.capture(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 4)), (torch.randn(2, 3, 8, 8),)
    )
    notes: list[str] = []
    result = Quant()(program, optc.PassContext(calibration=Batches(), isa=isa, note=notes.append))
    weights = [tensor for _, tensor in result.program.constants() if tensor.dtype == torch.int8 and tensor.ndim > 1]
    assert len(weights) == 2
    assert all(int(weight.abs().max()) == limit for weight in weights)
    assert notes == ([SATURATES] if limit == 64 else [])


@pytest.mark.parametrize(("isa", "middle"), [(("avx512_vnni", "amx_int8"), True), (("avx512_vnni",), False)])
def test_nearly_symmetric_inputs_have_the_middle_as_zero_point_with_amx(isa: tuple[str, ...], middle: bool) -> None:
    program = optc.capture(nn.Linear(64, 4), (torch.randn(2, 64),))
    quantized = Quant()(program, optc.PassContext(calibration=Rows(), isa=isa)).program
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    (node,) = (node for node in quantized.graph.nodes if node.target is quantize)
    assert (node.args[2] == 128) == middle


def test_a_gpu_has_no_such_kernels() -> None:
    kernels = Int8Kernels.of(optc.PassContext(optc.Target(device="cuda"), isa=("avx2",)))
    assert kernels == Int8Kernels(symmetric=True, attention=False)


def test_weights_alone_need_no_int8_kernels() -> None:
    notes: list[str] = []
    program = optc.capture(nn.Linear(64, 4), (torch.randn(2, 64),))
    Quant(formats="int8-weights")(program, optc.PassContext(isa=("avx2",), note=notes.append))
    assert notes == []


def test_the_line_is_shown_and_kept_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optc.api.isa", lambda: ("avx2",))
    optimized = optc.optimize(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 4)),
        torch.randn(2, 3, 8, 8),
        "quant",
        calibration=[torch.randn(8, 3, 8, 8)],
        backend="eager",
        measure=False,
    )
    assert SATURATES in optimized.report.notes
