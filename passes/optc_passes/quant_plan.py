"""What of a program becomes int8, what stays in float, and why. Looks only; changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import fx

from optc import Program, Skip
from optc.ops import ACTIVATIONS, COMPOSITES
from optc.rewrite import DEQUANTIZERS, QUANTIZERS, argument, calls, constant_of, dtype, is_call, only_user, shape
from optc_passes.layers import DECOMPOSED

aten = torch.ops.aten
RULE = "int8"

CONVS = {aten.conv2d.default, *(op for op, row in COMPOSITES.items() if row.is_conv)}
LINEARS = {aten.linear.default, *(op for op, row in COMPOSITES.items() if not row.is_conv)}
PRESERVING = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.transpose.int,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.clone.default,
    aten.max_pool2d.default,
}
"""Operators whose output holds input values and nothing else: input and output share one scale."""

RESCALING = {aten.relu.default, aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default}
"""Operators that runtimes have in int8 and whose output has a range of its own. So do sums and spatial means.

Not here, because onnxruntime has no int8 kernel or is no faster with it than with the float one: SiLU as QLinearSigmoid
and QLinearMul (hardly faster on EfficientNet-B0 than one float QuickGelu, and noisier), hard-swish, hard-sigmoid, GELU,
and the product of a squeeze-and-excitation gate, one operand of which is float.
"""

_ACTIVATIONS = tuple(activation.target for activation in ACTIVATIONS.values())

ATTENTION = aten.scaled_dot_product_attention.default

FLOAT_OPS = {
    aten.conv1d.default: "only 2-d convolutions have int8 kernels",
    aten.conv3d.default: "only 2-d convolutions have int8 kernels",
    aten.conv_transpose1d.default: "transposed convolutions have no int8 kernel",
    aten.conv_transpose2d.input: "transposed convolutions have no int8 kernel",
    aten.conv_transpose3d.input: "transposed convolutions have no int8 kernel",
    aten.embedding.default: "a look-up does no arithmetic",
    ATTENTION: "attention stays in float: softmax is sensitive to rounding",
    aten.bilinear.default: "bilinear layers have no int8 kernel",
    **dict.fromkeys(
        (
            *(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input),
            *(aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default),
        ),
        "recurrent layers are not quantized",
    ),
    aten.convolution.default: DECOMPOSED,
    aten.conv1d.padding: "only 2-d convolutions have int8 kernels",
    aten.conv2d.padding: "it pads one side more than the other, which int8 layers cannot",
    aten.conv3d.padding: "only 2-d convolutions have int8 kernels",
}
"""Operators that do the work of a layer and stay in float, each with the reason reported."""

_FACTORS = {
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default), (0, 1)),
    **dict.fromkeys((aten.inner.default, aten.tensordot.default), (0, 1)),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default, aten.addbmm.default, aten.addmv.default), (1, 2)),
    aten.einsum.default: (1,),
}
"""Products, which stay in float, too: at which places of their arguments they have what they multiply."""


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer to quantize.

    Attributes:
        node: the ATen or composite node.
        tail: the node whose output is rounded: ``node``, or the rectifier right behind it.
        activation: the node that produces the layer's input.
        weight: the ``get_attr`` node of the weight.
        bias: the ``get_attr`` node of the bias, if there is one.
    """

    node: fx.Node
    tail: fx.Node
    activation: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    @property
    def is_conv(self) -> bool:
        """Whether the layer is a convolution: int8 kernels of those write int8 only, so ``tail`` is always rounded."""
        return self.node.target in CONVS


