from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pluggy
import pytest

from optc import Entry, OptcError, hookimpl
from optc.data.dataset import open_dataset
from optc.errors import PluginError, UnknownNameError
from optc.frontend.load import find_source, load_model
from optc.passmanager.manager import build_passes
from optc.plugins import hookspecs
from optc.plugins.registry import DEFAULT_PLUGINS, Registry, registry, working

PLUGIN = """
from optc import Entry, hookimpl

@hookimpl
def {hook}():
    return [Entry({name!r}, "A summary.", "{module}:Thing")]

class Thing:
    name = {name!r}
    summary = "A summary."
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on ``sys.path`` for distributions to be installed into; the process-wide registry is made anew."""
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.cache_clear()
    modules = set(sys.modules)
    yield tmp_path
    registry.cache_clear()
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def install(folder: Path, name: str, source: str) -> None:
    """Lay out an installed distribution as pip does: the module and its ``.dist-info`` with an entry point."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[optc]\n{name} = {name}\n")


def in_process(**plugins: Iterable[Entry]) -> Registry:
    """A registry of plugins that provide the given passes."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    for name, entries in plugins.items():
        module = ModuleType(name)
        module.optc_passes = hookimpl(specname="optc_passes")(lambda entries=entries: entries)  # type: ignore[attr-defined]
        manager.register(module, name=name)
    return Registry(manager)


def entry(name: str, target: str = "optc.target:Target") -> Entry:
    return Entry(name, "A summary.", target)


def test_an_installed_plugin_is_found_by_its_entry_point(installed: Path) -> None:
    install(installed, "acme", PLUGIN.format(hook="optc_passes", name="acme-pass", module="acme"))
    found = registry().get("pass", "acme-pass")
    assert found.plugin == "acme"
    assert registry().load("pass", "acme-pass").origin == "acme"


@pytest.mark.parametrize("kind", ["pass", "dataset", "model source"])
def test_what_a_class_raises_when_it_is_made_names_the_plugin(installed: Path, kind: str) -> None:
    hook = f"optc_{kind.replace(' ', '_')}{'es' if kind == 'pass' else 's'}"
    broken = "    def __init__(self):\n        self.missing\n"
    install(installed, "acme", PLUGIN.format(hook=hook, name="acme-thing", module="acme") + broken)
    with pytest.raises(PluginError, match=rf"{kind} 'acme-thing' \(from acme\) raised AttributeError: .*missing"):
        registry().make(kind, "acme-thing")
    user = {"pass": build_passes, "dataset": open_dataset, "model source": lambda name: find_source(f"{name}:x")}[kind]
    with pytest.raises(PluginError, match="from acme"):
        user("acme-thing")


def test_a_model_source_that_fails_leaves_the_others_alone_and_is_named_when_asked(installed: Path) -> None:
    methods = (
        "    claims = lambda self, name: name == 'x' or {}[name]\n    build = lambda self, name, **options: {}[name]\n"
    )
    install(installed, "acme", PLUGIN.format(hook="optc_model_sources", name="acme-zoo", module="acme") + methods)
    assert find_source("alexnet")[0].name == "torchvision"
    with pytest.raises(UnknownNameError, match=r"\(from acme\) raised KeyError: 'qqqqzzzz'"):
        find_source("qqqqzzzz")
    with pytest.raises(PluginError, match=r"model source 'acme-zoo' \(from acme\) raised KeyError: 'x'"):
        load_model("acme-zoo:x")


def test_the_default_plugins_come_first_and_list_something() -> None:
    registry.cache_clear()
    owners = {
        item.plugin for kind in ("pass", "backend", "model source", "dataset") for item in registry().all(kind).values()
    }
    assert set(DEFAULT_PLUGINS) <= owners


def test_every_default_entry_loads_and_agrees_with_its_class() -> None:
    for kind in ("pass", "backend", "model source", "dataset"):
        for name, item in registry().all(kind).items():
            if not item.missing():
                assert registry().load(kind, name).name == name


def test_two_plugins_with_one_name_are_refused_and_both_are_named() -> None:
    plugins = in_process(acme=[entry("fold")], zenith=[entry("fold")])
    with pytest.raises(PluginError, match="pass 'fold' is provided by both") as caught:
        plugins.all("pass")
    assert "'acme'" in str(caught.value)
    assert "'zenith'" in str(caught.value)
    assert "OPTC_DISABLE_PLUGINS" in caught.value.hint


