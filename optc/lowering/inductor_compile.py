"""Compiles one program with AOTInductor, in a process of its own: ``python -m optc.lowering.inductor_compile``.

A process of its own, because Inductor logs, keeps state and starts compilers: all of it ends with the process group.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import aot_compile
from torch._inductor import config as inductor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.exc import CppCompileError
from torch.export import Dim, ExportedProgram
from torch.export.pt2_archive._package import package_pt2

from optc.errors import BackendError, first_line
from optc.lowering import inductor_kernels
from optc.lowering.graph_file import read_graph
from optc.lowering.inductor_pack import packed_for
from optc.lowering.prepack import LAYERS
from optc.ops import decompose
from optc.program import Program, complete_meta
from optc.rewrite import add_constant, argument, constant_of, erase_unused, is_call, is_dequantize, replace
from optc.target import Target

PACKAGE, RESULT = "model.pt2", "result.json"
FACTS = "optc.json"
"""Member of the package that says what it was compiled for."""

aten = torch.ops.aten
_WEIGHT_POSITION = {"aten::convolution": 1, "aten::mm": 1, "aten::bmm": 1, "aten::addmm": 2, "aten::baddbmm": 2}
_GCC_SPELLING = {"avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16"}
_LAYER = "optc_layer"
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Compile the graph in the folder ``argv[1]`` for the target ``argv[2]`` (JSON); write what came of it there."""
    folder, target = Path(sys.argv[1]), Target(**json.loads(sys.argv[2]))
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGINT))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # do not outlive an optc that was killed
    try:
        result = compile_package(folder, target)
    except Exception as error:
        import traceback

        traceback.print_exc()
        result = {
            "error": _explain(error),
            "compiler": any(isinstance(each, CppCompileError) for each in _causes(error)),
        }
    (folder / RESULT).write_text(json.dumps(result), encoding="utf-8")


def compile_package(folder: Path, target: Target) -> dict[str, Any]:
    """Compile the graph that ``folder`` holds into ``model.pt2`` beside it.

    Returns:
        ``layers``: how many run in each type; ``kernels``: how many calls of each; ``unquantized``: names of the nodes
        of layers that do not run in int8; ``required_isa``.
    """
    torch.set_num_threads(target.threads)
    torch.set_grad_enabled(False)  # Inductor freezes weights in inference only
    if target.device == "cuda":
        # Inductor's oneDNN patterns do not ask for the device: one of its int8 kernels would replace a max pool.
        torch.backends.mkldnn.set_flags(_enabled=False)
    # 0 and 1 would be taken for constants of a dynamic batch.
    program = read_graph(folder, max(2, target.batch), target.device)
    plain = _int8_form(decompose(program), target.device == "cpu")
    exported = _export(plain)
    module = exported.module(check_guards=False)
    layers = [node.name for node in program.graph.nodes if node.target in LAYERS]
    _name_layers(module, layers)
    seen = _Layers()
    args, kwargs = exported.example_inputs or ((), {})
    inductor.post_grad_custom_pre_pass = seen  # not an option of aot_compile, which takes a copy of those
    with inductor_kernels.provenance() as mapping, packed_for(target.batch):
        files = aot_compile(module, args, kwargs, options=_options(folder, target))
    facts = {
        "torch": torch.__version__,
        "device": target.device,
        "architecture": platform.machine(),
        "compiler": _compiler(target),
        "capability": torch.cuda.get_device_capability() if target.device == "cuda" else None,
        "inputs": json.loads((folder / "graph.json").read_text(encoding="utf-8"))["inputs"],
        "layers": seen.types,
        "kernels": inductor_kernels.kernels(mapping, plain.graph, module.graph, layers),
    }
    package_pt2(folder / PACKAGE, aoti_files=files, extra_files={FACTS: json.dumps(facts)})  # type: ignore[arg-type]
    return {
        "layers": seen.types,
        "kernels": seen.kernels,
        "unquantized": seen.unquantized,
        "required_isa": _required_isa(),
    }


def _options(folder: Path, target: Target) -> dict[str, Any]:
    options: dict[str, Any] = {
        "freezing": True,  # weights become constants, laid out for oneDNN where it computes
        "aot_inductor.package": True,
        "aot_inductor.output_path": str(folder / "code"),  # not the cache, where every model's weights would stay
        # Its key is computed with openssl, and Inductor fails where there is none.
        "aot_inductor.precompile_headers": shutil.which("openssl") is not None,
    }
    if target.device == "cpu":
        # Threads as at run time, not as now. Nothing is left to a pool of processes: C++ is compiled by this one.
        options |= {"cpp.dynamic_threads": True, "compile_threads": 1, **inductor_kernels.OPTIONS}
    if platform.machine() == "x86_64":
        # Not the default -march=native: then code needs what Inductor's own -mavx… flags say, and not all this CPU has.
        inductor.cpp.march = ""
    return options


