"""``optc backends``: what a model can be lowered to, and whether it runs here."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Column, Table
from rich.text import Text

from optc.cli.options import json_option, options_table, print_json
from optc.cli.terminal import stdout
from optc.errors import OptcError
from optc.options import described
from optc.plugins.registry import RAISED, Registry, registry
from optc.target import Target


@click.command("backends")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List every backend, whether it runs here, and what to install where not; with NAME, one and its options."""
    if name is not None:
        description = status(registry(), name) | {"options": described(registry().load("backend", name).Options)}
        print_json(description) if as_json else _print_description(description)
        return
    rows = [status(registry(), name) for name in registry().all("backend")]
    if as_json:
        print_json(rows)
        return
    here = Column("here", overflow="fold")  # a pip line is there to be copied
    table = Table("backend", "what it is", "from", here, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        state = Text("ready", "green") if row["ready"] else Text(str(row["reason"]), "yellow")
        table.add_row(row["name"], row["summary"], row["plugin"], state)
    stdout().print(table)


def status(plugins: Registry, name: str) -> dict[str, Any]:
    """Whether the backend runs here, and if not why, JSON-ready. Imports the backend if what it requires is there."""
    registered = plugins.get("backend", name)
    try:
        backend = plugins.load("backend", name)
        reason = backend.unavailable(Target())
        if reason is not None and backend.unavailable(Target(device="cuda")) is None:
            reason = None  # it runs on the GPU, and on that alone
    except OptcError as error:
        reason = str(error)
    except RAISED as error:
        reason = f"plugin '{registered.plugin}' raised {type(error).__name__}: {error}"
    return {
        "name": name,
        "summary": registered.entry.summary,
        "plugin": registered.plugin,
        "ready": reason is None,
        "reason": reason,
    }


def _print_description(description: dict[str, Any]) -> None:
    console = stdout()
    here = "ready" if description["ready"] else description["reason"]
    console.print(Text(description["name"], "bold"), f"({description['plugin']}): {description['summary']}\n")
    console.print(f"here: {here}")
    if description["options"]:
        console.print()
        console.print(options_table(description["name"], description["options"]))