@dataclass(frozen=True)
class Plan:
    """What becomes int8.

    Attributes:
        layers: in graph order.
        shared: value-preserving operators between int8 values (pools, views, concatenations).
        rescaled: operators in int8 with an output range of their own; maps each to the node whose output is rounded.
        attention: attention operators whose queries and keys are rounded, for their product to be computed in int8.
        skipped: what stays in float, with reasons.
    """

    layers: tuple[Layer, ...]
    shared: frozenset[fx.Node]
    rescaled: dict[fx.Node, fx.Node]
    attention: tuple[fx.Node, ...]
    skipped: tuple[Skip, ...]


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensors a node takes, each once; not the sizes it may take as well."""
    return [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), torch.Tensor)]


def make_plan(program: Program, in_float: Collection[str] = (), attention: bool = False) -> Plan:
    """Decide for every layer and every operator between layers.

    Args:
        in_float: names of layer nodes to leave in float, without a word in ``skipped``.
        attention: whether the product of queries and keys is to be computed in int8. Softmax and the product with the
            values stay in float, as in NNCF's default for transformers: of probabilities of which the largest is 1,
            those of most tokens would become 0.
    """
    layers, attended, skipped = [], [], []
    uses, constant = _uses_by_constant(program), _constant(program.graph)
    again = any(True for _ in calls(program, *QUANTIZERS))
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if attention and node.target is ATTENTION and not again and _takes_float32(node):
            attended.append(node)
        elif node.target in FLOAT_OPS:
            skipped.append(Skip(RULE, node.name, FLOAT_OPS[node.target]))
        elif node.target in _FACTORS:
            skipped.append(Skip(RULE, node.name, _why_a_product_is_float(node, constant)))
        if node.target not in CONVS | LINEARS or node.name in in_float:
            continue
        reason = "the program is quantized already" if again else _why_not(program, node, uses)
        if reason:
            skipped.append(Skip(RULE, node.name, reason))
        else:
            source, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
            layers.append(Layer(node, _tail(node), source, weight, bias))
    shared, rescaled = _between(program.graph, layers)
    return Plan(tuple(layers), frozenset(shared), rescaled, tuple(attended), tuple(skipped))


def _takes_float32(attention: fx.Node) -> bool:
    """Whether an attention's queries and keys are computed, in float32, and are not what else is to stay in float."""
    if argument(attention, "key") is argument(attention, "value"):
        return False
    sources = [source for source in attention.args[:2] if isinstance(source, fx.Node) and source.op == "call_function"]
    return len(sources) == 2 and all(dtype(source) is torch.float32 for source in sources)


def _why_a_product_is_float(node: fx.Node, constant: Collection[fx.Node]) -> str:
    given = [node.args[place] for place in _FACTORS[node.target]]  # type: ignore[index]
    factors = [factor for each in given for factor in (each if isinstance(each, (list, tuple)) else [each])]
    if not any(factor in constant for factor in factors):
        return "product of two activations, stays in float"
    if node.target in (aten.mm.default, aten.addmm.default):
        return f"a product of matrices, or {DECOMPOSED}"
    return "a product with a constant becomes int8 only where it is written as a linear layer"