def test_a_name_a_default_plugin_has_is_refused_too(installed: Path) -> None:
    taken = next(iter(registry().all("backend")))
    registry.cache_clear()
    install(installed, "acme", PLUGIN.format(hook="optc_backends", name=taken, module="acme"))
    with pytest.raises(PluginError, match=f"backend '{taken}' is provided by both") as caught:
        registry().all("backend")
    assert "acme" in str(caught.value)
    assert "optc.builtin" in str(caught.value)


def test_a_disabled_plugin_is_left_out(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(installed, "acme", "raise RuntimeError('never imported')")
    monkeypatch.setenv("OPTC_DISABLE_PLUGINS", "acme")
    assert "acme" not in {item.plugin for item in registry().all("pass").values()}


def test_an_unknown_hook_fails_loudly(installed: Path) -> None:
    source = "from optc import hookimpl\n\n@hookimpl\ndef optc_pases():\n    return []\n"
    install(installed, "acme", source)
    with pytest.raises(PluginError, match="optc_pases") as caught:
        registry()
    assert "plugin 'acme'" in str(caught.value)


def test_a_plugin_that_cannot_be_imported_is_named(installed: Path) -> None:
    install(installed, "acme", "import no_such_module_anywhere\n")
    with pytest.raises(PluginError, match="no_such_module_anywhere") as caught:
        registry()
    assert "acme" in str(caught.value)
    assert "OPTC_DISABLE_PLUGINS=acme" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("acme", "import no_such_module_anywhere\n", "could not be loaded: ModuleNotFoundError"),
        ("leaver", "raise SystemExit(0)\n", "could not be loaded: SystemExit: 0"),
        ("typo", "from optc import hookimpl\n\n@hookimpl\ndef optc_pases():\n    return []\n", "optc_pases"),
        (
            "hook",
            "from optc import hookimpl\n\n@hookimpl\ndef optc_passes():\n    return 1 / 0\n",
            "failed in optc_passes",
        ),
        ("twin", PLUGIN.format(hook="optc_backends", name="eager", module="twin"), "is provided by both"),
    ],
)
def test_the_others_work_without_a_broken_plugin(installed: Path, name: str, source: str, reason: str) -> None:
    install(installed, name, source)
    install(installed, "sound", PLUGIN.format(hook="optc_passes", name="sound-pass", module="sound"))
    found, broken = working()
    assert found.get("pass", "sound-pass").plugin == "sound"
    assert found.get("backend", "eager").plugin == "optc.builtin"
    assert list(broken) == [name]
    assert reason in broken[name].message
    with pytest.raises(PluginError, match=reason):
        registry().all("pass")


def test_a_part_of_a_plugin_that_ends_the_process_is_named(installed: Path) -> None:
    leaves = "    def __init__(self):\n        raise SystemExit(0)\n"
    install(installed, "acme", PLUGIN.format(hook="optc_passes", name="acme-pass", module="acme") + leaves)
    with pytest.raises(PluginError, match=r"pass 'acme-pass' \(from acme\) raised SystemExit: 0"):
        registry().make("pass", "acme-pass")


def test_a_module_of_a_plugin_that_ends_the_process_is_named(installed: Path) -> None:
    install(installed, "acme", PLUGIN.format(hook="optc_passes", name="acme-pass", module="acme_parts"))
    (installed / "acme_parts.py").write_text("raise SystemExit(0)\n")
    message = "plugin 'acme' could not load pass 'acme-pass' from acme_parts:Thing: SystemExit: 0"
    with pytest.raises(PluginError, match=message):
        registry().load("pass", "acme-pass")


def test_a_hook_that_raises_is_named(installed: Path) -> None:
    install(installed, "acme", "from optc import hookimpl\n\n@hookimpl\ndef optc_passes():\n    return 1 / 0\n")
    with pytest.raises(PluginError, match="plugin 'acme' failed in optc_passes: ZeroDivisionError"):
        registry().all("pass")


def test_a_hook_that_returns_something_else_is_named() -> None:
    with pytest.raises(PluginError, match="plugin 'acme' returned 'fold' from optc_passes") as caught:
        in_process(acme=["fold"]).all("pass")  # type: ignore[list-item]
    assert "optc.Entry" in caught.value.hint


