"""The documents and the code say the same."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import pytest
import torch

import optc
from optc.cli.main import cli
from optc.plugins import hookspecs
from optc.plugins.registry import KINDS, registry

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "passes/*.md", "plugins/*/*.md", "examples/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path: Path, *languages: str) -> list[str]:
    """The fenced code blocks of a document in one of the languages (``""`` for none named)."""
    return [code for language, code in FENCE.findall(path.read_text(encoding="utf-8")) if language in languages]


def commands(program: str) -> list[tuple[str, list[str]]]:
    """Each (document, arguments) of a shell line in any document that runs ``program``."""
    found = []
    for path in DOCUMENTS:
        for block in blocks(path, "", "sh", "console"):
            for line in block.splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True) if line.count("'") % 2 == 0 else []
                if words and words[0] == program:
                    found.append((path.relative_to(ROOT).as_posix(), words[1:]))
    return found


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["cli.md", "passes.md"])
def test_a_generated_page_is_up_to_date(page: str) -> None:
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == generator().PAGES[page](), "run 'make docs'"


@pytest.mark.parametrize("hook", KINDS.values())
def test_every_hook_is_documented(hook: str) -> None:
    docstring = getattr(hookspecs, hook).__doc__
    assert "Called when" in docstring
    for name in re.findall(r":class:`optc\.(\w+)`", docstring):
        assert name in optc.__all__
    guides = (ROOT / "docs" / "writing-passes.md").read_text() + (ROOT / "docs" / "writing-backends.md").read_text()
    assert f"`{hook}`" in guides


def test_every_hook_is_looked_up_by_the_registry() -> None:
    assert {name for name in vars(hookspecs) if name.startswith("optc_")} == set(KINDS.values())


def test_every_built_in_pass_is_tested_by_name() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "passes").glob("test_*.py"))
    built_in = [item.entry for item in registry().all("pass").values() if item.plugin == "optc_passes"]
    assert built_in
    untested = [
        entry.name
        for entry in built_in
        if not re.search(rf"""["']{entry.name}["']|\b{entry.target.partition(":")[2]}\b""", tests)
    ]
    assert not untested


def test_every_make_target_in_the_documents_exists() -> None:
    used = {(path, word) for path, words in commands("make") for word in words if "=" not in word and word != "..."}
    assert used
    assert {word for _, word in used} <= make_targets(), sorted(used)


def test_the_targets_everyone_expects_exist() -> None:
    assert {"demo", "test", "lint", "bench", "docs", "clean", "venv"} <= make_targets()


def test_every_optc_command_in_the_documents_parses() -> None:
    lines = commands("optc")
    assert len(lines) > 5
    for path, words in lines:
        command = cli.get_command(click.Context(cli), words[0]) if words and not words[0].startswith("-") else None
        if command is None:
            continue
        try:
            command.make_context(words[0], words[1:], parent=click.Context(cli, info_name="optc"))
        except click.exceptions.Exit:
            pass  # --help
        except click.UsageError as error:
            pytest.fail(f"{path}: optc {shlex.join(words)}: {error.format_message()}")


def test_every_public_name_python_examples_use_exists() -> None:
    used = {
        name
        for path in DOCUMENTS
        for code in blocks(path, "python")
        for name in re.findall(r"\boptc\.(\w+)", code)
        if importlib.util.find_spec(f"optc.{name}") is None
    }
    assert used
    assert used <= set(optc.__all__)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_code_of_the_guides_runs(tmp_path: Path) -> None:
    tests = 0
    for guide in ("writing-passes", "writing-backends", "tensorrt"):
        code = "\n\n".join(blocks(ROOT / "docs" / f"{guide}.md", "python"))
        (tmp_path / f"test_{guide.replace('-', '_')}.py").write_text(code, encoding="utf-8")
        tests += code.count("def test_")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        str(ROOT / "pyproject.toml"),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert f"{tests} passed" in done.stdout


@pytest.mark.usefixtures("uncompiled", "briefly")
def test_the_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["optimized"](torch.zeros(4, 3, 224, 224)).shape == (4, 10)
    runner = optc.load("my-model-fused")
    (output,) = runner(np.zeros((2, 3, 224, 224), np.float32))
    runner.close()
    assert output.shape == (2, 10)


def test_readme_has_the_numbers_of_the_committed_results() -> None:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert module.filled(text) == text, "run: python benchmarks/readme.py"
    assert text.count("`python benchmarks/") == len(list((ROOT / "benchmarks" / "results").glob("*.json"))) > 0
