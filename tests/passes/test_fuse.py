"""fuse: all exact rewrites together, on real architectures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import optc
from optc.torchvision_ops import declare_torchvision_ops
from optc_passes.fuse import Fuse

BN = "_native_batch_norm_legit_no_training"
# Operators before and after, and what must have happened. Before counts are timm's matter and only bounded.
MODELS: dict[str, tuple[dict[str, object], dict[str, int], int]] = {
    "resnet18": ({}, {"fold-batch-norm": 20, "fuse-residual": 8, "fuse-activation": 17}, 26),
    "mobilenetv3_small_050": ({}, {"fold-batch-norm": 34}, 80),
    "efficientnet_b0": ({}, {"fold-batch-norm": 49, "fuse-residual": 9}, 120),
    "densenet121": ({"block_config": (2, 3, 2, 2)}, {"fold-batch-norm": 10}, 100),
    "convnext_atto": ({}, {"fold-layer-scale": 12, "fold-layer-norm": 16, "fold-constants": 12}, 110),
    "vit_tiny_patch16_224": ({"img_size": 64, "depth": 4}, {"fold-layer-norm": 9, "fuse-activation": 4}, 75),
    "swin_tiny_patch4_window7_224": ({"img_size": 64, "depths": (1, 1, 2, 1)}, {"fold-layer-norm": 12}, 180),
    "beit_base_patch16_224": (
        {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 4, "init_values": 0.1},
        {"fold-layer-scale": 4},
        60,
    ),
}


SLOW = ("efficientnet_b0", "densenet121")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in MODELS])
def test_real_models(tester: Callable, name: str, record_property: Callable) -> None:
    """Numbers hold, operators fall, a second run changes nothing (the tester runs it)."""
    declare_torchvision_ops()  # before timm imports torchvision
    import timm

    arguments, rules, most = MODELS[name]
    t = tester(timm.create_model(name, num_classes=7, **arguments), torch.randn(2, 3, 64, 64)).run(Fuse()).check_close()
    counts = [sum(n.op == "call_function" for n in p.graph.nodes) for p in (t.before, t.program)]
    record_property("operators", f"{counts[0]} -> {counts[1]}")
    print(f"{name}: {counts[0]} -> {counts[1]} operators")
    applied = Counter(change.rule for change in t.applied)
    assert {rule: applied[rule] for rule in rules} == rules
    assert counts[1] <= most < counts[0]
    assert t.program.constant_bytes() <= 1.01 * t.before.constant_bytes()  # biases where there were none


class Everything(nn.Module):
    """One small model with something for every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.norm, self.gamma = nn.LayerNorm(8), nn.Parameter(torch.rand(8))
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.bn(self.conv(x)).relu()).flatten(2).transpose(1, 2).contiguous()
        y = self.norm(x)
        q, k, v = (layer(y) for layer in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v)
        unused = y.sin()
        assert unused is not None
        return x + self.dropout(self.out(y)) * self.gamma.view(1, 1, -1) + 0 * 1


def test_every_member_finds_something(tester: Callable) -> None:
    t = tester(Everything(), torch.randn(2, 3, 6, 6)).run(Fuse()).check_close()
    t.check_count(conv2d_relu=1, linear_add=1, linear=1, split_with_sizes=1, layer_norm=1, mul=0)
    t.check_count(**{BN: 0})
    ran = {record.name for record in t.program.history if record.modified}
    assert ran >= {
        "fold-batch-norm",
        "fold-constants",
        "fold-layer-norm",
        "fold-layer-scale",
        "fuse-activation",
        "fuse-residual",
        "merge-parallel-linears",
        "remove-dead-code",
        "remove-identity",
    }


def test_every_member_is_registered_and_exact() -> None:
    from optc.plugins.registry import registry

    for pass_ in Fuse().passes:
        assert type(pass_) is registry().load("pass", pass_.name)
        assert pass_.numerics.exact


def test_single_precision_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Hardswish(), nn.Flatten(), nn.Linear(16 * 36, 5))
    x = torch.randn(2, 3, 8, 8)
    program = Fuse()(optc.capture(model, (x,))).program
    with torch.no_grad():
        torch.testing.assert_close(program.run(x)[0], model.eval()(x), rtol=1e-4, atol=1e-5)
    assert {tensor.dtype for _, tensor in program.constants()} == {torch.float32}
