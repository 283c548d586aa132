"""``optc passes``: what passes there are, and what one of them does and takes."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table
from rich.text import Text

from optc.cli.options import json_option, options_table, print_json
from optc.cli.terminal import stdout
from optc.options import described
from optc.plugins.registry import Registered, blamed, registry


@click.command("passes")
@click.argument("name", required=False)
@click.option("-v", "--verbose", is_flag=True, expose_value=False, help="Show the traceback of what goes wrong.")
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List every pass, built-in and from plugins; with NAME, describe one and its options."""
    if name is not None:
        description = describe(name)
        print_json(description) if as_json else _print_description(description)
        return
    table = registry().all("pass")
    if as_json:
        print_json([_listed(registered) for registered in table.values()])
        return
    console = stdout()
    rows = Table("pass", "what it does", "from", box=None, pad_edge=False, header_style="bold")
    for registered in table.values():
        rows.add_row(registered.entry.name, registered.entry.summary, registered.plugin)
    console.print(rows)


def _listed(registered: Registered) -> dict[str, str]:
    return {"name": registered.entry.name, "summary": registered.entry.summary, "plugin": registered.plugin}


def describe(name: str) -> dict[str, Any]:
    """A pass's summary, promise, documentation and options, JSON-ready. Imports the pass."""
    registered = registry().get("pass", name)
    cls = registry().load("pass", name)
    with blamed("pass", name, cls.origin):
        members = [leaf.name for leaf in cls().leaves() if leaf.name != name]
    promise = cls.numerics
    return {
        **_listed(registered),
        "numerics": "exact"
        if promise.exact
        else {"min_sqnr_db": promise.min_sqnr_db, "min_top1_agreement": promise.min_top1_agreement},
        "documentation": (cls.__doc__ or "").strip(),
        "options": described(cls.Options),
        "members": members,
    }


def _print_description(description: dict[str, Any]) -> None:
    console = stdout()
    console.print(Text(description["name"], "bold"), f"({description['plugin']}): {description['summary']}\n")
    console.print(description["documentation"])
    promise = description["numerics"]
    if promise != "exact":
        promise = "approximate; " + ", ".join(f"{key} {value}" for key, value in promise.items() if value is not None)
    console.print(f"\nnumerics: {promise}")
    if description["members"]:
        console.print(f"runs: {', '.join(description['members'])}")
    if description["options"]:
        console.print()
        console.print(options_table(description["name"], description["options"]))
