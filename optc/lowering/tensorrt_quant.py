"""Explicit quantization in the forms TensorRT takes: symmetric int8 in the graph, and modelopt's operator for it."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from optc.errors import BackendError
from optc.ops import decompose, global_pools_as_means
from optc.program import Program, complete_meta
from optc.rewrite import (
    DEQUANTIZERS,
    QUANTIZERS,
    add_constant,
    argument,
    calls,
    constant_of,
    dtype,
    erase_unused,
    is_call,
    label,
    replace,
)

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed
PIP_MODELOPT = "pip install nvidia-modelopt requests"
"""modelopt 0.47 imports requests and does not declare it."""


def tensorrt_form(program: Program) -> Program:
    """A program that computes the same, without composites and with quantization as TensorRT takes it.

    TensorRT has int8 with zero point 0 and nothing else of 8 bits: activations per tensor, weights per output channel,
    and only between a quantize and a dequantize (``docs/operators.md`` of onnx-tensorrt: DequantizeLinear takes no
    int32, Shape and Reshape no int8). So int32 biases become the float32 they stand for, and sizes are asked of the
    value before it is quantized. Global pools become means.

    Raises:
        BackendError: quantization that TensorRT has not, with each node and the reason.
    """
    form = decompose(program)
    global_pools_as_means(form)
    float_biases(form)
    _sizes_of_floats(form)
    refused = [
        f"{label(node)}: {reason}"
        for node in calls(form, *QUANTIZERS, *DEQUANTIZERS, *_other_overloads())
        if (reason := _refusal(form, node))
    ]
    if refused:
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise BackendError(
            f"TensorRT takes symmetric int8 only, not {'; '.join(refused[:3])}{more}",
            "quantize for the device cuda: the quant pass then writes symmetric int8",
        )
    complete_meta(form)
    form.module.recompile()
    return form


def quantize_ops(form: Program) -> Program:
    """What :func:`tensorrt_form` gives with each quantize/dequantize pair as one ``tensorrt::quantize_op``.

    Torch-TensorRT's converter makes the layers Quantize and Dequantize of it, both with the scale ``amax / 127``. Int8
    weights become the float32 they stand for, which the Quantize layer rounds back when the engine is built.

    Raises:
        BackendError: nvidia-modelopt, which registers the operator, is not installed.
    """
    operator = quantize_op()
    result = form.fork()
    pairs: dict[fx.Node, fx.Node] = {}
    for node in calls(result, *DEQUANTIZERS):
        source, narrow = node.args[0], argument(node, "quant_min") == -127
        assert isinstance(source, fx.Node)
        if is_call(source, *QUANTIZERS):
            if source not in pairs:
                value, amax = source.args[0], add_constant(result, source, f"{source.name}_amax", _amax(result, source))
                pairs[source] = _call(source, operator, value, amax, 8, 0, False, narrow)
            new = pairs[source]
        else:
            values = {operand: constant_of(result, operand) for operand in node.all_input_nodes}
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            weight = add_constant(result, node, f"{node.name}_value", node.target(*args, **kwargs))  # type: ignore[operator]
            amax = add_constant(result, node, f"{node.name}_amax", _amax(result, node))
            new = _call(node, operator, weight, amax, 8, 0, False, narrow)
        new.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack") or {})
        if is_call(source, *QUANTIZERS) and dtype(source.args[0]) != dtype(node):  # type: ignore[arg-type]
            new = _call(node, aten._to_copy.default, new, dtype=dtype(node))
        node.replace_all_uses_with(new)
        constants = node.all_input_nodes
        result.graph.erase_node(node)
        erase_unused([*constants, *(operand for constant in constants for operand in constant.all_input_nodes)])
    for node in calls(result, *QUANTIZERS):
        erase_unused([node])
    complete_meta(result)
    result.module.recompile()
    return result


def quantize_op() -> OpOverload:
    """modelopt's ``tensorrt::quantize_op(input, amax, num_bits, exponent_bits, unsigned, narrow_range)``.

    Raises:
        BackendError: nvidia-modelopt cannot be imported; says why.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # importing it warns of torch's deprecations inside it
            importlib.import_module("modelopt.torch.quantization")
    except ImportError as error:
        raise BackendError(
            f"a quantized program needs the operator tensorrt::quantize_op of nvidia-modelopt: {error}", PIP_MODELOPT
        ) from error
    operator: OpOverload = torch.ops.tensorrt.quantize_op.default
    return operator


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Let ``tensorrt::quantize_op`` compute on any device meanwhile.

    Torch-TensorRT calls it on each weight before it decides not to fold it. modelopt's own kernel is compiled on first
    use, which takes minutes and nvcc; without nvcc it fails.
    """
    with torch.library._scoped_library("tensorrt", "IMPL") as library:
        with warnings.catch_warnings(action="ignore"):  # that there is a kernel already
            for device in ("CPU", "CUDA"):
                library.impl("quantize_op", _fake_quantize, device, allow_override=True)
        yield


def _fake_quantize(
    value: Tensor, amax: Tensor, num_bits: int, exponent_bits: int, unsigned: bool, narrow_range: bool
) -> Tensor:
    if (num_bits, exponent_bits, unsigned) != (8, 0, False):
        raise NotImplementedError("only signed int8 is written by optc")
    scale = amax.float() / 127
    rounded = (value.float() / scale).round().clamp(-127 if narrow_range else -128, 127)
    return (rounded * scale).to(value.dtype)


def _call(before: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    with before.graph.inserting_before(before):
        return before.graph.call_function(target, args, kwargs)


def _amax(program: Program, node: fx.Node) -> Tensor:
    """Largest magnitude the scale stands for, float32: of shape [1], or [channels, 1, …] as the value has axes."""
    if node.target in (qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default):
        return torch.tensor([argument(node, "scale") * 127], dtype=torch.float32, device=node.meta["val"].device)
    scales = constant_of(program, argument(node, "scales"))
    assert scales is not None
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    return scales.detach().double().mul(127).float().view(-1, *[1] * (rank - 1))


def float_biases(program: Program) -> None:
    """Evaluate each dequantization of an int32 constant, in place."""
    for node in calls(program, *DEQUANTIZERS):
        values: dict[fx.Node, Any] = {operand: constant_of(program, operand) for operand in node.all_input_nodes}
        if argument(node, "dtype") != torch.int32 or any(value is None for value in values.values()):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        new = add_constant(program, node, f"{node.name}_value", node.target(*args, **kwargs))  # type: ignore[operator]
        replace(node, new)
        erase_unused(values)


def _sizes_of_floats(program: Program) -> None:
    for node in calls(program, aten.sym_size.int):
        source = node.args[0]
        if is_call(source, *QUANTIZERS):
            node.replace_input_with(source, source.args[0])  # type: ignore[arg-type, union-attr]


def _other_overloads() -> tuple[OpOverload, ...]:
    """The quantize and dequantize operators whose scale is a tensor."""
    return tuple(
        getattr(packet, name)
        for packet in (qd.quantize_per_tensor, qd.dequantize_per_tensor)
        for name in ("tensor", "tensor2")
    )


def _refusal(program: Program, node: fx.Node) -> str | None:
    """Why TensorRT has no such quantize or dequantize, or ``None`` if it has."""
    if node.target == qd.dequantize_per_channel_group.default:
        return "its weights have a scale for each block"
    if not is_call(node, *QUANTIZERS, *DEQUANTIZERS):
        return "its scale is computed while the model runs"
    kind = argument(node, "dtype")
    if kind != torch.int8:
        return f"it is {str(kind).removeprefix('torch.')}"
    per_channel = node.target in (qd.quantize_per_channel.default, qd.dequantize_per_channel.default)
    if per_channel:
        scales, zeros = (constant_of(program, argument(node, name)) for name in ("scales", "zero_points"))
        if scales is None:
            return "its scales are computed while the model runs"
        if argument(node, "zero_points") is not None and (zeros is None or bool(zeros.any())):
            return "its zero points are not 0"
        if argument(node, "axis") != 0:
            return f"its channels are on axis {argument(node, 'axis')}, not on axis 0"
        if is_call(node, *QUANTIZERS):
            return "an activation is quantized per channel"
    elif argument(node, "zero_point") != 0:
        return f"its zero point is {argument(node, 'zero_point')}"
    if (argument(node, "quant_min"), argument(node, "quant_max")) not in ((-128, 127), (-127, 127)):
        return "it clamps to less than 8 bits"
    return _unpaired(program, node)


def _unpaired(program: Program, node: fx.Node) -> str | None:
    """Why a node has no partner: the integers must go straight from a quantize, or a constant, to a dequantize."""
    if is_call(node, *QUANTIZERS):
        other = next((user for user in node.users if not is_call(user, *DEQUANTIZERS)), None)
        return f"its integers go to {label(other)}" if other is not None else None
    source = node.args[0]
    if is_call(source, *QUANTIZERS):
        same = all(argument(source, name) == argument(node, name) for name in ("scale", "quant_min"))  # type: ignore[arg-type]
        return None if same else "its scale is not that of its quantize"
    return None if constant_of(program, source) is not None else f"it takes the integers of {label(source)}"  # type: ignore[arg-type]
