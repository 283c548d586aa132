"""Every call of the tensorrt backend into NVIDIA's packages, held against the packages' own wheels.

TensorRT's library is not on PyPI, so the packages cannot be imported without a GPU machine. Their wheels are there, and
what optc calls is read from optc's own source: a renamed function, option or method fails here.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SOURCES = sorted((Path(__file__).parents[3] / "optc" / "lowering").glob("*tensorrt*.py"))
OFFLINE = re.compile(
    r"connection broken|Failed to establish|timed out|Temporary failure|No matching index", re.IGNORECASE
)


def download(requirement: str, folder: Path) -> Path:
    """The unpacked wheel of a package, without what it requires."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "1"]
    done = subprocess.run(
        [*pip, "--dest", str(folder), requirement],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode and OFFLINE.search(done.stdout + done.stderr):
        pytest.skip("the package registry does not answer")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def torch_tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    major, minor = torch.__version__.split(".")[:2]
    return download(f"torch-tensorrt=={major}.{minor}.*", tmp_path_factory.mktemp("torch-tensorrt"))


@pytest.fixture(scope="session")
def bindings(torch_tensorrt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TensorRT's Python side, of the version Torch-TensorRT asks for."""
    (metadata,) = torch_tensorrt.glob("*.dist-info/METADATA")
    wanted = re.search(r"^Requires-Dist: (tensorrt-cu\d+-bindings[^;\n]*)$", metadata.read_text(), re.MULTILINE)
    assert wanted, "Torch-TensorRT no longer says which bindings it needs"
    return download(wanted[1].strip(), tmp_path_factory.mktemp("tensorrt"))


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, those under ``if`` and ``try`` included."""
    for statement in body:
        yield statement
        for branch in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(statement, (ast.If, ast.Try)):
                for inner in getattr(statement, branch, []):
                    yield from statements(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def resolve(root: Path, dotted: str) -> ast.AST | None:
    """What a dotted name stands for in a wheel: a function, class or assignment; an ``ast.Module`` for a module."""
    module, *names = dotted.split(".")
    while names and ((root / module / names[0]).is_dir() or (root / module / f"{names[0]}.py").is_file()):
        module = f"{module}/{names.pop(0)}"
    file = root / module / "__init__.py"
    package = file.is_file()
    file = file if package else root / f"{module}.py"
    if not file.is_file():
        return None
    tree = ast.parse(file.read_text())
    if not names:
        return tree
    for statement in statements(tree.body):
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)) and statement.name == names[0]:
            return statement
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(isinstance(target, ast.Name) and target.id == names[0] for target in targets):
                return statement
        if isinstance(statement, ast.ImportFrom):
            parents = module.split("/")
            base = parents[: len(parents) - statement.level + package] if statement.level else []
            source = ".".join([*base, *([statement.module] if statement.module else [])])
            for alias in statement.names:
                if (alias.asname or alias.name) == names[0]:
                    return resolve(root, f"{source}.{alias.name}")
    return None


def imported(tree: ast.Module, package: str) -> dict[str, str]:
    """Local name to dotted name of what a file imports from a package."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: alias.name for alias in node.names if alias.name == package}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted_name(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted_name(node.value)):
        return f"{base}.{node.attr}"
    return None


def constants(trees: list[ast.Module]) -> dict[str, list[str]]:
    """Keys of the dictionaries that optc's modules define as constants, for ``**SETTINGS``."""
    found = {}
    for tree in trees:
        for node in tree.body:
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.value, ast.Dict)
                and isinstance(node.target, ast.Name)
            ):
                found[node.target.id] = [ast.literal_eval(key) for key in node.value.keys if key is not None]
    return found


def uses(package: str) -> tuple[set[str], list[tuple[str, ast.Call, list[str]]]]:
    """What optc's source names of a package, and its calls there: dotted name, call, keywords."""
    trees = [ast.parse(path.read_text()) for path in SOURCES]
    known = constants(trees)
    names: set[str] = set()
    calls = []
    for tree in trees:
        local = imported(tree, package)
        names |= set(local.values())
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not (name := dotted_name(node.func)):
                continue
            first, _, rest = name.partition(".")
            if first in local:
                keywords = []
                for keyword in node.keywords:
                    keywords += [keyword.arg] if keyword.arg else known[keyword.value.id]  # type: ignore[attr-defined]
                calls.append((f"{local[first]}.{rest}".rstrip("."), node, keywords))
    return names, calls


def refusal(definition: ast.AST | None, call: ast.Call, keywords: list[str]) -> str:
    """Why a call does not fit a definition; empty if it does."""
    if isinstance(definition, ast.ClassDef):
        inits = [item for item in definition.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        if not inits:
            return "it has no __init__"
        if not inits[0].args.kwonlyargs and inits[0].args.kwarg:  # takes what its body asks of **kwargs for
            said = {node.value for node in ast.walk(inits[0]) if isinstance(node, ast.Constant)}
            return " ".join(f"no {keyword}" for keyword in keywords if keyword not in said)
        definition, skip = inits[0], 1
    elif isinstance(definition, ast.FunctionDef):
        skip = 0
    else:
        return "it is no function or class there"
    arguments = definition.args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)][skip:]
    known = {*positional, *(argument.arg for argument in arguments.kwonlyargs)}
    problems = [f"no {keyword}" for keyword in keywords if keyword not in known]
    if len(call.args) > len(positional):
        problems.append("too many positional arguments")
    given = {*positional[: len(call.args)], *keywords}
    required = positional[: len(positional) - len(arguments.defaults)]
    problems += [f"{name} is required" for name in required if name not in given]
    required_keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    problems += [f"{a.arg} is required" for a, default in required_keywords if default is None and a.arg not in given]
    return ", ".join(problems)


