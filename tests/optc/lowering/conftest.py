"""Small real models as programs, in float and with explicit quantize/dequantize operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx, nn

from optc import Program, capture
from optc.program import complete_meta
from optc.rewrite import add_constant, constant_of

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed


class Cnn(nn.Module):
    """Convolutions with a residual, a pool and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.fc1 = nn.Linear(16 * 16, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        x = (self.conv2(x) + x).relu()
        x = nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
        return self.fc2(self.fc1(x).relu())


class Block(nn.Module):
    """One transformer block over patches, as ViTs have it; two outputs."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Conv2d(3, width, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.head = nn.Linear(width, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + nn.functional.gelu(self.proj(attended))
        return self.head(x[:, 0]), x


@pytest.fixture(scope="session")
def captured_cnn() -> Program:
    torch.manual_seed(0)
    return capture(Cnn(), (torch.randn(1, 3, 16, 16),))


@pytest.fixture
def cnn(captured_cnn: Program) -> Program:
    return captured_cnn.fork()


@pytest.fixture
def block_model() -> nn.Module:
    return Block()


@pytest.fixture(scope="session")
def captured_block() -> Program:
    torch.manual_seed(0)
    return capture(Block(), (torch.randn(1, 3, 16, 16),))


@pytest.fixture
def block(captured_block: Program) -> Program:
    return captured_block.fork()


@pytest.fixture
def quantized() -> Callable[[Program], Program]:
    return _quantized


LIMIT = 64
"""Largest weight: 7 bits, which the kernels of CPUs without VNNI do not overflow either."""


def _quantized(program: Program) -> Program:
    """Static int8 written into the graph by hand: uint8 inputs, int8 per-channel weights of every conv and linear."""
    program = program.fork()
    values: dict[str, Tensor] = {}

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            values[n.name] = result = super().run_node(n)
            return result

    with torch.no_grad():
        Record(program.module).run(*program.example_inputs)
    for node in list(program.graph.nodes):
        if node.target in (aten.conv2d.default, aten.linear.default):
            _quantize_layer(program, node, values)
    complete_meta(program)
    program.module.recompile()
    return program


def _quantize_layer(program: Program, node: fx.Node, values: dict[str, Tensor]) -> None:
    source, weight, bias = node.args[:3]
    w, b = constant_of(program, weight), constant_of(program, bias)
    low, high = min(values[source.name].min().item(), 0.0), max(values[source.name].max().item(), 0.0)
    scale = (high - low) / 255
    zero_point = round(-low / scale)
    w_scale = w.detach().abs().amax(tuple(range(1, w.dim()))) / LIMIT
    w8 = (w.detach() / w_scale.view(-1, *[1] * (w.dim() - 1))).round().clamp(-LIMIT, LIMIT).to(torch.int8)
    b_scale = w_scale * scale
    b32 = (b.detach() / b_scale).round().to(torch.int32)

    def constant(hint: str, value: Tensor) -> fx.Node:
        return add_constant(program, node, hint, value)

    zeros = constant("zeros", torch.zeros(len(w_scale), dtype=torch.int64))
    with program.graph.inserting_before(node):
        parameters = (scale, zero_point, 0, 255, torch.uint8)
        q = program.graph.call_function(qd.quantize_per_tensor.default, (source, *parameters))
        x = program.graph.call_function(qd.dequantize_per_tensor.default, (q, *parameters))
        channels = (constant("w_scale", w_scale), zeros, 0, -LIMIT, LIMIT, torch.int8)
        dw = program.graph.call_function(qd.dequantize_per_channel.default, (constant("w8", w8), *channels))
        limits = torch.iinfo(torch.int32)
        biases = (constant("b_scale", b_scale), zeros, 0, limits.min, limits.max, torch.int32)
        db = program.graph.call_function(qd.dequantize_per_channel.default, (constant("b32", b32), *biases))
    node.args = (x, dw, db, *node.args[3:])
