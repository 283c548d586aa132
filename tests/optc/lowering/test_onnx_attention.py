"""Attention in the forms PyTorch allows: ONNX Runtime runs it, and computes the same at any batch size."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from optc import Target, capture
from optc.lowering.onnx_export import export_onnx
from optc.lowering.onnxruntime import OnnxRuntimeBackend

TARGET = Target(threads=1)
HEADS, FLAT = (4, 6, 8), (6, 8)


class Attends(nn.Module):
    """Attention over an input, with a mask that is a parameter or made from a second input."""

    def __init__(self, mask: Tensor | Callable[[Tensor], Tensor], queries: int = 6, **options: object) -> None:
        super().__init__()
        self.queries, self.options = queries, options
        self.mask = nn.Parameter(mask) if isinstance(mask, Tensor) else mask

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        mask = self.mask(keys) if callable(self.mask) else self.mask
        return scaled_dot_product_attention(x[..., : self.queries, :], x, x, attn_mask=mask, **self.options)


class Learned(nn.Module):
    """Attention of an input with a parameter: queries it has, or keys and values."""

    def __init__(self, constant: Tensor, queries: bool, **options: object) -> None:
        super().__init__()
        self.constant, self.queries, self.options = nn.Parameter(constant), queries, options

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        query, key = (self.constant, x) if self.queries else (x, self.constant)
        return scaled_dot_product_attention(query, key, key, **self.options)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        return self.layer(x, src_key_padding_mask=keys < -0.5)


MODELS = {
    "by key": (Attends(lambda keys: keys[:, None, None, :]), HEADS),
    "by key, true or false": (Attends(lambda keys: keys[:, None, None, :] > -0.5), HEADS),
    "by key, constant": (Attends(torch.randn(1, 6)), HEADS),
    "one row": (Attends(torch.randn(6)), HEADS),
    "by head and key": (Attends(torch.randn(4, 1, 6)), HEADS),
    "by query": (Attends(torch.randn(1, 4, 6, 1)), HEADS),
    "whole": (Attends(torch.randn(6, 6)), HEADS),
    "fewer queries": (Attends(torch.randn(1, 6), queries=3, scale=0.3), HEADS),
    "one head": (Attends(lambda keys: None), FLAT),
    "one head, causal": (Attends(lambda keys: None, is_causal=True), FLAT),
    "one head, by key": (Attends(lambda keys: keys[:, None, :]), FLAT),
    "one head, whole": (Attends(torch.randn(6, 6)), FLAT),
    "padded sentences": (Encoder(), FLAT),
    "learned queries": (Learned(torch.randn(1, 4, 3, 8), queries=True), HEADS),
    "learned keys": (Learned(torch.randn(1, 4, 3, 8), queries=False), HEADS),
    "learned keys, one head": (Learned(torch.randn(1, 3, 8), queries=False), FLAT),
    "learned keys, the same for all heads": (Learned(torch.randn(1, 1, 3, 8), queries=False), HEADS),
    "learned keys of groups": (Learned(torch.randn(1, 2, 3, 8), queries=False, enable_gqa=True), HEADS),
    "learned queries, masked by query": (
        Learned(torch.randn(1, 4, 3, 8), queries=True, attn_mask=torch.randn(3, 1)),
        HEADS,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_runs_and_agrees_at_any_batch_size(name: str, tmp_path: Path) -> None:
    model, size = MODELS[name]
    program = capture(model.eval(), (torch.randn(2, *size), torch.rand(2, 6)))
    lowered = OnnxRuntimeBackend().lower(program, TARGET, tmp_path)
    assert lowered.details["operators"]["Attention"] == 1
    with closing(OnnxRuntimeBackend().load(tmp_path, lowered.files, TARGET)) as runner:
        for batch in (1, 2, 5):
            x, keys = torch.randn(batch, *size), torch.rand(batch, 6) - torch.linspace(0, 1, 6)
            with torch.no_grad():
                wanted = model(x, keys).numpy()
            np.testing.assert_allclose(runner(x.numpy(), keys.numpy())[0], wanted, rtol=1e-4, atol=1e-5)


def test_a_mask_is_repeated_where_it_has_to_be(tmp_path: Path) -> None:
    masks = {
        0: lambda keys: keys[:, None, :, None] * keys[:, None, None, :],
        1: lambda keys: keys[:, None, None, :],
    }
    for repeated, mask in masks.items():
        program = capture(Attends(mask), (torch.randn(2, *HEADS), torch.rand(2, 6)))
        _, details = export_onnx(program, tmp_path / "m.onnx")
        assert details["operators"].get("Expand", 0) == repeated


def test_what_is_new_is_a_part_of_the_attention(tmp_path: Path) -> None:
    program = capture(Attends(torch.randn(1, 6)), (torch.randn(2, *FLAT), torch.rand(2, 6)))
    _, details = export_onnx(program, tmp_path / "m.onnx")
    assert set(details["origins"].values()) == {"scaled_dot_product_attention"} | {
        node.name for node in program.graph.nodes if node.op == "call_function" and "slice" in node.name
    }
