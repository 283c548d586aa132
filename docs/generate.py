"""Write docs/cli.md from the commands themselves: ``python docs/generate.py`` (``make docs``)."""

from __future__ import annotations

import os
from pathlib import Path

import click

PAGE = Path(__file__).with_name("cli.md")


def command_reference() -> str:
    """The Markdown page: the help text of ``optc`` and of each of its commands, 100 columns wide."""
    from optc.cli.main import cli

    root = click.Context(cli, info_name="optc", terminal_width=100, max_content_width=100)
    lines = [
        "# The command line",
        "",
        "Written by `make docs` from the commands themselves; a test holds the two together.",
    ]
    for context in (root, *_subcommands(cli, root)):
        lines += ["", f"## {context.command_path}", "", "```", f"$ {context.command_path} --help"]
        lines += [line.rstrip() for line in context.command.get_help(context).splitlines()] + ["```"]
    return "\n".join(lines) + "\n"


def _subcommands(group: click.Group, root: click.Context) -> list[click.Context]:
    contexts = []
    for name in group.list_commands(root):
        command = group.get_command(root, name)
        assert command is not None, name
        contexts.append(click.Context(command, info_name=name, parent=root, terminal_width=100, max_content_width=100))
    return contexts


if __name__ == "__main__":
    text = command_reference()
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, PAGE)
    print(f"wrote {PAGE}")
