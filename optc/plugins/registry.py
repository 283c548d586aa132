"""The plugin host: finds plugins, lists what they provide, imports it on demand."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pluggy

from optc.errors import OptcError, PluginError, UnknownNameError
from optc.plugins import hookspecs
from optc.plugins.hookspecs import Entry

ENTRY_POINT_GROUP = "optc"
DEFAULT_PLUGINS = ("optc.builtin", "optc_passes")
KINDS = {
    "pass": "optc_passes",
    "backend": "optc_backends",
    "model source": "optc_model_sources",
    "dataset": "optc_datasets",
}
RAISED = (Exception, SystemExit)
"""What other people's code is caught with: a ``sys.exit()`` in it must not end optc as if all went well."""
ELSEWHERE = {("backend", "openvino"): ("openvino", "optc-openvino")}
"""What comes with a package of its own: by kind and name, the plugin and the package."""


class BrokenPlugin(PluginError):
    """A plugin that cannot be used at all: ``plugin`` is its name."""

    def __init__(self, plugin: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.plugin = plugin


@contextmanager
def blamed(kind: str, name: str, origin: str, where: str = " raised") -> Iterator[None]:
    """Turn whatever a plugin's part raises into a :class:`PluginError` that names the part and the plugin."""
    try:
        yield
    except OptcError:
        raise
    except RAISED as error:
        raise PluginError(
            f"{kind} '{name}' (from {origin}){where} {type(error).__name__}: {error}", "run with -v for the traceback"
        ) from error


@dataclass(frozen=True)
class Registered:
    """An entry and the plugin that provides it."""

    entry: Entry
    plugin: str

    def missing(self) -> tuple[str, ...]:
        """Import names the entry requires that are not installed."""
        return tuple(name for name in self.entry.requires if not _is_installed(name))


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # nor is the package that it is in
        return False


class Registry:
    """All plugins' entries by kind. Duplicate names are refused, naming both owners."""

    def __init__(self, manager: pluggy.PluginManager) -> None:
        self._manager = manager

    @cached_property
    def _tables(self) -> Mapping[str, Mapping[str, Registered]]:
        return {kind: self._table(kind, hook) for kind, hook in KINDS.items()}

    def _table(self, kind: str, hook: str) -> Mapping[str, Registered]:
        table: dict[str, Registered] = {}
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            owner = implementation.plugin_name
            try:
                entries = list(implementation.function())
            except RAISED as error:
                raise BrokenPlugin(
                    owner, f"plugin '{owner}' failed in {hook}: {type(error).__name__}: {error}"
                ) from error
            for entry in entries:
                if not isinstance(entry, Entry):
                    raise BrokenPlugin(
                        owner, f"plugin '{owner}' returned {entry!r} from {hook}", "return optc.Entry objects"
                    )
                if entry.name in table:
                    other = table[entry.name].plugin
                    raise BrokenPlugin(
                        owner,
                        f"{kind} '{entry.name}' is provided by both '{other}' and '{owner}'",
                        f"uninstall one of them or set OPTC_DISABLE_PLUGINS={owner}",
                    )
                table[entry.name] = Registered(entry, owner)
        return table

    def all(self, kind: str) -> Mapping[str, Registered]:
        """Everything registered of a kind (``"pass"``, ``"backend"``, ``"model source"``, ``"dataset"``), by name."""
        return self._tables[kind]

    def get(self, kind: str, name: str) -> Registered:
        """Look a name up.

        Raises:
            OptcError: the package that provides it is not installed; carries the pip line.
            UnknownNameError: nothing of that kind has the name; suggests the closest.
        """
        table = self.all(kind)
        if name not in table and (kind, name) in ELSEWHERE:
            raise self.absent(kind, name)
        if name not in table:
            raise UnknownNameError(kind, name, table, hint=f"known: {', '.join(table)}")
        return table[name]

    def absent(self, kind: str, name: str) -> OptcError:
        """Why what is in :data:`ELSEWHERE` is not there, and how to get it."""
        plugin, package = ELSEWHERE[kind, name]
        if self._manager.is_blocked(plugin):
            return OptcError(f"{kind} '{name}' is left out", f"take '{plugin}' out of OPTC_DISABLE_PLUGINS")
        return OptcError(f"{kind} '{name}' is not installed", f"pip install {where_from(package)}")

    def load(self, kind: str, name: str) -> Any:
        """Import and return the class behind a name, with ``origin`` set to the plugin's name.

        Raises:
            UnknownNameError: nothing of that kind has the name.
            OptcError: a package it requires is missing; the message carries the pip line.
            PluginError: the import failed, or the class's ``name`` or ``summary`` differ from its entry's.
        """
        registered = self.get(kind, name)
        entry, missing = registered.entry, registered.missing()
        if missing:
            raise OptcError(
                f"{kind} '{name}' needs {', '.join(missing)}, which is not installed",
                f"pip install '{entry.install or ' '.join(missing)}'",
            )
        module, _, attribute = entry.target.partition(":")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except RAISED as error:
            raise PluginError(
                f"plugin '{registered.plugin}' could not load {kind} '{name}' from {entry.target}:"
                f" {type(error).__name__}: {error}"
            ) from error
        for field in ("name", "summary"):
            if getattr(cls, field, None) != getattr(entry, field):
                raise PluginError(
                    f"plugin '{registered.plugin}' registers {kind} '{name}' but {entry.target}.{field} is"
                    f" {getattr(cls, field, None)!r}",
                    "make the class and its Entry agree",
                )
        cls.origin = registered.plugin
        return cls

    def make(self, kind: str, name: str, /, **options: Any) -> Any:
        """An instance of the class behind a name.

        Raises:
            OptcError: as :meth:`load` does; a :class:`PluginError` that names the plugin for what the class raises.
        """
        cls = self.load(kind, name)
        with blamed(kind, name, cls.origin):
            return cls(**options)


def where_from(package: str) -> str:
    """What to give pip for a package of this project: its folder in a checkout, which has what is not released yet."""
    folder = Path(__file__).parents[2] / "plugins" / package
    return shlex.quote(str(folder)) if folder.is_dir() else package


@lru_cache(maxsize=1)
def registry() -> Registry:
    """The process-wide registry: built-in plugins, then installed ones (entry-point group ``optc``).

    Plugins named in the environment variable ``OPTC_DISABLE_PLUGINS`` (comma-separated) are left out, unimported.

    Raises:
        PluginError: a plugin cannot be imported, implements a hook that does not exist, or has another's name.
    """
    return _discovered(())


def working() -> tuple[Registry, dict[str, BrokenPlugin]]:
    """A registry of the plugins that can be used, and what is wrong with the others, by name."""
    broken: dict[str, BrokenPlugin] = {}
    while True:
        try:
            found = _discovered(broken)
            found.all("pass")  # asks every plugin for all that it provides
            return found, broken
        except BrokenPlugin as error:
            if error.plugin in broken:
                raise
            broken[error.plugin] = error


def _discovered(left_out: Iterable[str]) -> Registry:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    for name in filter(None, (*left_out, *os.environ.get("OPTC_DISABLE_PLUGINS", "").split(","))):
        manager.set_blocked(name.strip())
    for name in DEFAULT_PLUGINS:
        if not manager.is_blocked(name):
            manager.register(importlib.import_module(name), name=name)
    providers = dict.fromkeys(DEFAULT_PLUGINS, "optc")
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if manager.is_blocked(point.name):
            continue
        provider = point.dist.name if point.dist else point.value
        if point.name in providers:
            raise BrokenPlugin(
                point.name,
                f"{providers[point.name]} and {provider} both install a plugin called '{point.name}'",
                "uninstall one of them",
            )
        providers[point.name] = provider
        _register_installed(manager, point, provider)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        name = str(manager.get_name(error.plugin))
        raise BrokenPlugin(name, f"plugin '{name}': {error}", "see optc.plugins.hookspecs") from error
    return Registry(manager)


def _register_installed(manager: pluggy.PluginManager, point: importlib.metadata.EntryPoint, provider: str) -> None:
    try:
        manager.register(point.load(), name=point.name)
    except RAISED as error:
        raise BrokenPlugin(
            point.name,
            f"plugin '{point.name}' (from {provider}) could not be loaded: {type(error).__name__}: {error}",
            f"uninstall {provider} or set OPTC_DISABLE_PLUGINS={point.name}",
        ) from error