@pytest.mark.parametrize("target", ["no_such_module:Pass", "optc.target:NoSuchClass"])
def test_a_target_that_cannot_be_imported_names_the_plugin_and_the_target(target: str) -> None:
    with pytest.raises(PluginError, match="plugin 'acme' could not load pass 'fold'") as caught:
        in_process(acme=[entry("fold", target)]).load("pass", "fold")
    assert target in str(caught.value)


def test_a_class_that_disagrees_with_its_entry_is_refused() -> None:
    wrong_name = in_process(acme=[entry("fold", "optc.passmanager.manager:PassManager")])
    with pytest.raises(PluginError, match=r"PassManager\.name is 'pass-manager'"):
        wrong_name.load("pass", "fold")
    wrong_summary = in_process(acme=[entry("pass-manager", "optc.passmanager.manager:PassManager")])
    with pytest.raises(PluginError, match=r"PassManager\.summary is 'Run a list of passes in order\.'"):
        wrong_summary.load("pass", "pass-manager")


def test_a_missing_package_gives_the_line_that_installs_it() -> None:
    needy = Entry("fold", "A summary.", "nowhere:Fold", requires=("no_such_package",), install="acme[fold]")
    plugins = in_process(acme=[needy])
    assert plugins.get("pass", "fold").missing() == ("no_such_package",)
    with pytest.raises(OptcError, match="needs no_such_package") as caught:
        plugins.load("pass", "fold")
    assert caught.value.hint == "pip install 'acme[fold]'"


def test_an_unknown_name_suggests_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="unknown pass 'fodl'") as caught:
        in_process(acme=[entry("fold"), entry("quant")]).get("pass", "fodl")
    assert caught.value.close_matches == ["fold"]


def test_two_distributions_with_one_plugin_name_are_refused(installed: Path) -> None:
    install(installed, "acme", PLUGIN.format(hook="optc_passes", name="acme-pass", module="acme"))
    install(installed, "zenith", PLUGIN.format(hook="optc_passes", name="zenith-pass", module="zenith"))
    (installed / "zenith-1.0.dist-info" / "entry_points.txt").write_text("[optc]\nacme = zenith\n")
    with pytest.raises(PluginError, match=r"(acme and zenith|zenith and acme) both install a plugin called 'acme'"):
        registry()


def test_a_backend_of_a_plugin_that_is_left_out_says_so() -> None:
    code = "import sys; from optc.cli.main import run; sys.exit(run(['optimize', 'alexnet', '--backend', 'openvino']))"
    environment = {**os.environ, "OPTC_DISABLE_PLUGINS": "openvino"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    said = "optc: backend 'openvino' is left out — take 'openvino' out of OPTC_DISABLE_PLUGINS"
    assert done.stderr.splitlines()[-1] == said


def test_a_package_of_the_checkout_is_installed_from_its_folder() -> None:
    found = Registry(pluggy.PluginManager("optc"))
    error = found.absent("backend", "openvino")
    folder = Path(__file__).parents[3] / "plugins" / "optc-openvino"
    assert str(error) == f"backend 'openvino' is not installed — pip install {shlex.quote(str(folder))}"


def test_options_of_a_backend_that_is_left_out_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from optc.cli.main import run

    monkeypatch.setenv("OPTC_DISABLE_PLUGINS", "openvino")
    registry.cache_clear()
    try:
        assert run(["optimize", "alexnet", "-O", "openvino.hint=throughput", "-q"]) == 2
    finally:
        registry.cache_clear()
        logging.disable(logging.NOTSET)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "optc: backend 'openvino' is left out — take 'openvino' out of OPTC_DISABLE_PLUGINS"


def test_a_package_in_one_that_is_not_there_is_missing() -> None:
    entry = Entry("thing", "A summary.", "m:Thing", requires=("no_such_package.part",))
    assert in_process(one=[entry]).get("pass", "thing").missing() == ("no_such_package.part",)


def test_a_backend_that_raises_when_asked_is_listed_with_that(monkeypatch: pytest.MonkeyPatch) -> None:
    from optc.cli.backends import status
    from optc.lowering.eager import EagerBackend

    monkeypatch.setattr(EagerBackend, "unavailable", None)
    found = status(registry(), "eager")
    assert not found["ready"]
    assert found["reason"] == "plugin 'optc.builtin' raised TypeError: 'NoneType' object is not callable"
