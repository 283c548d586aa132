"""What loading a ``.pt2`` file would execute, found out without executing it.

``torch.export.load`` unpickles some members of the archive (``pickle.loads``, ``torch.load(weights_only=False)``),
loads shared libraries (AOTInductor packages), resolves operators by attribute look-up from ``torch`` and evaluates
shape expressions as Python (``sympy.sympify``). Ordinary files need none of the dangerous kinds, so files that have
them are refused.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from optc.errors import OptcError

_SCALAR_FUNCTIONS = re.compile(
    r"_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|torch\.sym_\w+|math\.(ceil|floor|trunc|sqrt|pow)|torch\._sym_sqrt"
)
_OPERATOR = re.compile(r"torch\.ops\.\w+\.\w+(\.\w+)?")
_TOUCHES_FILES = re.compile(r"torch\.ops\.aten\.from_file\b.*")
_CALL = re.compile(r"(\w+)\s*\(")
_PURE_CALLS = frozenset(
    {
        *(
            "Max",
            "Min",
            "Abs",
            "Mod",
            "PythonMod",
            "FloorDiv",
            "CeilDiv",
            "CleanDiv",
            "ModularIndexing",
            "PowByNatural",
        ),
        *("Where", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "floor", "ceiling", "FloatPow"),
        *("FloorToInt", "CeilToInt", "TruncToInt", "ToFloat", "IntTrueDiv", "FloatTrueDiv"),
    }
)
_EXPRESSION = re.compile(r"[\w\s()*/+\-,<>=!&|~%.]*")
_SYMBOL = re.compile(r"Symbol\('\w+'(, \w+=(True|False))*\)")
_NAME = re.compile(r"[\w.-]*")
_NO_NAMES = frozenset(("metadata", "in_spec", "out_spec", "torch_version", "as_string", "as_strings", "guards_code"))
"""Keys of what is no name: tracebacks, trees of inputs as JSON, versions, strings that PyTorch quotes, and checks of
inputs, which are Python and run only in a module that is made with them: optc asks for one without."""
_ATTRIBUTE = re.compile(r"\.\s*[A-Za-z_]|__")


def refuse_unsafe(path: Path) -> None:
    """Check a ``.pt2`` file before ``torch.export.load`` sees it.

    Raises:
        OptcError: it is no such file, or loading it could run code; says which part.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            reason = next(_objections(archive), None)
    except FileNotFoundError:
        raise OptcError(f"model file '{path}' does not exist") from None
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptcError(f"'{path}' is not a readable .pt2 file: {error}", "write it with torch.export.save") from error
    if reason:
        raise OptcError(
            f"'{path}' {reason}, and loading that could run code",
            "export it again with this PyTorch's torch.export.save, or name its factory as package.module:factory",
        )


def _objections(archive: zipfile.ZipFile) -> Iterator[str]:
    names = archive.namelist()
    if len({name.casefold() for name in names}) != len(names):
        yield "has two members of one name"
    if len({name.partition("/")[0] for name in names}) != 1:  # PyTorch would read another than is looked at here
        yield "has members outside its folder"
    members = {name.partition("/")[2]: name for name in names}
    models = [member for member in members if re.fullmatch(r"models/[^/]+\.json", member)]
    if not models:
        raise ValueError("it holds no exported program")
    for member, name in members.items():
        if member.startswith("data/aotinductor/"):
            yield "holds compiled machine code"
        elif member.startswith(("data/weights/", "data/constants/")):
            if member.endswith("_config.json"):
                yield from _payload_objections(json.loads(archive.read(name)))
            elif member.endswith(".pt"):
                yield "holds pickled weights (an old format)"
        elif member.startswith("data/sample_inputs/"):
            with archive.open(name) as file:
                try:
                    torch.load(file, weights_only=True, map_location="cpu")
                except Exception:
                    yield "holds pickled example inputs that are not tensors"
        elif member in models:
            yield from _graph_objections(json.loads(archive.read(name)))


def _payload_objections(config: Any) -> Iterator[str]:
    for payload in config["config"].values():
        if payload["use_pickle"] or not str(payload["path_name"]).startswith(("weight_", "tensor_")):
            yield "holds pickled objects"


def _graph_objections(value: Any) -> Iterator[str]:
    """Walk a serialized graph: operators, expressions and names wherever they occur.

    PyTorch pastes names of many kinds into the source of ``forward``, so any text is held to be one that is not known
    to be something else.
    """
    if isinstance(value, str) and not _NAME.fullmatch(value):
        yield f"names a value {value!r}"
    elif isinstance(value, list):
        for item in value:
            yield from _graph_objections(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key == "target" and isinstance(item, str):
                if not _is_known_operator(item):
                    yield f"calls {item!r}"
            elif key == "expr_str":
                if not _is_arithmetic(str(item)):
                    yield f"has the shape expression {item!r}"
            elif key == "range_constraints":
                if not all(map(_is_arithmetic, item)):
                    yield f"has the shape expressions {list(item)!r}"
                yield from _graph_objections(list(item.values()))
            elif key not in _NO_NAMES:
                yield from _graph_objections(key)
                yield from _graph_objections(item)


def _is_known_operator(target: str) -> bool:
    if _SCALAR_FUNCTIONS.fullmatch(target):
        return True
    if not _OPERATOR.fullmatch(target) or _TOUCHES_FILES.fullmatch(target):
        return False
    operator: Any = torch
    for name in target.split(".")[1:]:
        operator = getattr(operator, name, None)
    return isinstance(operator, (torch._ops.OpOverload, torch._ops.HigherOrderOperator))


def _is_arithmetic(expression: str) -> bool:
    expression = _SYMBOL.sub("s", expression)
    return (
        _EXPRESSION.fullmatch(expression) is not None
        and _ATTRIBUTE.search(expression) is None
        and _PURE_CALLS.issuperset(_CALL.findall(expression))
    )
