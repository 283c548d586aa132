"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click
from rich.console import Console

from optc.cli.terminal import TerminalProgress, silence_third_parties

Command = TypeVar("Command", bound=Callable[..., Any])


def json_option(command: Command) -> Command:
    """``--json``: machine-readable output on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout instead of text.")(command)


def verbosity_options(command: Command) -> Command:
    """``-v`` and ``-q``."""
    command = click.option("-v", "--verbose", is_flag=True, help="Show more, other packages' messages included.")(
        command
    )
    return click.option("-q", "--quiet", is_flag=True, help="Show results only.")(command)


def target_options(command: Command) -> Command:
    """``--threads`` and ``--allow-fallback``: what every candidate runs with."""
    command = click.option(
        "--allow-fallback", is_flag=True, help="Let a runtime run nodes elsewhere than asked; they are listed."
    )(command)
    return click.option(
        "--threads", type=click.IntRange(1), help="Threads for every candidate.  [default: all this process has]"
    )(command)


def progress_for(verbose: bool, quiet: bool) -> TerminalProgress:
    """The progress display for a verbosity; silences third parties unless verbose."""
    silence_unless(verbose)
    return TerminalProgress(Console(stderr=True, highlight=False), 1 if verbose else -1 if quiet else 0)


def silence_unless(verbose: bool) -> None:
    """Keep other packages' messages from the user unless asked for."""
    if not verbose:
        silence_third_parties()


def print_json(value: Any) -> None:
    """Print a JSON-ready value on stdout."""
    click.echo(json.dumps(value, indent=2, default=str, allow_nan=False))
