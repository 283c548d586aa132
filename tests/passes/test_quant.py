"""quant as a whole: options, budget, second runs, int8 kernels in onnxruntime, whole models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import optc
from optc.batches import as_calibration
from optc.budget import Budget, Metric
from optc.lowering.onnx_export import export_onnx
from optc.passmanager.instruments.verify import Verify
from optc_passes.fuse import Fuse
from optc_passes.observers import ActivationObserver
from optc_passes.quant import Quant
from optc_passes.quant_formats import LayerFormats

IMAGE = torch.randn(2, 3, 16, 16)


class Residual(nn.Module):
    """A stem with a pool, a residual block, a head: every int8 operator once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 1, bias=False)
        )
        self.head = nn.Sequential(
            nn.AvgPool2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(torch.relu(y + self.block(y)))


class Transformer(nn.Module):
    """One encoder block on patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.norm, self.qkv, self.project = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.project(mixed)
        return (x + self.mlp(x)).mean(1)


class Outlier(nn.Module):
    """Its second layer cannot be int8: 1e5 and ordinary values share its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(9, 8, 1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.b.weight[:, 8] = 0

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.gelu(self.a(x))
        return self.c(self.b(torch.cat([y, 1e5 * y[:, :1]], 1)))


@pytest.mark.parametrize(
    "options", [{}, {"observer": "percentile", "percentile": 99.9}, {"observer": "entropy"}, {"observer": "mse"}]
)
@pytest.mark.parametrize("model", [Residual, Transformer])
def test_every_observer_keeps_the_model(quantized: Callable, model: type[nn.Module], options: dict) -> None:
    q = quantized(model().eval(), IMAGE, **options)
    assert q.sqnr_db > 15
    assert not any("given back" in reason for reason in q.reasons.values())


def test_observers_differ(quantized: Callable) -> None:
    torch.manual_seed(1)
    program = optc.capture(Residual().eval(), (IMAGE,))
    batches = [(torch.randn(8, 3, 16, 16) ** 5,)]
    choices = ({"observer": "minmax"}, {"observer": "percentile", "percentile": 99.0}, {"observer": "entropy"})
    runs = [quantized(program, batches=batches, **choice).program for choice in choices]
    outputs = [run.run(IMAGE)[0] for run in runs]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("options", [{"observer": "median"}, {"percentile": 101.0}, {"bits": 4}])
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(optc.OptcError):
        Quant(**options)


def test_what_was_done_is_listed(quantized: Callable) -> None:
    q = quantized(Transformer(), IMAGE)
    assert [change.detail for change in q.result.applied] == [
        "patches.weight", "qkv.weight", "project.weight", "mlp.1.weight", "mlp.3.weight", "queries and keys"
    ]  # fmt: skip
    assert {change.rule for change in q.result.applied} == {"int8"}
    assert q.reasons == {}


def attention_operands(program: optc.Program) -> list[str]:
    """What queries, keys and values are read as: the integers they are dequantized from, or float32."""
    (attention,) = program.graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )
    found = []
    for node in attention.args[:3]:
        quantized = "dequantize_per_tensor" in str(node.target)
        if quantized:
            assert node.args[2] == 0, "OpenVINO's kernels take no zero point"
        found.append(str((node.args[0] if quantized else node).meta["val"].dtype).removeprefix("torch."))
    return found


def test_on_a_cpu_attention_multiplies_queries_by_keys_in_int8(quantized: Callable) -> None:
    q = quantized(Transformer(), IMAGE)
    assert attention_operands(q.program) == ["int8", "int8", "float32"]


class LoudQueries(Transformer):
    """One channel of its queries is far larger than the others, and meets keys of 0: it costs the others all bits."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.qkv.weight[:32] *= 5
            self.project.weight *= 5
            self.qkv.weight[16], self.qkv.bias[16] = 0.0, 0.0
            self.qkv.bias[0] = 3000.0


def test_attention_goes_back_to_float_before_layers_do(quantized: Callable) -> None:
    torch.manual_seed(0)
    program = optc.capture(LoudQueries().eval(), (IMAGE,))
    batches = [(torch.randn(4, 3, 16, 16),) for _ in range(4)]

    class Data:
        description = "noise"

        def __iter__(self) -> object:
            return iter(batches)

    layers = LayerFormats(program, optc.PassContext(calibration=Data()), ActivationObserver)
    layers.calibrate(optc.PassContext(calibration=Data()))
    formats = dict.fromkeys(layers.names, "int8")
    whole, without_attention = (layers.attempt(formats, attention).sqnr for attention in (True, False))
    assert without_attention > whole + 1
    budget = Budget(Metric("always 1", lambda call: 1.0), 1.0, 0.0, min_sqnr_db=without_attention - 0.1)
    result = Quant()(program, optc.PassContext(calibration=Data(), budget=budget))
    assert attention_operands(result.program) == ["float32"] * 3
    assert [(skip.node, skip.reason) for skip in result.skipped] == [
        ("scaled_dot_product_attention", "given back to float: the budget has no room for its noise")
    ]
    assert len(result.applied) == 5


def test_a_second_run_says_it_is_done(quantized: Callable) -> None:
    once = quantized(Outlier(), IMAGE)
    again = Quant()(once.program)
    assert not again.modified
    assert {skip.reason for skip in again.skipped} == {"the program is quantized already"}
    assert len(again.skipped) == 3


def test_only_the_harmful_layer_goes_back_to_float(quantized: Callable) -> None:
    q = quantized(Outlier(), IMAGE)
    assert [change.detail for change in q.result.applied] == ["a.weight", "c.weight"]
    assert list(q.reasons) == ["conv2d_1"]
    assert "given back to float: in int8 alone it leaves the model" in q.reasons["conv2d_1"]
    assert "below 11 dB" in q.reasons["conv2d_1"]
    assert dict(q.program.constants())["b.weight"].dtype == torch.float32
    assert "quantization_annotation" not in str([n.meta for n in q.program.graph.nodes])
    assert q.sqnr_db > 25


def test_a_model_that_only_works_in_float_is_handed_back(quantized: Callable) -> None:
    class OnlyOutlier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Linear(6, 4)
            with torch.no_grad():
                self.b.weight[:, 3:] = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cat([x, 1e5 * x], 1))

    q = quantized(OnlyOutlier(), torch.randn(2, 3))
    assert not q.result.modified
    assert list(q.reasons) == ["linear"]


@pytest.mark.parametrize("size", [1e-10, 1e-6, 1e6])
def test_tiny_and_huge_activations_keep_their_precision(quantized: Callable, size: float) -> None:
    model = Residual().eval()
    with torch.no_grad():
        for parameter in model.head[-1].parameters():
            parameter.mul_(size)
        for parameter in model.stem[1].parameters():
            parameter.mul_(size)
    assert quantized(model, IMAGE).sqnr_db > 20


def test_tuples_of_outputs_and_several_inputs(quantized: Callable) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(y) + x

    q = quantized(Two(), torch.randn(2, 4), torch.randn(2, 3))
    assert len(q.result.applied) == 2
    assert q.sqnr_db > 30


def onnx_operators(program: optc.Program, folder: Path, x: Tensor) -> tuple[Counter[str], Tensor]:
    """What onnxruntime makes of a program: operators it runs, and its output on ``x``."""
    export_onnx(program, folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    graph = onnx.load(folder / "optimized.onnx").graph
    return Counter(node.op_type for node in graph.node), torch.from_numpy(output)


def test_onnxruntime_runs_all_of_a_convolutional_net_in_int8(quantized: Callable, tmp_path: Path) -> None:
    q = quantized(Fuse()(optc.capture(Residual().eval(), (IMAGE,))).program)
    found, output = onnx_operators(q.program, tmp_path, IMAGE)
    assert found["QLinearConv"] == 3
    assert found["QGemm"] == 2
    assert found["QLinearAdd"] == 1
    assert found["QLinearAveragePool"] == 1
    assert not {"Conv", "Gemm", "MatMul", "Add", "Relu", "Clip"} & set(found), found
    assert found["QuantizeLinear"] == 1  # the model's input
    assert found["DequantizeLinear"] == 0
    noise = (output - q.program.run(IMAGE)[0]).square().sum() / output.square().sum()
    assert noise < 1e-2


def test_onnxruntime_runs_the_linear_layers_of_a_transformer_in_int8(quantized: Callable, tmp_path: Path) -> None:
    q = quantized(Fuse()(optc.capture(Transformer().eval(), (IMAGE,))).program)
    found, _ = onnx_operators(q.program, tmp_path, IMAGE)
    assert found["QLinearConv"] == 1
    assert found["MatMulIntegerToFloat"] == 4
    assert not {"Conv", "Gemm"} & set(found), found


MODELS = (
    "alexnet", "resnet18", "resnet50", "mobilenetv3_large_100", "efficientnet_b0", "convnext_tiny",
    "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "densenet121", "mixnet_s", "deit3_small_patch16_224",
    "vit_base_patch16_224",
)  # fmt: skip


def check_verified(name: str, size: int, folder: Path) -> optc.PassResult:
    from optc.torchvision_ops import declare_torchvision_ops

    declare_torchvision_ops()
    import timm
    import torchvision

    model = torchvision.models.alexnet() if name == "alexnet" else timm.create_model(name)
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(2, 3, size, size, generator=generator),) for _ in range(5)]
    captured = optc.capture(model, batches[0])

    class Data:
        description = "seeded noise"

        def __iter__(self):
            return iter(batches[1:])

    verify = Verify(captured, batches[:1], folder)
    context = optc.PassContext(calibration=Data(), instruments=(verify,))
    result = optc.PassManager((Fuse(), Quant()))(captured, context)
    kinds = Counter(getattr(node.target, "_opname", "") for node in captured.graph.nodes)
    given_back = [skip for skip in result.skipped if "given back" in skip.reason]
    quantized = [change for change in result.applied if change.rule == "int8"]
    assert not given_back
    assert 0 < len(quantized) <= kinds["conv2d"] + kinds["linear"] + kinds["scaled_dot_product_attention"]
    assert result.program.constant_bytes() < 0.35 * captured.constant_bytes()
    return result


@pytest.mark.parametrize(("name", "size"), [("test_efficientnet", 160), ("test_vit3", 160)])
def test_small_models_are_verified(name: str, size: int, tmp_path: Path) -> None:
    check_verified(name, size, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_are_verified(name: str, tmp_path: Path) -> None:
    """With random weights EfficientNet-B0's outputs are of the order of 1e-6."""
    result = check_verified(name, 224, tmp_path)
    if name == "alexnet":
        assert result.program.constant_bytes() < 61.5e6


def test_for_a_gpu_activations_are_symmetric_int8_and_the_model_is_kept() -> None:
    program = optc.capture(Residual(), (IMAGE,))
    batches = [(torch.randn(4, 3, 16, 16),) for _ in range(4)]

    class Data:
        description = "noise"

        def __iter__(self) -> object:
            return iter(batches)

    context = optc.PassContext(optc.Target("cuda"), Data())
    result = optc.PassManager([Fuse(), Quant()])(program, context).program
    rounded = result.graph.find_nodes(
        op="call_function", target=torch.ops.quantized_decomposed.quantize_per_tensor.default
    )
    assert rounded
    assert {node.args[2:] for node in rounded} == {(0, -128, 127, torch.int8)}
    reference, output = program.run(IMAGE)[0], result.run(IMAGE)[0]
    assert float(10 * torch.log10(reference.square().sum() / (reference - output).square().sum())) > 20


class Unusual(nn.Module):
    """Convolutions that no int8 layer is made of, beside one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.same = nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(4, 4, 2, padding="same")
        self.single = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.same(self.plain(x)), 2)
        return torch.stack([self.single(image) for image in x])


def test_convolutions_that_cannot_be_quantized_are_listed() -> None:
    program = optc.capture(Unusual(), (IMAGE[:1],))
    result = Quant()(program, optc.PassContext(calibration=as_calibration([IMAGE[:1], IMAGE[1:]] * 4, program)))
    reasons = {skip.node: skip.reason for skip in result.skipped}
    assert sorted(reasons.values()) == [
        "it pads one side more than the other, which int8 layers cannot",
        "its input has no batch dimension",
    ]
    assert sum(change.rule == "int8" for change in result.applied) == 1
