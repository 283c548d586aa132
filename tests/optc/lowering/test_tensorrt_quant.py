"""Quantization for TensorRT: what is refused, what stays the same, and modelopt's operator."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx

from optc import PassContext, Program, Target, capture
from optc.errors import BackendError
from optc.lowering.tensorrt import layer_types
from optc.lowering.tensorrt_quant import float_biases, plain_kernels, quantize_op, quantize_ops, tensorrt_form
from optc.passmanager.manager import build_passes
from optc.rewrite import constant_of, is_quantized, set_argument

qd = torch.ops.quantized_decomposed
X = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(3))


class Noise:
    description = "noise"

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter([(torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)),)])


def passed(program: Program, passes: str, device: str = "cuda") -> Program:
    return build_passes(passes, None)(program, PassContext(Target(device), Noise())).program


@pytest.fixture(scope="module")
def cnn8(captured_cnn: Program) -> Program:
    return passed(captured_cnn, "fuse,quant")


@pytest.fixture(scope="module")
def block8(captured_block: Program) -> Program:
    return passed(captured_block, "fuse,quant")


@pytest.fixture
def modelopt_on_cpu() -> Iterator[list[tuple[object, ...]]]:
    """modelopt's operator with modelopt's own arithmetic for CPU tensors: its kernel for the operator needs CUDA.

    Gives the arguments (but for the tensors) of each call.
    """
    quantize_op()
    from modelopt.torch.quantization.tensor_quant import _tensor_quant

    seen: list[tuple[object, ...]] = []

    def run(x: Tensor, amax: Tensor, bits: int, exponent_bits: int, unsigned: bool, narrow: bool) -> Tensor:
        seen.append((bits, exponent_bits, unsigned, narrow))
        return _tensor_quant(x, amax, bits, unsigned, narrow)

    library = torch.library.Library("tensorrt", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # that another kernel is there already
        library.impl("quantize_op", run, "CPU", allow_override=True)
    yield seen
    library._destroy()


def close(a: Program, b: Program) -> bool:
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(a.run(X), b.run(X), strict=True))


def nodes(program: Program, *targets: object) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target in targets]


@pytest.mark.parametrize("name", ["cnn8", "block8"])
def test_the_form_computes_the_same_and_leaves_the_program_alone(name: str, request: pytest.FixtureRequest) -> None:
    program = request.getfixturevalue(name)
    before = program.fingerprint()
    form = tensorrt_form(program)
    assert close(form, program)
    assert program.fingerprint() == before
    dequantizers = nodes(form, qd.dequantize_per_channel.default)
    assert dequantizers
    assert {constant_of(form, node.args[0]).dtype for node in dequantizers} == {torch.int8}  # type: ignore[union-attr]
    assert all("optc::" not in str(getattr(node.target, "_schema", "")) for node in form.graph.nodes)


def test_float_biases_are_those_that_integers_stood_for(cnn8: Program) -> None:
    floats = cnn8.fork()
    float_biases(floats)
    assert torch.int32 in {tensor.dtype for _, tensor in cnn8.constants()}
    assert torch.int32 not in {tensor.dtype for _, tensor in floats.constants()}
    assert is_quantized(floats)
    assert close(floats, cnn8)


def test_sizes_are_asked_of_floats(block8: Program) -> None:
    program = block8.fork()
    size = nodes(program, torch.ops.aten.sym_size.int)[0]
    quantize = next(node for node in program.graph.nodes if node.target is qd.quantize_per_tensor.default)
    quantize.append(size)
    size.args = (quantize, 0)
    form = tensorrt_form(program)
    assert close(form, block8)
    assert nodes(form, torch.ops.aten.sym_size.int)[0].args == (form.graph.find_nodes(op="placeholder")[0], 0)


def test_a_global_pool_of_a_channels_last_image_is_a_mean() -> None:
    class Pooled(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
            return torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1) + x.mean((2, 3))

    program = capture(Pooled(), (torch.randn(1, 3, 16, 16),))
    form = tensorrt_form(program)
    assert close(form, program)

    def decomposed(program: Program) -> set[str]:
        exported = torch.export.export(program.module, program.example_inputs).run_decompositions()
        return {str(node.target) for node in exported.graph.nodes}

    assert "aten.as_strided.default" in decomposed(program)
    assert "aten.as_strided.default" not in decomposed(form)


def test_affine_uint8_is_refused_with_the_mend(captured_cnn: Program) -> None:
    with pytest.raises(BackendError, match=r"symmetric int8 only.*it is uint8.* — quantize for the device cuda"):
        tensorrt_form(passed(captured_cnn, "fuse,quant", "cpu"))


@pytest.mark.parametrize(
    ("target", "argument", "value", "reason"),
    [
        (qd.quantize_per_tensor.default, "zero_point", 3, "its zero point is 3"),
        (qd.quantize_per_tensor.default, "quant_max", 7, "it clamps to less than 8 bits"),
        (qd.quantize_per_tensor.default, "scale", 0.5, "its scale is not that of its quantize"),
        (qd.dequantize_per_channel.default, "axis", 1, "its channels are on axis 1, not on axis 0"),
    ],
)
def test_what_tensorrt_has_not_is_refused(
    cnn8: Program, target: object, argument: str, value: object, reason: str
) -> None:
    program = tensorrt_form(cnn8)
    set_argument(nodes(program, target)[0], argument, value)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=reason):
        tensorrt_form(program)


def test_nonzero_weight_zero_points_are_refused(cnn8: Program) -> None:
    program = tensorrt_form(cnn8)
    weight = nodes(program, qd.dequantize_per_channel.default)[0]
    zeros = constant_of(program, weight.args[2])
    assert zeros is not None
    path, _, name = str(weight.args[2].target).rpartition(".")  # type: ignore[union-attr]
    setattr(program.module.get_submodule(path), name, torch.ones_like(zeros))
    with pytest.raises(BackendError, match="its zero points are not 0"):
        tensorrt_form(program)


def test_weights_in_blocks_are_quantized_and_refused(captured_block: Program) -> None:
    program = passed(captured_block, "fuse,quant<formats=int4-weights>")
    assert is_quantized(program)
    with pytest.raises(BackendError, match="its weights have a scale for each block"):
        tensorrt_form(program)


def test_integers_that_go_elsewhere_are_refused(cnn8: Program) -> None:
    program = tensorrt_form(cnn8)
    quantize = nodes(program, qd.quantize_per_tensor.default)[1]
    with program.graph.inserting_after(quantize):
        view = program.graph.call_function(torch.ops.aten.relu.default, (quantize,))
    quantize.replace_all_uses_with(view, delete_user_cb=lambda user: user is not view)
    with pytest.raises(BackendError, match=r"its integers go to relu.*it takes the integers of relu"):
        tensorrt_form(program)


@pytest.mark.parametrize("name", ["cnn8", "block8"])
def test_modelopts_operator_computes_what_the_graph_does(
    name: str, request: pytest.FixtureRequest, modelopt_on_cpu: list[tuple[object, ...]]
) -> None:
    form = tensorrt_form(request.getfixturevalue(name))
    rewritten = quantize_ops(form)
    assert is_quantized(form)
    assert not is_quantized(rewritten)
    assert close(rewritten, form)
    pairs = len(nodes(form, qd.quantize_per_tensor.default))
    weights = len(nodes(form, qd.dequantize_per_channel.default))
    assert len(nodes(rewritten, quantize_op())) == pairs + weights
    assert set(modelopt_on_cpu) == {(8, 0, False, False), (8, 0, False, True)}


def test_each_value_is_rounded_as_the_graph_rounds_it(cnn8: Program, modelopt_on_cpu: list[tuple[object, ...]]) -> None:
    """Value by value, for activations beyond the range too, and for every weight."""
    form = tensorrt_form(cnn8)
    rewritten = quantize_ops(form)
    pairs = [*nodes(form, qd.dequantize_per_tensor.default), *nodes(form, qd.dequantize_per_channel.default)]
    operators = {node.args[1].target: node for node in nodes(rewritten, quantize_op())}  # type: ignore[union-attr]
    for node in pairs:
        source = node.args[0]
        scale = node.args[1]
        if node.target is qd.dequantize_per_tensor.default:
            assert isinstance(source, fx.Node)
            x = torch.linspace(-150, 150, 1201) * scale + 0.003 * scale  # type: ignore[operator]
            expected = node.target(source.target(x, *source.args[1:]), *node.args[1:])  # type: ignore[operator, arg-type]
            amax = constant_of(rewritten, operators[f"{source.name}_amax"].args[1])
            assert torch.allclose(quantize_op()(x, amax, *operators[f"{source.name}_amax"].args[2:]), expected)
        else:
            call = operators[f"{node.name}_amax"]
            weight, amax = (constant_of(rewritten, argument) for argument in call.args[:2])
            assert amax is not None
            assert weight is not None
            assert amax.shape == (len(weight), *[1] * (weight.dim() - 1))
            assert torch.allclose(quantize_op()(weight, amax, *call.args[2:]), weight, rtol=1e-6, atol=0)


def test_the_kernel_used_while_building_is_modelopts_arithmetic(modelopt_on_cpu: list[tuple[object, ...]]) -> None:
    x = torch.randn(4, 1000) * 3
    for amax in (torch.tensor([2.5]), torch.tensor([1.0, 2.0, 0.5, 4.0]).view(-1, 1)):
        for narrow in (True, False):
            expected = quantize_op()(x, amax, 8, 0, False, narrow)
            with plain_kernels():
                assert torch.allclose(quantize_op()(x, amax, 8, 0, False, narrow), expected, rtol=1e-6, atol=0)
    assert len(modelopt_on_cpu) == 4
    with plain_kernels(), pytest.raises(NotImplementedError, match="signed int8"):
        quantize_op()(x, torch.ones(1), 8, 4, False, True)


def test_layers_are_counted_by_the_types_of_the_graph(
    cnn8: Program, captured_cnn: Program, captured_block: Program
) -> None:
    assert layer_types(tensorrt_form(cnn8)) == {"int8": 4}
    assert layer_types(tensorrt_form(passed(captured_cnn, "fuse"))) == {"float32": 4}
    assert layer_types(tensorrt_form(passed(captured_block, "bf16"))) == {"bfloat16": 4}


def test_without_modelopt_the_error_has_the_pip_line(cnn8: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    with pytest.raises(BackendError, match=r"tensorrt::quantize_op.* — pip install nvidia-modelopt requests"):
        quantize_ops(tensorrt_form(cnn8))
