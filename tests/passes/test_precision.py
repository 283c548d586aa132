"""bf16 and fp16: what is cast and what is not, with which reason, and what stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optc
from optc_passes.fuse import Fuse
from optc_passes.precision import Bf16, Fp16

HALVES = pytest.mark.parametrize("half", [Bf16, Fp16], ids=["bf16", "fp16"])
NAMES = {torch.float32: "float32", torch.bfloat16: "half", torch.float16: "half", torch.float64: "float64"}


class Half:
    """A program, what a pass made of it, and what its calls compute in. The pass is run twice, the second for nothing.

    Args:
        function: what the model computes, a module or a function of tensors.
        inputs: example inputs, batch first.
    """

    def __init__(self, function: Callable[..., Any], *inputs: Tensor, half: type[optc.Pass] = Bf16) -> None:
        self.before = optc.capture(function if isinstance(function, nn.Module) else Function(function), inputs)
        self.result = half()(self.before)
        self.program = self.result.program
        assert not half()(self.program).modified
        self.casts = sorted(change.node for change in self.result.applied if change.rule == "cast")
        self.types: dict[str, str] = {}
        names: dict[str, str] = {}
        for node in self.program.graph.nodes:
            if node.op == "call_function" and node.name not in self.casts:
                names[node.name] = name = self._name(node)
                if isinstance(value := node.meta["val"], Tensor) and value.is_floating_point():
                    self.types[name] = NAMES[value.dtype]
        self.reasons = {names[skip.node]: skip.reason for skip in self.result.skipped}

    def _name(self, node: torch.fx.Node) -> str:
        """The operator, numbered from its second call on; the names of nodes have gaps."""
        base = getattr(node.target, "_opname", node.name)
        number = sum(name.removeprefix(base).lstrip("_").isdigit() or name == base for name in self.types)
        return f"{base}_{number}" if number else base

    def check_close(self, tolerance: float = 0.03) -> None:
        """Outputs keep type, shape and, nearly, value; at a batch size never seen before."""
        inputs = [
            torch.randn(3, *t.shape[1:], dtype=t.dtype) if t.is_floating_point() else torch.cat([t, t[:1]])
            for t in self.before.example_inputs
        ]
        for got, want in zip(self.program.run(*inputs), self.before.run(*inputs), strict=True):
            assert got.dtype == want.dtype
            assert got.shape == want.shape
            assert float((got.double() - want.double()).norm()) <= tolerance * float(want.double().norm())


class Function(nn.Module):
    """A function of tensors and of a square weight."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, self.weight)


X = torch.randn(2, 8)
linear = torch.nn.functional.linear


@HALVES
def test_layers_and_what_lies_between_are_in_half(half: type[optc.Pass]) -> None:
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    h = Half(nn.Sequential(*layers), torch.randn(2, 3, 12, 12), half=half)
    assert set(h.types.values()) == {"half"}
    assert [change.node for change in h.result.applied if change.rule == h.result.program.history[-1].name] == [
        "conv2d",
        "linear",
    ]
    assert len(h.casts) == 2  # the input and the output
    assert not h.reasons
    assert {str(t.dtype).removeprefix("torch.") for _, t in h.program.constants()} == {
        {"bf16": "bfloat16", "fp16": "float16"}[half.name]
    }
    assert h.program.constant_bytes() * 2 == h.before.constant_bytes()
    h.check_close()


@HALVES
def test_a_model_without_products_is_left_alone(half: type[optc.Pass]) -> None:
    h = Half(lambda x, w: (x.relu() + 1).softmax(-1).exp(), X, half=half)
    assert not h.result.modified
    assert h.program.fingerprint() == h.before.fingerprint()
    assert not h.reasons


def test_delicate_operators_are_in_float_between_casts() -> None:
    h = Half(lambda x, w: linear(linear(x, w).exp().relu(), w), X)
    assert h.types == {"linear": "half", "exp": "float32", "relu": "float32", "linear_1": "half"}
    assert h.reasons == {"exp": "in bfloat16 its result would overflow or lose digits, as torch.autocast has it"}
    assert len(h.casts) == 4
    h.check_close()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda y: y.cumsum(1), "cumsum"),
        (lambda y: y.sum(1, keepdim=True), "sum"),
        (lambda y: y.var(1, keepdim=True), "var"),
        (lambda y: (y * y + 1).log(), "log"),
        (lambda y: y**3, "pow"),
        (lambda y: y.log_softmax(1), "log_softmax"),
    ],
)
def test_sums_powers_and_logarithms_are_in_float(function: Callable[[Tensor], Tensor], name: str) -> None:
    h = Half(lambda x, w: function(linear(x, w)), X)
    assert h.types[name] == "float32"
    assert "torch.autocast" in h.reasons[name]
    h.check_close()


