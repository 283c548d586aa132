"""What becomes int8 and what does not, each with its reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import optc

IMAGE = torch.randn(2, 3, 12, 12)


class Calls(nn.Module):
    """Layers, and a function of them and the input."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def test_what_lies_between_layers_stays_int8(quantized: Callable) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU6(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip
    q = quantized(model, IMAGE)
    assert q.chain() == (
        "q d conv2d relu q d max_pool2d q d conv2d hardtanh q d avg_pool2d q d view q d linear relu q d linear"
    )
    assert len(q.result.applied) == 4
    assert q.sqnr_db > 25


def test_pools_and_views_share_one_scale(quantized: Callable) -> None:
    q = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 5)), IMAGE)
    rounded = [n for n in q.program.graph.nodes if "quantize_per_tensor" in str(n.target)]
    behind_input = {n.args[1:] for n in rounded if not (n.args[0].op == "placeholder" or n.args[0] is rounded[0])}
    assert len(rounded) == 8
    assert len(behind_input) == 1


def test_residual_addition_is_int8_between_convolutions(quantized: Callable) -> None:
    model = Calls(
        lambda m, x: m.c(torch.relu(m.a(x) + m.b(x))), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 8, 1), c=nn.Conv2d(8, 4, 1)
    )
    q = quantized(model, IMAGE)
    assert q.chain() == "q d d conv2d q d conv2d q d add relu q d conv2d q d"
    assert q.sqnr_db > 25


def test_residual_stream_fed_by_float_stays_in_float(quantized: Callable) -> None:
    model = Calls(
        lambda m, x: m.c(m.a(x) + functional.gelu(m.b(x))),
        a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 8, 1), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    assert "d gelu add q d conv2d" in quantized(model, IMAGE).chain()


def test_a_sum_takes_an_activation_as_it_was_rounded_for_a_layer(quantized: Callable) -> None:
    model = Calls(
        lambda m, x: m.c((y := functional.hardswish(m.a(x))) + m.b(y)),
        a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 8, 1), c=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    q = quantized(model, IMAGE)
    assert q.chain() == "q d conv2d q d hardswish q d d conv2d q d add q d conv2d q d"
    (both,) = (node for node in q.program.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    rounded = [dequantize.args[0] for dequantize in both.args]
    assert any(quantize.args[0].target is torch.ops.aten.hardswish.default for quantize in rounded)
    assert q.sqnr_db > 25


def test_a_sum_of_two_activations_stays_in_float(quantized: Callable) -> None:
    model = Calls(
        lambda m, x: m.c(y := functional.gelu(m.a(x))) * m.d(z := functional.silu(m.b(x))) * m.e(y + z),
        a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 8, 1), c=nn.Conv2d(8, 4, 1), d=nn.Conv2d(8, 4, 1), e=nn.Conv2d(8, 4, 1),
    )  # fmt: skip
    graph = quantized(model, IMAGE).program.graph
    (both,) = (node for node in graph.nodes if node.target is torch.ops.aten.add.Tensor)
    assert {node.target for node in both.args} == {torch.ops.aten.gelu.default, torch.ops.aten.silu.default}


def test_concatenation_of_convolutions_shares_one_scale(quantized: Callable) -> None:
    model = Calls(
        lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)),
        a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 8, 1), c=nn.Conv2d(16, 4, 1),
    )  # fmt: skip
    q = quantized(model, IMAGE)
    (cat,) = (n for n in q.program.graph.nodes if n.name == "cat")
    (rounded,) = cat.users
    assert {source.args[1:] for source in cat.args[0]} == {rounded.args[1:]}
    assert q.sqnr_db > 25


def test_a_pool_that_feeds_a_float_operator_stays_in_float(quantized: Callable) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 4))
    assert quantized(model, IMAGE).chain() == "q d conv2d q d adaptive_avg_pool2d view layer_norm q d linear"


def test_views_of_a_float_value_round_before_moving_it(quantized: Callable) -> None:
    model = Calls(lambda m, x: m.l(functional.gelu(x).permute(0, 2, 3, 1)), l=nn.Linear(3, 4))
    assert quantized(model, IMAGE).chain() == "gelu q d permute q d linear"