def _constant(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on no input of the model."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def _why_not(program: Program, node: fx.Node, uses: Counter[int]) -> str | None:
    """Why a layer cannot be quantized, or ``None``."""
    source, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    value = constant_of(program, weight)
    if is_call(weight, *DEQUANTIZERS):
        return "its weight is quantized already"
    if value is None:
        return "its weight is computed, not a constant"
    if value.ndim < 2:
        return "its weight is a vector"
    if value.dtype != torch.float32 or dtype(node) != torch.float32:
        return f"it computes in {str(dtype(node)).removeprefix('torch.')}, not float32"
    if uses[value.data_ptr()] > 1:
        return "its weight is used more than once"
    if bias is not None:
        value = constant_of(program, bias)
        if value is None:
            return "its bias is computed, not a constant"
        if uses[value.data_ptr()] > 1:
            return "its bias is used more than once"
        if tuple(value.shape) != shape(weight)[:1]:
            return "its bias is not one number per output channel"
    if not isinstance(source, fx.Node) or source.op == "get_attr":
        return "its input is a constant"
    if node.target in CONVS and len(shape(source)) != 4:
        return "its input has no batch dimension"
    return None


def _uses_by_constant(program: Program) -> Counter[int]:
    """How many nodes use each constant, by data pointer (several ``get_attr`` nodes may name one tensor)."""
    uses: Counter[int] = Counter()
    for node in program.graph.find_nodes(op="get_attr"):
        value = constant_of(program, node)
        if value is not None:
            uses[value.data_ptr()] += len(node.users)
    return uses


def _tail(node: fx.Node) -> fx.Node:
    """The rectifier that is the only user of ``node``, else ``node``."""
    user = only_user(node)
    if user is None:
        return node
    rectifies = is_call(user, aten.relu.default)
    rectifies |= is_call(user, aten.hardtanh.default) and argument(user, "min_val") == 0
    return user if rectifies else node


def _between(graph: fx.Graph, layers: list[Layer]) -> tuple[set[fx.Node], dict[fx.Node, fx.Node]]:
    """The operators between int8 layers that run in int8 themselves: (sharing a scale, with a scale of their own).

    A value is *wanted* in int8 by the layers, and through operators in int8, that take it. Dropping an operator whose
    operands are not there in int8 may leave its other operand unwanted, so the choice repeats until nothing changes.

    An activation in float whose output a layer takes is rounded for that layer, so a sum with an int8 value takes it
    rounded too: in float the activation would have two outputs to write, and the sum another kernel.
    """
    inputs = {layer.node: layer.activation for layer in layers}
    tails = {layer.tail for layer in layers if layer.is_conv}
    taken = {layer.tail for layer in layers}
    rounded = {source for source in inputs.values() if is_call(source, *_ACTIVATIONS) and operands(source)[0] in tails}
    chosen = {node for node in graph.nodes if node not in taken and _could_be_int8(node)}
    while True:
        wanted, only_wanted = _wanted(graph, inputs, chosen)
        kept, carried = set(), set(tails)
        for node in graph.nodes:
            if node not in chosen or node not in wanted:
                continue
            there = [source for source in operands(node) if source in carried]
            if there and set(operands(node)) <= {*there, *(rounded if node.target is aten.add.Tensor else ())}:
                kept.add(node)
                carried.add(node)
            elif node in only_wanted and node.target in PRESERVING and operands(node)[0].op != "get_attr":
                # Rounding in front of it instead of behind it moves a quarter of the bytes. What it hands on does not
                # count as int8 for an addition: a residual stream fed by float operators stays in float.
                kept.add(node)
        if kept == chosen:
            break
        chosen = kept
    shared = {node for node in chosen if node.target in PRESERVING | {aten.cat.default}}
    rescaled = {node: _tail(node) for node in graph.nodes if node in chosen - shared}
    covered = {tail for node, tail in rescaled.items() if tail is not node}
    return shared, {node: tail for node, tail in rescaled.items() if node not in covered}


def _wanted(graph: fx.Graph, inputs: dict[fx.Node, fx.Node], chosen: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """Nodes that some user, and nodes that every user, wants in int8 (asking for a size does not count as use)."""
    wanted: set[fx.Node] = set()
    only_wanted: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        users = [user for user in node.users if not is_call(user, aten.sym_size.int)]
        wanting = [user for user in users if inputs.get(user) is node or (user in chosen and user in wanted)]
        if wanting:
            wanted.add(node)
            if len(wanting) == len(users):
                only_wanted.add(node)
    return wanted, only_wanted


def _could_be_int8(node: fx.Node) -> bool:
    """Whether runtimes have an int8 form of an operator between layers."""
    if not is_call(node, *PRESERVING, *RESCALING, aten.cat.default, aten.mean.dim, aten.add.Tensor):
        return False
    if dtype(node) != torch.float32 or not operands(node):
        return False
    if node.target is aten.mean.dim:
        rank = len(shape(operands(node)[0]))
        return rank == 4 and {dim % rank for dim in argument(node, "dim") or ()} == {2, 3}
    if node.target is aten.add.Tensor:
        both = operands(node)
        return len(both) == 2 and shape(both[0]) == shape(both[1]) and argument(node, "alpha") == 1
    return True
