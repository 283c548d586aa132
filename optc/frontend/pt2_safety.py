"""What loading a ``.pt2`` file would execute, found out without executing it.

``torch.export.load`` unpickles some members of the archive (``pickle.loads``, ``torch.load(weights_only=False)``),
loads shared libraries (AOTInductor packages), resolves operators by attribute look-up from ``torch`` and evaluates
shape expressions as Python (``sympy.sympify``). Ordinary files need none of the dangerous kinds, so files that have
them are refused.

PyTorch's reader of archives is not Python's, and a file can be made to look different to the two. So what is checked
here, and loaded then, is a copy that Python wrote.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

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
_TREES = frozenset(("in_spec", "out_spec"))
_NO_NAMES = frozenset(
    (
        *("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom", "from_node"),
        *("torch_version", "as_string", "as_strings", "guards_code"),
    )
)
"""Keys of texts that are no names: metadata of nodes, versions, strings that PyTorch quotes, and checks of inputs,
which are Python and run only in a module that is made with them: optc asks for one without. A file may call values so,
too; what it has at such a key is not text alone."""
_IMPORTS = frozenset(("__enum__", "default_factory_module"))
"""Keys in a tree of inputs at which PyTorch imports a module that the file names."""
_MODEL = re.compile(r"models/[^/]+\.json")
_MEMBER = re.compile(
    rf"{_MODEL.pattern}|data/(weights|constants|sample_inputs)/.+|extra/.+"
    r"|archive_format|archive_version|byteorder|\.\w+|\.data/\w+",
    re.DOTALL,
)
_MALFORMED = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
"""What reading it raises where it is no such file; of ``RuntimeError`` are encrypted members, ways to compress that
Python does not know, and JSON that is nested too deep."""
_ATTRIBUTE = re.compile(r"\.\s*[A-Za-z_]|__")


@contextmanager
def checked_copy(path: Path) -> Iterator[IO[bytes]]:
    """A copy of a ``.pt2`` file, in no folder, that ``torch.export.load`` may see.

    Raises:
        OptcError: it is no such file, cannot be copied, or loading it could run code; says which part.
    """
    with tempfile.TemporaryFile() as copy:
        try:
            reason = _copied(path, copy) or _content_objection(copy)
        except (FileNotFoundError, IsADirectoryError) as error:
            what = "does not exist" if isinstance(error, FileNotFoundError) else "is a folder"
            raise OptcError(f"model file '{path}' {what}", "give a file that torch.export.save wrote") from None
        except OSError as error:
            raise OptcError(
                f"'{path}' cannot be copied to {tempfile.gettempdir()}: {error.strerror or error}",
                "check its permissions, or set TMPDIR to a folder with room",
            ) from error
        except _MALFORMED as error:
            raise OptcError(
                f"'{path}' is not a readable .pt2 file: {error}", "write it with torch.export.save"
            ) from error
        if reason:
            raise OptcError(
                f"'{path}' {reason}, and loading that could run code",
                "export it again with this PyTorch's torch.export.save, or name its factory as package.module:factory",
            )
        copy.seek(0)
        yield copy


def _copied(path: Path, copy: IO[bytes]) -> str | None:
    """Write the members once more, or say what is wrong with their names."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as written:
        names = archive.namelist()
        if reason := next(_name_objections(names), None):
            return reason
        for name in names:
            with archive.open(name) as source, written.open(name, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 1 << 20)
    return None


def _name_objections(names: list[str]) -> Iterator[str]:
    if len({name.casefold() for name in names}) != len(names):
        yield "has two members of one name"
    if len({name.partition("/")[0] for name in names}) != 1:  # PyTorch would read another than is looked at here
        yield "has members outside its folder"
    members = [name.partition("/")[2] for name in names]
    if not any(map(_MODEL.fullmatch, members)):
        raise ValueError("it holds no exported program")
    for member in members:
        if member.startswith("data/aotinductor/"):
            yield "holds compiled machine code"
        elif member.startswith(("data/weights/", "data/constants/")) and member.endswith(".pt"):
            yield "holds pickled weights (an old format)"
        elif not _MEMBER.fullmatch(member):
            yield f"holds {member!r}, which is not looked into"


def _content_objection(file: IO[bytes]) -> str | None:
    with zipfile.ZipFile(file) as archive:
        return next(_content_objections(archive), None)


def _content_objections(archive: zipfile.ZipFile) -> Iterator[str]:
    for name in archive.namelist():
        member = name.partition("/")[2]
        if member.startswith(("data/weights/", "data/constants/")) and member.endswith("_config.json"):
            yield from _payload_objections(json.loads(archive.read(name)))
        elif member.startswith("data/sample_inputs/"):
            with archive.open(name) as file:
                try:
                    torch.load(file, weights_only=True, map_location="cpu")
                except Exception:
                    yield "holds pickled example inputs that are not tensors"
        elif _MODEL.fullmatch(member):
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
            elif key in _TREES and isinstance(item, str):
                if _imports(item):
                    yield f"names a module in its {key}"
            elif key not in _NO_NAMES or not _is_text(item):
                yield from _graph_objections(key)
                yield from _graph_objections(item)


def _is_text(value: Any) -> bool:
    return all(isinstance(part, str) for part in (value if isinstance(value, list) else [value]))


def _imports(value: Any) -> bool:
    """Whether a tree of inputs, in which JSON is quoted as strings of JSON, makes PyTorch import a module."""
    if isinstance(value, str):
        try:
            return _imports(json.loads(value))
        except ValueError:
            return False
    if isinstance(value, dict):
        return not _IMPORTS.isdisjoint(value) or any(map(_imports, value.values()))
    return isinstance(value, list) and any(map(_imports, value))


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
