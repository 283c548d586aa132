"""plugins/optc-hello, installed for real into a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HELLO = Path(__file__).parents[2] / "plugins" / "optc-hello"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder pip installed optc-hello into."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", str(folder), str(HELLO)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def optc(*arguments: str, site: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command with ``site`` first on the path."""
    environment = os.environ | {"PYTHONPATH": str(site)} | variables
    command = [sys.executable, "-m", "optc.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_command_lists_its_pass_and_names_the_plugin(site: Path) -> None:
    done = optc("passes", "--json", site=site)
    assert done.returncode == 0, done.stderr
    listed = {item["name"]: item["plugin"] for item in json.loads(done.stdout)}
    assert listed["relu-once"] == "hello"


def test_the_command_describes_its_pass_from_where_it_was_installed(site: Path) -> None:
    done = optc("passes", "relu-once", site=site)
    assert done.returncode == 0, done.stderr
    assert "Exact: ReLU is idempotent" in done.stdout
    code = "import optc_hello.relu_once as m; print(m.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(site)}
    )
    assert where.stdout.startswith(str(site))


def test_it_can_be_switched_off(site: Path) -> None:
    done = optc("passes", "--json", site=site, OPTC_DISABLE_PLUGINS="hello")
    assert done.returncode == 0, done.stderr
    assert "relu-once" not in done.stdout


def test_a_broken_installed_plugin_gives_one_line_and_exit_code_2(site: Path, tmp_path: Path) -> None:
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[optc]\nacme = acme_optc\n")
    (tmp_path / "acme_optc.py").write_text("import no_such_module_anywhere\n")
    done = optc("passes", site=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "plugin 'acme' (from acme) could not be loaded" in done.stderr
    assert "OPTC_DISABLE_PLUGINS=acme" in done.stderr
