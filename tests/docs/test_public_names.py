"""The public interface: every name importable, documented, and known to type checkers."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import optc
import optc.ops
import optc.rewrite

NAMES = [name for name in optc.__all__ if name != "__version__"]


def functions_of(cls: type) -> dict[str, object]:
    """Public functions and properties a class defines itself."""
    kinds = (staticmethod, classmethod, property)
    return {
        name: member
        for name, member in vars(cls).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, kinds))
        if getattr(member, "__name__", name) == name  # not the default of a field that holds a callable
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_importable_and_documented(name: str) -> None:
    value = getattr(optc, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return  # an instance, such as hookimpl, is documented where it is described
    assert value.__module__.startswith("optc.")
    assert inspect.cleandoc(value.__doc__ or "").strip()
    if inspect.isclass(value):
        undocumented = [member for member in functions_of(value) if not inspect.getdoc(getattr(value, member))]
        assert not undocumented


@pytest.mark.parametrize("module", [optc.ops, optc.rewrite], ids=lambda module: module.__name__)
def test_what_passes_may_use_besides_is_documented(module: ModuleType) -> None:
    public = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__.startswith(module.__name__)
    }
    assert public
    assert [name for name, value in public.items() if not value.__doc__] == []


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(optc.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    imported = {
        alias.asname: node.module
        for node in ast.walk(guarded)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == optc._HOME


def test_a_name_that_does_not_exist_says_so() -> None:
    with pytest.raises(AttributeError, match="module 'optc' has no attribute 'optimise'"):
        _ = optc.optimise  # type: ignore[attr-defined]
    assert not hasattr(optc, "no_such_name")
