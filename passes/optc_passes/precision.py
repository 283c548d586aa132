"""``bf16`` and ``fp16``: half precision written into the graph as casts and constants of that type."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from optc import Change, Numerics, Pass, PassContext, PassResult, Program, Skip
from optc.rewrite import add_constant, constant_of, dtype, erase_unused, is_dequantize, is_quantize
from optc_passes.fake_values import recompute
from optc_passes.precision_regions import inner, is_quantized_product, split_residuals
from optc_passes.precision_rules import DELICATE, operator_name, role

aten = torch.ops.aten


class _HalfPrecision(Pass):
    """Convolutions, linear layers, matrix products and attention in half precision, and what lies between them.

    The rules are those of ``torch.autocast``, decided once instead of at every call: products cast their operands to
    half, delicate operators (exponentials, logarithms, powers, sums, variances) cast theirs to float32, all others
    compute in what they are given, and in float32 where they are given both. Softmax, layer norm and means follow too:
    their kernels accumulate in float32 whatever they read. Constants never widen what they are combined with: they are
    stored in half where half is what uses them. Casts are made once per value.

    Inputs and outputs keep their type. Quantized layers stay as they are, and so do chains of operators from one to the
    next quantize operator, which kernels take in; what else computes with their outputs does so in half. Constants and
    numbers the type cannot hold keep the operator that uses them in float32. Activations may still overflow in
    float16; verification then stops the run.
    """

    dtype: ClassVar[torch.dtype]

    def run(self, program: Program, context: PassContext) -> PassResult:
        splits = split_residuals(program)
        rewrite = _Rewrite(program, self.name, self.dtype)
        for node in list(program.graph.nodes):
            if node.op == "call_function":
                rewrite.call(node)
            elif node.op == "output":
                rewrite.output(node)
        applied = (*(Change("split", name) for name in splits), *rewrite.applied)
        if applied:
            erase_unused(program.graph.find_nodes(op="get_attr"))
            if context.emulates_half:
                context.note(f"this CPU has no arithmetic for {self.name}: it is emulated, and slower than float32")
        return PassResult(program, bool(applied), applied, tuple(rewrite.skipped))


class Bf16(_HalfPrecision):
    """The program in bfloat16: float32's range with 8 significant bits."""

    name = "bf16"
    summary = "Compute convolutions, matrix products and what lies between them in bfloat16."
    numerics = Numerics(exact=False, min_sqnr_db=20.0)
    dtype = torch.bfloat16


class Fp16(_HalfPrecision):
    """The program in float16: 11 significant bits, up to 65504."""

    name = "fp16"
    summary = "Compute convolutions, matrix products and what lies between them in float16."
    numerics = Numerics(exact=False, min_sqnr_db=30.0)
    dtype = torch.float16


