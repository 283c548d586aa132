"""What the quantized graph holds: integer constants, matching scales, honest types."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import optc
from optc.program import Program, get_constant
from optc_passes.quantizer import Int8Kernels

IMAGE = torch.randn(2, 3, 12, 12)


def constants(program: Program) -> dict[str, Tensor]:
    return dict(program.constants())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda bias: nn.Conv2d(3, 8, 3, bias=bias), IMAGE),
        (lambda bias: nn.Conv2d(3, 6, 3, groups=3, stride=2, padding=1, bias=bias), IMAGE),
        (lambda bias: nn.Linear(12, 8, bias=bias), IMAGE),
    ],
    ids=["conv", "depthwise", "linear"],
)
def test_weights_are_int8_and_biases_int32(quantized: Callable, layer: Callable, x: Tensor, bias: bool) -> None:
    model = nn.Sequential(layer(bias))
    q = quantized(model, x)
    limit = Int8Kernels.of(optc.PassContext()).weight_limit
    found = constants(q.program)
    weight = found["0.weight"]
    assert weight.dtype == torch.int8
    assert weight.flatten(1).int().abs().amax(1).tolist() == [limit] * len(weight)
    rounded = weight.double() * found["0.weight_scale"].double().view(-1, *[1] * (weight.dim() - 1))
    original = model[0].weight.detach().double()
    assert float((rounded - original).abs().max() / original.abs().max()) < 0.51 / limit
    stored = [name for name in ("0.bias", "0_bias_corrected") if name in found]
    assert len(stored) == bias
    if bias:
        (name,) = stored
        assert found[name].dtype == torch.int32
        (source,) = q.program.graph.find_nodes(op="placeholder")
        scale = next(n.args[1] for n in source.users if "quantize" in str(n.target))
        torch.testing.assert_close(found[f"{name}_scale"], found["0.weight_scale"] * scale)
        closest = {"rtol": 1e-3, "atol": 1e-5} if name == "0.bias" else {"rtol": 0.0, "atol": 0.01}
        torch.testing.assert_close(found[name] * found[f"{name}_scale"], model[0].bias.data, **closest)
    assert not any(t.is_floating_point() and t.dim() > 1 for t in found.values()), "a float weight was left behind"
    assert q.sqnr_db > 30


def test_activations_are_uint8_and_types_are_known(quantized: Callable) -> None:
    q = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), IMAGE)
    kinds = {"quantize_per_tensor": torch.uint8, "dequantize_per_tensor": torch.float32}
    seen = 0
    for node in q.program.graph.nodes:
        if node.op == "output":
            continue
        assert "quantization_annotation" not in node.meta
        expected = kinds.get(getattr(node.target, "_opname", ""))
        if expected:
            seen += 1
            assert node.meta["val"].dtype == expected
        if node.op == "get_attr":
            assert node.meta["val"].dtype == get_constant(q.program.module, node.target).dtype
    assert seen == 6


def test_what_follows_a_relu_uses_all_256_levels(quantized: Callable) -> None:
    q = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), IMAGE)
    (relu,) = (n for n in q.program.graph.nodes if n.name == "relu")
    (quantize,) = relu.users
    assert quantize.args[2] == 0


def test_a_weight_is_dequantized_right_before_its_layer(quantized: Callable) -> None:
    """At the top of the graph, all dequantized weights would be alive at once when it runs."""
    q = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), IMAGE)
    names = [getattr(node.target, "_opname", "") for node in q.program.graph.nodes if node.op == "call_function"]
    for position, name in enumerate(names):
        if name == "conv2d":
            assert names[position - 2 : position] == ["dequantize_per_channel"] * 2


def test_every_consumer_dequantizes_for_itself(quantized: Callable) -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.a(x))
            return self.b(y) + self.c(y)

    q = quantized(Fork(), IMAGE)
    dequantizes = [n for n in q.program.graph.nodes if "dequantize_per_tensor" in str(n.target)]
    assert all(len(n.users) == 1 for n in dequantizes)


def test_the_program_handed_in_is_left_alone(quantized: Callable) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(10, 4))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    q = quantized(model, IMAGE)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert all(t.is_floating_point() for _, t in q.before.constants())
    assert all("quantization_annotation" not in node.meta for node in q.before.graph.nodes)


def test_other_batch_sizes_still_run(quantized: Callable) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 5))
    q = quantized(model, IMAGE)
    assert q.program.run(torch.randn(5, 3, 12, 12))[0].shape == (5, 5)
