"""``optc doctor`` tells of what is broken instead of breaking itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from optc.plugins.registry import registry

Command = Callable[..., Any]


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed plugin that cannot be imported."""
    (tmp_path / "acme.py").write_text("import no_such_module_anywhere\n")
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[optc]\nacme = acme\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "400")
    registry.cache_clear()
    yield
    registry.cache_clear()


@pytest.mark.usefixtures("broken")
def test_a_plugin_that_cannot_be_imported_is_a_row(command: Command) -> None:
    done = command("doctor")
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("plugin acme")]
    assert "could not be loaded: ModuleNotFoundError: No module named 'no_such_module_anywhere'" in row
    assert "uninstall acme or set OPTC_DISABLE_PLUGINS=acme" in row
    assert "backend onnxruntime" in done.stdout
    told = json.loads(command("doctor", "--json").stdout)
    assert [each["name"] for each in told["broken"]] == ["acme"]
    assert "optc.builtin" in told["plugins"]


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("name", ["passes", "backends"])
def test_the_other_commands_name_it_in_one_line(name: str, command: Command) -> None:
    done = command(name)
    assert done.returncode == 2
    assert "plugin 'acme' (from acme) could not be loaded" in done.stderr
    assert done.stderr.count("\n") == 1
