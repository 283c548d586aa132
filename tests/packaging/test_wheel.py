"""The built distribution: what is in it, and that it works from where pip puts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import optc

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel built from that sdist, as they would be published."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("optc-*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh virtual environment: the wheel installed, its dependencies from this environment."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    interpreter = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # Read after the venv's own packages; .pth files inside it (such as this checkout's) are not followed.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def test_the_wheel_has_what_is_not_python(wheel: Path) -> None:
    assert "optc/report/page.html.j2" in zipfile.ZipFile(wheel).namelist()


def test_the_top_level_names_are_the_two_packages(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert names == {"optc", "optc_passes", f"optc-{optc.__version__}.dist-info"}


def test_every_source_file_is_in_the_wheel(wheel: Path) -> None:
    sources = {
        path.relative_to(base).as_posix()
        for base, package in ((ROOT, "optc"), (ROOT / "passes", "optc_passes"))
        for path in (base / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == sources
    assert {"optc/py.typed", "optc_passes/py.typed"} <= packed


def test_the_metadata_carries_licence_version_and_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"optc-{optc.__version__}.dist-info"
    metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert metadata["Version"] == optc.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) == {"bench", "cpu", "dev", "gpu"}
    assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    assert "optc = optc.cli.main:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_the_sdist_can_be_tested_and_built_from(built: Path) -> None:
    with tarfile.open(next(built.glob("optc-*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "README.md", "tests/conftest.py"} <= names
    assert not {name for name in names if name.startswith((".venv", ".demo", "dist"))}


def test_the_installed_wheel_runs_and_lists_its_passes(python: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # Plugins installed in place beside this checkout are visible as metadata, but not importable from there.
    environment["OPTC_DISABLE_PLUGINS"] = ",".join(point.name for point in entry_points(group="optc"))

    def output(*command: str | Path) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = output(python, "-c", "import optc, optc_passes; print(optc.__file__); print(optc_passes.__file__)")
    assert all(str(python.parents[1]) in line for line in where.splitlines())
    names = [listed["name"] for listed in json.loads(output(python.with_name("optc"), "passes", "--json"))]
    assert {"fuse", "quant"} <= set(names)