def test_a_linear_layer_writes_float_where_float_is_wanted(quantized: Callable) -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 4))
    assert quantized(model, IMAGE).chain() == "q d linear gelu q d linear"


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Hardswish(), nn.Sigmoid(), nn.Softmax(1), nn.GELU()])
def test_activations_stay_in_float(quantized: Callable, activation: nn.Module) -> None:
    q = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 4, 3)), IMAGE)
    name = type(activation).__name__.lower()
    assert q.chain() == f"q d conv2d q d {name} q d conv2d q d"
    assert q.sqnr_db > 20


SHARED = nn.Linear(6, 6)
LINEAR = "a product with a constant becomes int8 only where it is written as a linear layer"
LEFT_IN_FLOAT = {
    "shared-weight": (Calls(lambda m, x: m.a(m.a(x)), a=SHARED), torch.randn(2, 6), "weight is used more than once"),
    "tied-parameter": (
        Calls(lambda m, x: functional.linear(m.a(x), m.a.weight), a=nn.Linear(6, 6)),
        torch.randn(2, 6),
        "weight is used more than once",
    ),
    "bias-of-one-number": (
        Calls(lambda m, x: functional.linear(x, m.a.weight, m.b), a=nn.Linear(6, 6), b=nn.Parameter(torch.tensor(0.5))),
        torch.randn(2, 6),
        "bias is not one number per output channel",
    ),
    "shared-bias": (
        Calls(
            lambda m, x: functional.linear(m.a(x), m.b.weight, m.a.bias), a=nn.Linear(6, 6), b=nn.Linear(6, 6, False)
        ),
        torch.randn(2, 6),
        "bias is used more than once",
    ),
    "computed-weight": (Calls(lambda m, x: functional.linear(x, x)), torch.randn(2, 6), "weight is computed"),
    "computed-bias": (
        Calls(lambda m, x: functional.conv2d(x, m.a.weight, m.a.bias * x.mean()), a=nn.Conv2d(3, 3, 1)),
        IMAGE,
        "bias is computed",
    ),
    "constant-input": (
        Calls(lambda m, x: x + m.a(m.p), a=nn.Linear(6, 6), p=nn.Parameter(torch.randn(1, 6))),
        torch.randn(2, 6),
        "input is a constant",
    ),
    "vector": (
        Calls(lambda m, x: functional.linear(x, m.p), p=nn.Parameter(torch.ones(6))),
        torch.randn(2, 6),
        "vector",
    ),
    "decomposed-convolution": (
        Calls(
            lambda m, x: torch.convolution(x, m.p, None, [1] * 2, [0] * 2, [1] * 2, False, [0], 1),
            p=nn.Parameter(torch.randn(4, 3, 2, 2)),
        ),
        IMAGE,
        "export the model without run_decompositions()",
    ),
    "decomposed-linear": (
        Calls(lambda m, x: torch.addmm(m.p, x, m.a.weight.t()), a=nn.Linear(6, 6), p=nn.Parameter(torch.randn(6))),
        torch.randn(2, 6),
        "export the model without run_decompositions()",
    ),
    "float64": (nn.Linear(6, 6).double(), torch.randn(2, 6, dtype=torch.float64), "computes in float64"),
    "conv_transpose": (nn.ConvTranspose2d(3, 4, 2), IMAGE, "transposed"),
    "conv1d": (nn.Conv1d(3, 4, 2), torch.randn(2, 3, 8), "only 2-d"),
    "conv3d": (nn.Conv3d(3, 4, 2), torch.randn(2, 3, 4, 4, 4), "only 2-d"),
    "embedding": (nn.Embedding(9, 4), torch.randint(0, 9, (2, 5)), "look-up"),
    "attention": (
        Calls(lambda m, x: functional.scaled_dot_product_attention(x, x, x)),
        torch.randn(2, 2, 5, 4),
        "softmax",
    ),
    "matmul": (Calls(lambda m, x: x @ x.transpose(1, 2)), torch.randn(2, 5, 4), "product of two activations"),
    "einsum": (
        Calls(lambda m, x: torch.einsum("bij,bkj->bik", x, x)),
        torch.randn(2, 5, 4),
        "product of two activations",
    ),
    "baddbmm": (
        Calls(lambda m, x: torch.baddbmm(m.p, x, x.transpose(1, 2)), p=nn.Parameter(torch.randn(1, 5, 5))),
        torch.randn(2, 5, 4),
        "product of two activations",
    ),
    "mm": (Calls(lambda m, x: torch.mm(x.t(), x)), torch.randn(2, 4), "product of two activations"),
    "matmul-with-weight": (
        Calls(lambda m, x: x @ m.p, p=nn.Parameter(torch.randn(4, 6))),
        torch.randn(2, 5, 4),
        LINEAR,
    ),
    "matmul-with-a-view-of-a-weight": (
        Calls(lambda m, x: x @ m.p.t(), p=nn.Parameter(torch.randn(6, 4))),
        torch.randn(2, 5, 4),
        LINEAR,
    ),
    "einsum-with-weight": (
        Calls(lambda m, x: torch.einsum("btc,ch->bth", x, m.p), p=nn.Parameter(torch.randn(4, 6))),
        torch.randn(2, 5, 4),
        LINEAR,
    ),
    "addmv": (Calls(lambda m, x: torch.addmv(m.p, x, m.p), p=nn.Parameter(torch.randn(4))), torch.randn(4, 4), LINEAR),
    "tensordot": (
        Calls(lambda m, x: torch.tensordot(x, m.p, 1), p=nn.Parameter(torch.randn(4, 6))),
        torch.randn(2, 5, 4),
        LINEAR,
    ),
    "bilinear": (Calls(lambda m, x: m.b(x, x), b=nn.Bilinear(4, 4, 3)), torch.randn(2, 4), "bilinear"),
    "lstm": (Calls(lambda m, x: m.r(x)[0], r=nn.LSTM(4, 3, batch_first=True)), torch.randn(2, 5, 4), "recurrent"),
    "gru": (Calls(lambda m, x: m.r(x)[0], r=nn.GRU(4, 3, batch_first=True)), torch.randn(2, 5, 4), "recurrent"),
    "rnn": (Calls(lambda m, x: m.r(x)[0], r=nn.RNN(4, 3, batch_first=True)), torch.randn(2, 5, 4), "recurrent"),
    "rnn-relu": (
        Calls(lambda m, x: m.r(x)[0], r=nn.RNN(4, 3, batch_first=True, nonlinearity="relu")),
        torch.randn(2, 5, 4),
        "recurrent",
    ),
    "lstm-cell": (Calls(lambda m, x: m.r(x)[0], r=nn.LSTMCell(4, 3)), torch.randn(2, 4), "recurrent"),
}


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch.export, of the list that recurrent layers keep
@pytest.mark.parametrize("case", LEFT_IN_FLOAT)
def test_left_in_float_with_a_reason(quantized: Callable, case: str) -> None:
    model, x, reason = LEFT_IN_FLOAT[case]
    q = quantized(model, x, batches=[(x,)])
    assert not q.result.modified
    assert q.program.fingerprint() == q.before.fingerprint()
    assert q.result.skipped
    assert all(reason in text for text in q.reasons.values()), q.reasons