def test_every_name_taken_from_torch_tensorrt_is_there(torch_tensorrt: Path) -> None:
    names, _ = uses("torch_tensorrt")
    assert "torch_tensorrt.dynamo" in names
    assert [name for name in names if resolve(torch_tensorrt, name) is None] == []


def test_every_call_fits_its_definition_in_torch_tensorrt(torch_tensorrt: Path) -> None:
    _, calls = uses("torch_tensorrt")
    assert {name.rpartition(".")[2] for name, _, _ in calls} == {
        "compile", "convert_exported_program_to_serialized_trt_engine", "Input"
    }  # fmt: skip
    assert {
        name: why for name, call, words in calls if (why := refusal(resolve(torch_tensorrt, name), call, words))
    } == {}


def test_a_call_that_does_not_fit_is_found(torch_tensorrt: Path) -> None:
    call = ast.parse("compile(exported, inputs=x, enabled_precisions=y)", mode="eval").body
    assert isinstance(call, ast.Call)
    compile_ = resolve(torch_tensorrt, "torch_tensorrt.dynamo.compile")
    assert refusal(compile_, call, ["inputs", "enabled_precisions"]) == "no enabled_precisions"
    assert refusal(compile_, ast.Call(call.func, [], []), []) == "exported_program is required"
    assert refusal(resolve(torch_tensorrt, "torch_tensorrt.Input"), call, ["minimum_shape"]) == "no minimum_shape"
    assert resolve(torch_tensorrt, "torch_tensorrt.dynamo.compile_it") is None


def test_networks_are_always_strongly_typed(torch_tensorrt: Path) -> None:
    interpreter = (torch_tensorrt / "torch_tensorrt/dynamo/conversion/_TRTInterpreter.py").read_text()
    assert "NetworkDefinitionCreationFlag.STRONGLY_TYPED" in interpreter
    for name in ("compile", "convert_exported_program_to_serialized_trt_engine"):
        definition = resolve(torch_tensorrt, f"torch_tensorrt.dynamo.{name}")
        assert isinstance(definition, ast.FunctionDef)
        options = {argument.arg for argument in definition.args.kwonlyargs}
        assert not options & {"enabled_precisions", "use_explicit_typing"}


def test_submodules_of_a_partitioned_model_are_named_as_the_report_expects(torch_tensorrt: Path) -> None:
    partitioning = torch_tensorrt / "torch_tensorrt/dynamo"
    assert '"_run_on_acc" in node.name' in (partitioning / "_compiler.py").read_text().replace("not in", "in")
    partitioner = (partitioning / "partitioning/_adjacency_partitioner.py").read_text()
    assert '"_run_on_gpu_"' in partitioner


def test_the_converter_of_quantize_op_takes_what_is_written(torch_tensorrt: Path) -> None:
    """Its scale is amax / 127, per channel on axis 0, in int8 where exponent_bits is 0."""
    converters = (torch_tensorrt / "torch_tensorrt/dynamo/conversion/aten_ops_converters.py").read_text()
    assert "torch.ops.tensorrt.quantize_op.default, supports_dynamic_shapes=True" in converters
    definition = resolve(torch_tensorrt, "torch_tensorrt.dynamo.conversion.impl.quantize.quantize")
    assert isinstance(definition, ast.FunctionDef)
    assert [argument.arg for argument in definition.args.args][-4:] == [
        "input_tensor", "amax", "num_bits", "exponent_bits"
    ]  # fmt: skip
    text = ast.unparse(definition)
    assert "max_bound = 127" in text
    assert "axis == 0" in text
    assert "scale = torch.divide(amax, max_bound)" in text


def comes_from(node: ast.AST, roots: set[str]) -> bool:
    """Whether an expression is one of the names, an attribute of one, or what a call of such gives."""
    if isinstance(node, ast.Call):
        return comes_from(node.func, roots)
    return dotted_name(node) in roots or (isinstance(node, ast.Attribute) and comes_from(node.value, roots))


def assignments(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Each name or attribute that is assigned, with its value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    yield from zip(target.elts, node.value.elts, strict=True)
                else:
                    yield target, node.value


def tensorrt_names() -> set[str]:
    """Attributes that optc's source takes of TensorRT's module and of objects that come from it."""
    found: set[str] = set()
    for tree in (ast.parse(path.read_text()) for path in SOURCES):
        roots = set(imported(tree, "tensorrt"))
        before = 0
        while roots and len(roots) > before:
            before = len(roots)
            roots |= {str(dotted_name(target)) for target, value in assignments(tree) if comes_from(value, roots)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and comes_from(node.value, roots) and dotted_name(node) not in roots:
                found.add(node.attr)
    return found


def test_every_name_taken_from_tensorrt_is_in_its_bindings(bindings: Path) -> None:
    names = tensorrt_names()
    assert {"deserialize_cuda_engine", "create_execution_context", "set_tensor_address", "execute_async_v3"} <= names
    library = (bindings / "tensorrt_bindings/tensorrt.so").read_bytes()
    python = (bindings / "tensorrt_bindings/__init__.py").read_text()
    # Up to the end of a string only: linkers store a name that ends another in that one.
    missing = [name for name in names if name.encode() + b"\0" not in library and f"\n{name} =" not in python]
    assert missing == []
    assert b"execute_async_v4\0" not in library
