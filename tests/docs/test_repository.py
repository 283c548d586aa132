"""What holds for the files as such."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import optc

ROOT = Path(__file__).parents[2]


def source_files() -> list[Path]:
    """Every text file of the project, as git sees it or, outside a checkout, as an sdist holds it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    hidden = {".venv", ".git", "dist", "build", "__pycache__"}
    return [path for path in ROOT.rglob("*") if path.is_file() and not hidden & set(path.relative_to(ROOT).parts)]


def texts() -> list[tuple[str, str]]:
    suffixes = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".html", ""}
    return [
        (path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        for path in source_files()
        if path.suffix in suffixes and path.name != "LICENSE"
    ]


def test_no_file_names_a_path_of_one_machine() -> None:
    absolute = re.compile(r"(?<![\w.}~*])/(?:home|root|work|opt|mnt|Users)/\w")
    assert [name for name, text in texts() if absolute.search(text)] == []


def test_no_file_holds_a_conflict_marker() -> None:
    assert [name for name, text in texts() if re.search(r"^(<{7}|>{7}) ", text, re.MULTILINE)] == []


def test_no_source_file_is_longer_than_400_lines() -> None:
    lengths = {name: text.count("\n") for name, text in texts() if name.endswith(".py")}
    assert len(lengths) > 20
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_plugins_passes_and_examples_are_not_packages() -> None:
    assert [folder for folder in ("passes", "plugins", "examples") if (ROOT / folder / "__init__.py").exists()] == []


def test_the_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == optc.__version__


def test_every_pin_satisfies_the_declared_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    versions = {_normalised(name): Version(version) for name, version in pins.items()}
    extras = project["optional-dependencies"]
    tested = project["dependencies"] + extras["cpu"] + extras["dev"] + extras["bench"]
    for requirement in map(Requirement, tested):
        name = _normalised(requirement.name)
        assert name in versions, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(versions[name]), f"{requirement} but {versions[name]} is pinned"


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("script", [".ci/run"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0