def test_one_shared_layer_does_not_keep_the_others_in_float(quantized: Callable) -> None:
    model = Calls(lambda m, x: m.b(m.a(m.a(x))), a=nn.Linear(6, 6), b=nn.Linear(6, 3))
    q = quantized(model, torch.randn(2, 6))
    assert [change.detail for change in q.result.applied] == ["b.weight"]
    assert len(q.result.skipped) == 2


def test_an_unfolded_batch_norm_is_left_as_it_is(quantized: Callable) -> None:
    """Folding belongs to a pass of its own; torchao's would also change what the addition sees."""
    model = Calls(lambda m, x: m.norm(y := m.a(x)) + y, a=nn.Conv2d(3, 8, 1), norm=nn.BatchNorm2d(8))
    model.norm.running_mean.fill_(3.0)
    q = quantized(model.eval(), IMAGE)
    assert "_native_batch_norm_legit_no_training" in q.chain()
    assert q.sqnr_db > 25


def test_a_mean_over_every_dimension_stays_in_float(quantized: Callable) -> None:
    model = Calls(lambda m, x: (y := m.a(x)) - torch.mean(y, dim=None, keepdim=True), a=nn.Conv2d(3, 4, 3))
    program = optc.capture(model, (IMAGE,), dynamic_batch=False)
    assert quantized(program, batches=[(IMAGE,)] * 4).sqnr_db > 15