class _Rewrite:
    """Retypes calls in graph order. ``meta["val"]`` is kept right all along, so that types are read off it."""

    def __init__(self, program: Program, rule: str, half: torch.dtype) -> None:
        self.applied: list[Change] = []
        self.skipped: list[Skip] = []
        self._program, self._rule, self._half = program, rule, half
        self._name = str(half).removeprefix("torch.")
        self._free: set[fx.Node] = set(program.graph.find_nodes(op="get_attr"))
        self._retyped: set[fx.Node] = set()
        self._inner = inner(program)
        self._loose: set[fx.Node] = set()
        self._copies: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self._constants: dict[tuple[Any, ...], Tensor] = {}
        self._misfits: dict[fx.Node, tuple[str | None, str | None]] = {}

    def call(self, node: fx.Node) -> None:
        """Decide for one call and rewrite it.

        Values that depend on no input (``_free``) take either type. Those that quantized layers and dequantize
        operators give (``_loose``), and what is computed from them alone, are float32 and may be cast to half.
        """
        operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, tuple, list))]
        retyped = [n for n in operands if n in self._retyped]
        if not node.users:  # nothing but an assertion, on the type its operand had
            if retyped:
                node.graph.erase_node(node)
            return
        if all(n in self._free for n in operands):
            self._free.add(node)
            return
        if node.target is operator.getitem or operator_name(node) == "sym_size":
            if retyped:
                self._retype(node)
            elif self._loose.issuperset(operands):
                self._loose.add(node)
            return
        floats = [n for n in operands if _is_float(n)]
        bound = [n for n in floats if n not in self._free]
        if not self._in_half(node, floats, bound):
            self._cast(node, retyped, torch.float32)
            follows = role(node) == "follows" and self._are_loose(bound)
            if follows or is_dequantize(node) or is_quantized_product(node):
                self._loose.add(node)
        else:
            self._cast(node, floats, self._half)

    def output(self, node: fx.Node) -> None:
        """Give outputs back the type they had."""
        self._substitute(node, [n for n in node.all_input_nodes if n in self._retyped], torch.float32)

    def _in_half(self, node: fx.Node, floats: list[fx.Node], bound: list[fx.Node]) -> bool:
        """Whether the call computes in half; if it could have and does not, ``skipped`` says why."""
        kind = role(node)
        types = {dtype(n) for n in floats}
        if kind == "product":
            if not types or (types == {self._half} and self._retyped.isdisjoint(floats)):
                return False
            reason = self._why_not_product(node, floats, types)
        elif not any(dtype(n) is self._half for n in bound):
            if kind != "follows" or not self._are_loose(bound) or node in self._inner:
                return False
            reason = None
        elif kind == "float32":
            reason = self._why_float32(node)
        else:
            wide = next((dtype(n) for n in bound if dtype(n) is not self._half and n not in self._loose), None)
            reason = f"an operand of it is {_type_name(wide)}" if wide else None
        reason = reason or self._other_result(node) or self._does_not_fit(node, floats)
        if reason:
            self.skipped.append(Skip(self._rule, node.name, reason))
            return False
        if kind == "product":
            self.applied.append(Change(self._rule, node.name))
        return True

    def _are_loose(self, bound: list[fx.Node]) -> bool:
        return bool(bound) and self._loose.issuperset(bound)

    def _why_float32(self, node: fx.Node) -> str:
        if operator_name(node) in DELICATE:
            return f"in {self._name} its result would overflow or lose digits, as torch.autocast has it"
        if is_quantize(node):
            return "quantize operators read float32"
        return f"no rule says that it is safe in {self._name}"

    def _why_not_product(self, node: fx.Node, floats: list[fx.Node], types: set[torch.dtype]) -> str | None:
        dequantized = [n for n in floats if is_dequantize(n)]
        if is_quantized_product(node) or (dequantized and dequantized == floats):
            return "it belongs to a quantized region, which stays as it is"
        other = types - {torch.float32, self._half}
        return f"it computes in {_type_name(other.pop())}, not float32" if other else None

    def _other_result(self, node: fx.Node) -> str | None:
        """That a call gives neither float32 nor half, as with a constant in float64; ``None`` if it does not."""
        types = (of for of in _types(node) if of is not None and of.is_floating_point)
        other = next((of for of in types if of not in (torch.float32, self._half)), None)
        return f"its result is {_type_name(other)}" if other else None

    def _does_not_fit(self, node: fx.Node, floats: list[fx.Node]) -> str | None:
        """Which constant or number of a call the type cannot hold, or ``None`` if it holds all.

        What is only added may be too small for the type: the sum is rounded to it all the same.
        """
        added = (
            floats
            if operator_name(node) in ("add", "sub")
            else [v for name, _, v in _arguments(node) if name == "bias"]
        )
        for operand in floats:
            overflows, vanishes = self._misfit(operand)
            if overflows or (vanishes and operand not in added):
                return overflows or vanishes
        for name, kind, number in _arguments(node):
            # Numbers combined with the operands, or put beside them (pad), are rounded to their type; an eps is not.
            kind = kind.removeprefix("Optional[").removesuffix("]")
            rounded = kind in ("number", "Tensor") or name == "value"
            if rounded and isinstance(number, (int, float)) and not self._holds(number):
                return f"its argument {number:g} is not a number {self._name} can hold"
        return None

    def _holds(self, number: float) -> bool:
        limits = torch.finfo(self._half)
        return number == 0 or not math.isfinite(number) or limits.tiny <= abs(number) <= limits.max

    def _misfit(self, operand: fx.Node) -> tuple[str | None, str | None]:
        """Why a constant must stay in float32: it overflows; or it loses more than rounding should cost."""
        if operand not in self._misfits:
            self._misfits[operand] = (None, None)
            value = constant_of(self._program, operand)
            if value is not None and value.dtype is torch.float32 and value.numel():
                self._misfits[operand] = self._measure(value.detach())
        return self._misfits[operand]

    def _measure(self, value: Tensor) -> tuple[str | None, str | None]:
        finite, half = value.isfinite(), value.to(self._half)
        if bool((finite & ~half.isfinite()).any()):
            most = float(value[finite].abs().max())
            return f"a constant of it reaches {most:.3g}, which {self._name} cannot hold", None
        exact = value.where(finite, 0)
        if bool((exact - half.where(finite, 0)).norm() > torch.finfo(self._half).eps * exact.norm()):
            return None, f"the values of a constant of it are too close to 0 for {self._name}"
        return None, None

    def _cast(self, node: fx.Node, operands: list[fx.Node], to: torch.dtype) -> None:
        if any(dtype(n) is not to for n in operands if _is_float(n)):
            self._substitute(node, operands, to)
        if operands:
            self._retype(node)

    def _substitute(self, node: fx.Node, operands: Iterable[fx.Node], to: torch.dtype) -> None:
        known = {n: self._as(n, to) for n in operands}
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known.get(n, n))

    def _retype(self, node: fx.Node) -> None:
        before = _types(node)
        recompute(node)
        if _types(node) != before:
            self._retyped.add(node)

    def _as(self, node: fx.Node, to: torch.dtype) -> fx.Node:
        """``node``'s value in another type: a constant of its own, or a cast right behind it."""
        if not _is_float(node) or dtype(node) is to:
            return node
        if (node, to) not in self._copies:
            value = constant_of(self._program, node)
            new = self._cast_call(node, to) if value is None else self._constant(node, value, to)
            new.meta.update({key: node.meta[key] for key in ("dims",) if key in node.meta})
            self._copies[node, to] = new
        return self._copies[node, to]

    def _cast_call(self, node: fx.Node, to: torch.dtype) -> fx.Node:
        graph = node.graph
        following = node.next
        while following.op == "placeholder":
            following = following.next
        with graph.inserting_before(following):
            name = f"{node.name}_{_type_name(to)}"
            new = graph.create_node("call_function", aten._to_copy.default, (node,), {"dtype": to}, name=name)
        recompute(new)
        self.applied.append(Change("cast", new.name))
        return new

    def _constant(self, node: fx.Node, value: Tensor, to: torch.dtype) -> fx.Node:
        key = (value.data_ptr(), value.is_neg(), value.shape, value.stride(), to)
        if key not in self._constants:  # tied weights stay tied
            self._constants[key] = value.detach().to(to)
        new = add_constant(self._program, node, str(node.target), self._constants[key])
        new.meta["val"] = node.meta["val"].to(to)
        return new


def _is_float(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.is_floating_point()


def _types(node: fx.Node) -> list[torch.dtype | None]:
    value = node.meta["val"]
    return [getattr(v, "dtype", None) for v in (value if isinstance(value, (tuple, list)) else (value,))]


def _type_name(of: torch.dtype) -> str:
    return str(of).removeprefix("torch.")


def _arguments(node: fx.Node) -> Iterator[tuple[str, str, Any]]:
    """The arguments given to a call, as (name, type, value)."""
    for position, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        value = node.args[position] if position < len(node.args) else node.kwargs.get(parameter.name)
        yield parameter.name, str(parameter.type), value