def test_norms_softmax_and_means_follow() -> None:
    norm, batch = nn.LayerNorm(8), nn.BatchNorm1d(8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(batch.running_mean)  # type: ignore[arg-type]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.batch = nn.Linear(8, 8), norm, batch

        def forward(self, x: Tensor) -> Tensor:
            y = self.batch(self.norm(self.linear(x)))
            return y.softmax(1) + y.mean(1, keepdim=True)

    h = Half(Model(), X)
    assert set(h.types.values()) == {"half"}
    h.check_close()


def test_float_and_half_together_compute_in_float() -> None:
    h = Half(lambda x, w: linear(x, w) + x, X)
    assert h.types == {"linear": "half", "add": "float32"}
    assert h.reasons == {"add": "an operand of it is float32"}
    h.check_close()


def test_constants_never_widen_what_they_meet() -> None:
    h = Half(lambda x, w: torch.cat([linear(x, w) * w[0] + w.mean(), w[:1].expand(x.shape[0], -1)], 1), X)
    assert h.types["mul"] == h.types["add"] == h.types["cat"] == "half"
    assert not h.reasons
    h.check_close()


def test_new_tensors_are_cast_where_half_meets_them() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = linear(x, w) + torch.full((8,), 2.0) + torch.arange(8, dtype=torch.float32)
        return torch.where(y > 0, y, torch.zeros(8)) + torch.zeros_like(y, dtype=torch.float32)

    h = Half(function, X)
    assert h.types["where"] == "half"
    assert h.types["full"] == h.types["arange"] == h.types["zeros_like"] == "float32"
    assert not any(target == "add" for target in h.reasons)
    h.check_close()


def test_casts_of_the_model_keep_what_they_say() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = linear(x, w)
        return y.float().to(torch.float32).relu(), y.double() + 1

    h = Half(function, X)
    assert [output.dtype for output in h.program.run(X)] == [torch.float32, torch.float64]
    assert not any(
        "_assert_tensor_metadata" in str(n.target) and n.args[0].name == "linear" for n in h.program.graph.nodes
    )
    h.check_close()


def test_operators_on_no_list_are_in_float_with_a_reason() -> None:
    h = Half(lambda x, w: torch.special.i0e(linear(x, w)), X)
    assert list(h.types.values()) == ["half", "float32"]
    assert list(h.reasons.values()) == ["no rule says that it is safe in bfloat16"]
    h.check_close()


def test_several_outputs_of_one_operator() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        left, right = linear(x, w).chunk(2, 1)
        values, indices = (left * right).sort(1)
        return values, indices

    h = Half(function, X)
    outputs = h.program.run(X)
    assert [output.dtype for output in outputs] == [torch.float32, torch.int64]
    assert set(h.types.values()) == {"half"}


def test_integer_inputs_and_look_ups() -> None:
    h = Half(lambda x, w: linear(torch.nn.functional.embedding(x, w), w), torch.tensor([[1, 2], [3, 7]]))
    assert set(h.types.values()) == {"half"}
    assert len(h.casts) == 1
    assert len(list(h.program.constants())) == 1  # one table, used twice
    h.check_close()


def test_attention_with_a_float_mask() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        q = linear(x, w)
        mask = torch.full((4, 4), float("-inf")).triu(1)
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    h = Half(function, torch.randn(2, 4, 8))
    assert h.types["scaled_dot_product_attention"] == "half"
    assert not h.reasons
    h.check_close()


@HALVES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_other_types_are_left_alone(half: type[optc.Pass], dtype: torch.dtype) -> None:
    h = Half(nn.Linear(8, 8).to(dtype), X.to(dtype), half=half)
    assert not h.result.modified
    own = {"bf16": torch.bfloat16, "fp16": torch.float16}[half.name] is dtype
    name = str(dtype).removeprefix("torch.")
    assert h.reasons == ({} if own else {"linear": f"it computes in {name}, not float32"})


def scaled(scale: float, bias: float = 1.0) -> nn.Module:
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight.normal_().mul_(scale)
        layer.bias.normal_().mul_(bias)
    return layer


@pytest.mark.parametrize(
    ("scale", "reason"), [(1e5, "a constant of it reaches"), (1e-7, "a constant of it are too close to 0 for float16")]
)
def test_constants_that_float16_cannot_hold_stay_in_float(scale: float, reason: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), scaled(scale), nn.Linear(8, 8))
    h = Half(model, X, half=Fp16)
    assert h.types == {"linear": "half", "linear_1": "float32", "linear_2": "half"}
    assert reason in h.reasons["linear_1"]
    assert not Half(model, X, half=Bf16).reasons  # bfloat16 has float32's range
    if scale < 1:
        h.check_close()


def test_a_small_bias_is_no_reason() -> None:
    h = Half(scaled(1.0, bias=1e-9), X, half=Fp16)
    assert not h.reasons
    h.check_close()


