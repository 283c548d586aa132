"""Write the generated pages, docs/cli.md and docs/passes.md: ``python docs/generate.py`` (``make docs``)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import click

from optc.cli.main import cli
from optc.plugins.registry import registry

WIDTH = 100


def command_reference() -> str:
    """The help text of ``optc`` and of each of its commands, as Markdown."""
    root = click.Context(cli, info_name="optc", terminal_width=WIDTH, max_content_width=WIDTH, **cli.context_settings)
    lines = ["# The command line", "", "Written by `make docs` from the commands themselves."]
    for context in (root, *(_subcommand(root, name) for name in cli.list_commands(root))):
        lines += ["", f"## {context.command_path}", "", "```text"]
        lines += [line.rstrip() for line in context.command.get_help(context).splitlines()] + ["```"]
    return "\n".join(lines) + "\n"


def _subcommand(root: click.Context, name: str) -> click.Context:
    command = cli.get_command(root, name)
    assert command is not None, name
    return click.Context(command, info_name=name, parent=root, terminal_width=WIDTH, max_content_width=WIDTH)


def pass_reference() -> str:
    """What each built-in pass does, promises and takes, as Markdown."""
    lines = ["# The built-in passes", "", "Written by `make docs` from the passes themselves."]
    for name, registered in registry().all("pass").items():
        if registered.plugin != "optc_passes":
            continue
        cls = registry().load("pass", name)
        lines += ["", f"## `{name}`", "", registered.entry.summary, ""]
        promise = cls.numerics
        if promise.exact:
            lines.append("Exact: outputs move by float rounding only.")
        else:
            floor = [f"SQNR at least {promise.min_sqnr_db:g} dB"] if promise.min_sqnr_db is not None else []
            if promise.min_top1_agreement is not None:
                floor.append(f"top-1 agreement at least {promise.min_top1_agreement:.0%}")
            lines.append(f"Approximate: {', '.join(floor) or 'no floor declared'}.")
        members = [leaf.name for leaf in cls().leaves() if leaf.name != name]
        if members:
            lines += ["", f"Runs {', '.join(f'`{member}`' for member in members)}."]
        if cls.Options.model_fields:
            lines.append("")
            lines += [
                f"- `-O {name}.{option}=…` (default `{field.default}`): {field.description}"
                for option, field in cls.Options.model_fields.items()
            ]
    return "\n".join(lines) + "\n"


PAGES: dict[str, Callable[[], str]] = {"cli.md": command_reference, "passes.md": pass_reference}


if __name__ == "__main__":
    for page, render in PAGES.items():
        path = Path(__file__).with_name(page)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(render(), encoding="utf-8")
        os.replace(temporary, path)
        print(f"wrote {path}")