def _int8_form(program: Program, int8_kernels: bool) -> Program:
    """Evaluate, in place, each dequantization of constants that is not what Inductor's int8 patterns ask for.

    Those are in ``torch/_inductor/fx_passes/quantization.py``: the activation dequantized per tensor, the weight per
    channel, the bias in float. An int32 bias times its scale is such a bias; any other constant is a float weight.
    """
    constants: list[fx.Node] = []
    for node in list(program.graph.nodes):
        operands = {operand: constant_of(program, operand) for operand in node.all_input_nodes}
        if not is_dequantize(node) or any(value is None for value in operands.values()):
            continue
        if int8_kernels and all(_takes_int8(user, node) for user in node.users):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), operands.__getitem__)
        replace(node, add_constant(program, node, f"{node.name}_value", node.target(*args, **kwargs)))
        constants.extend(operands)
    erase_unused(constants)
    complete_meta(program)
    program.module.recompile()
    return program


def _takes_int8(layer: fx.Node, weight: fx.Node) -> bool:
    return (
        is_call(layer, aten.conv2d.default, aten.linear.default)
        and argument(layer, "weight") is weight
        and is_dequantize(argument(layer, "input"))
    )


def _export(program: Program) -> ExportedProgram:
    batch = Dim("batch", min=1)
    shapes = tuple({0: batch} for _ in program.example_inputs) if program.dynamic_batch else None
    try:
        return torch.export.export(program.module, program.example_inputs, dynamic_shapes=shapes)
    except Exception as error:
        raise BackendError(f"the optimized graph cannot be exported: {first_line(error)}") from error


def _name_layers(module: fx.GraphModule, names: list[str]) -> None:
    """Write the names of the program's layers where Inductor hands them on; export keeps the layers' order."""
    nodes = [node for node in module.graph.nodes if is_call(node, aten.conv2d.default, aten.linear.default)]
    if len(nodes) == len(names):
        for node, name in zip(nodes, names, strict=True):
            node.meta["custom"] = {_LAYER: name}


class _Layers(CustomGraphPass):
    """Looks at Inductor's graph when weights are packed and int8 layers are their oneDNN operators; computes the same.

    Attributes:
        types: how many layers compute in each type.
        kernels: how often each operator is called.
        unquantized: names of the layers that do not compute in int8.
    """

    def __init__(self) -> None:
        self.types: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.unquantized: list[str] = []

    def __call__(self, graph: fx.Graph) -> None:
        varying: set[fx.Node] = set()
        for node in graph.nodes:
            node.meta.pop("stack_trace", None)  # it would be written into the code, with paths of this machine
            if node.op == "placeholder" or not varying.isdisjoint(node.all_input_nodes):
                varying.add(node)
            operator = getattr(getattr(node.target, "_schema", None), "name", "")
            library, _, name = operator.partition("::")
            if library == "onednn" and name.startswith(("qconv", "qlinear")):
                self.types["int8"] += 1
            elif name.startswith(("_convolution_pointwise", "_linear_pointwise", "_mkl_linear")) or (
                operator in _WEIGHT_POSITION and node.args[_WEIGHT_POSITION[operator]] not in varying
            ):
                self.types[str(node.meta["val"].dtype).removeprefix("torch.")] += 1
                self.unquantized.append(node.meta.get("custom", {}).get(_LAYER, node.name))
            else:
                continue
            self.kernels[operator] += 1

    def uuid(self) -> None:
        """No key: a graph looked at is not to be taken from a cache."""


def _compiler(target: Target) -> str:
    if target.device == "cuda":
        return f"triton {importlib.import_module('triton').__version__}"
    path = get_cpp_compiler()
    version = subprocess.run([path, "-dumpversion"], capture_output=True, text=True, check=False).stdout.strip()
    return f"{Path(path).name} {version}".strip()


def _required_isa() -> tuple[str, ...]:
    """What the code needs of an x86 CPU, as Linux spells it: the flags it was compiled with."""
    if platform.machine() != "x86_64":
        return ()
    flags = [flag.removeprefix("-m").replace("-", "_") for flag in pick_vec_isa().build_arch_flags().split()]
    return tuple(dict.fromkeys(_GCC_SPELLING.get(flag, flag) for flag in flags))


def _explain(error: BaseException) -> str:
    """One line; of a failed C++ compilation the first error in what the compiler said."""
    for cause in _causes(error):
        if isinstance(cause, CppCompileError):
            said = [line.strip() for line in cause.output.splitlines() if line.strip()]
            reason = next((line for line in said if "error" in line), said[-1] if said else "it said nothing")
            return f"the C++ compiler {cause.cmd[0]} failed: {reason}"
    if isinstance(error, BackendError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what led to it."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


if __name__ == "__main__":
    main()