@pytest.mark.parametrize(
    ("function", "node", "number"),
    [
        (lambda y: y + 1e5, "add", 1e5),
        (lambda y: y + 1e-7, "add", 1e-7),
        (lambda y: y.clamp(1e-8, None), "clamp", 1e-8),
        (lambda y: y.clamp(None, 1e6), "clamp", 1e6),
        (lambda y: nn.functional.pad(y, (0, 1), value=1e5), "pad", 1e5),
    ],
)
def test_numbers_that_float16_cannot_hold_keep_their_operator_in_float(
    function: Callable[[Tensor], Tensor], node: str, number: float
) -> None:
    h = Half(lambda x, w: function(linear(x, w)), X, half=Fp16)
    assert h.types[node] == "float32"
    assert h.reasons == {node: f"its argument {number:g} is not a number float16 can hold"}
    h.check_close()


@HALVES
def test_what_a_constant_makes_float64_stays_so(half: type[optc.Pass]) -> None:
    h = Half(lambda x, w: linear(x, w) * torch.full((8,), 2.0, dtype=torch.float64), X, half=half)
    assert (h.types["linear"], h.types["mul"]) == ("half", "float64")
    assert h.reasons == {"mul": "its result is float64"}
    h.check_close()


def test_a_mask_of_the_least_float_is_no_infinity() -> None:
    least = torch.finfo(torch.float32).min
    h = Half(lambda x, w: linear(x, w).masked_fill(x < 10, least).softmax(-1), X)
    assert h.types["masked_fill"] == "float32"
    h.check_close()


def test_tied_weights_stay_tied() -> None:
    layer = nn.Linear(8, 8)
    h = Half(nn.Sequential(layer, nn.ReLU(), layer), X)
    assert h.program.constant_bytes() * 2 == h.before.constant_bytes()


def test_a_value_is_cast_once() -> None:
    h = Half(lambda x, w: (linear(x, w) * linear(x, w.t())).exp() + (x @ w), X)
    assert h.casts.count("inputs_0_bfloat16") == 1
    sources = [next(n for n in h.program.graph.nodes if n.name == name).args[0] for name in h.casts]
    assert len(sources) == len(set(sources))


def test_meta_says_what_the_calls_give() -> None:
    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                fake = n.meta["val"]
                assert (fake.dtype, fake.shape, fake.stride()) == (value.dtype, value.shape, value.stride()), n
            return value

    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(), nn.Flatten(), nn.LayerNorm(800), nn.Linear(800, 4))
    h = Half(nn.Sequential(*layers, nn.LogSoftmax(1)), torch.randn(2, 3, 12, 12))
    with torch.no_grad():
        Recorder(h.program.module).run(*h.before.example_inputs)
    assert h.program.graph.output_node().args[0][0].meta["val"].dtype == torch.float32


@HALVES
def test_is_registered_with_its_budget(half: type[optc.Pass]) -> None:
    from optc.plugins.registry import registry

    assert registry().load("pass", half.name) is half
    assert not half.numerics.exact
    assert half.numerics.min_sqnr_db is not None


class Stream(nn.Module):
    """A residual stream: patches, to which two layers with a norm before and a GELU between are added, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.head = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), nn.Linear(16, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x).mean(1))


class Convolutions(nn.Module):
    """A residual block between convolutions, all of which is int8 or lies between integers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(nn.functional.hardswish(x + self.block(nn.functional.gelu(x))))


def halves_behind(model: nn.Module, quantized: Callable[..., Any]) -> tuple[optc.Program, list[str]]:
    """The fused, quantized model in bf16, and the operators that compute in half."""
    program = quantized(Fuse()(optc.capture(model.eval(), (torch.randn(2, 3, 16, 16),))).program).program
    before = program.run(*program.example_inputs)[0]
    made = Bf16()(program).program
    assert not Bf16()(made).modified
    assert float((made.run(*made.example_inputs)[0] - before).norm() / before.norm()) < 0.03
    calls = [n for n in made.graph.nodes if n.op == "call_function" and isinstance(n.meta["val"], Tensor)]
    return made, [
        getattr(n.target, "_opname", "")
        for n in calls
        if n.meta["val"].dtype is torch.bfloat16 and n.target is not torch.ops.aten._to_copy.default
    ]


def test_a_residual_stream_between_quantized_layers_is_in_half(quantized: Callable[..., Any]) -> None:
    made, halves = halves_behind(Stream(), quantized)
    assert halves.count("add") == 2
    assert halves.count("layer_norm") == 3
    assert "gelu" not in halves
    assert not any("linear_add" in str(node.target) for node in made.graph.nodes)


def test_chains_from_quantized_layers_to_quantize_operators_stay_as_they_are(quantized: Callable[..., Any]) -> None:
    _, halves = halves_behind(Convolutions(), quantized)
    assert halves == []


@HALVES
@pytest.mark.parametrize(("isa", "emulated"), [(("avx2",), True), (("avx2", "avx512_bf16"), False), (None, False)])
def test_what_is_emulated_is_said(half: type[optc.Pass], isa: tuple[str, ...] | None, emulated: bool) -> None:
    notes: list[str] = []
    program = optc.capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    half()(program, optc.PassContext(isa=isa, note=notes.append))
    said = f"this CPU has no arithmetic for {half.name}: it is emulated, and slower than float32"
    assert notes == ([said] if emulated else [])
