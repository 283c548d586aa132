"""Options that several commands share."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click
from rich.table import Column, Table

from optc.cli.streams import ReaderLeft, stdout_to_stderr
from optc.cli.terminal import TerminalProgress, silence_third_parties, stderr
from optc.cli.values import SEED, TEXT, THREADS

Command = TypeVar("Command", bound=Callable[..., Any])
_RESULTS = "optc.results"
"""Under this name the context of a command keeps what is to be printed when it has ended."""


def json_option(command: Command) -> Command:
    """``--json``: machine-readable output on stdout, and nothing else: what models and plugins print goes to stderr."""

    @wraps(command)
    def alone(*arguments: Any, as_json: bool, **options: Any) -> Any:
        results: list[str] = click.get_current_context().meta.setdefault(_RESULTS, [])
        try:
            with stdout_to_stderr() if as_json else nullcontext():
                return command(*arguments, as_json=as_json, **options)
        finally:
            try:
                for result in results:
                    click.echo(result)
            except BrokenPipeError:
                raise ReaderLeft from None

    option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout instead of text.")
    return cast(Command, option(alone))


def options_table(name: str, options: Mapping[str, Mapping[str, Any]]) -> Table:
    """The options of a pass or backend, as :func:`optc.options.described` has them."""
    table = Table(Column("option", no_wrap=True), "type", "default", "", box=None, pad_edge=False, header_style="bold")
    for option, about in options.items():
        table.add_row(f"{name}.{option}", about["type"], str(about["default"]), about["description"])
    return table


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
    return click.option("--threads", type=THREADS, help="Threads for every candidate.  [default: one for each core]")(
        command
    )


def seed_option(command: Command) -> Command:
    """``--seed``: of weights that are drawn."""
    return click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of random weights.")(command)


def device_option(command: Command) -> Command:
    """``--device``: what the model is lowered for."""
    return click.option(
        "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Device to lower for."
    )(command)


def weights_option(command: Command) -> Command:
    """``--weights`` of commands whose targets need not be models."""
    return click.option(
        "--weights",
        type=TEXT,
        default="pretrained",
        show_default=True,
        help="For model names: pretrained, random or a file.",
    )(command)


def limit_options(command: Command) -> Command:
    """``--cpu-affinity`` and ``--memory-limit``: measure as on a smaller machine."""
    command = click.option(
        "--memory-limit", type=TEXT, metavar="SIZE", help="Most memory to allocate, such as 512MB or 2GiB."
    )(command)
    return click.option("--cpu-affinity", type=TEXT, metavar="CPUS", help="CPUs to run on, such as 0,2 or 0-3.")(
        command
    )


def report_option(command: Command) -> Command:
    """``--report``: what was found out, as a file to look at or to send."""
    return click.option(
        "--report",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Write a report: .html (one page with charts), .md or .json.",
    )(command)


def command_line() -> str:
    """The command that runs, as one would type it, without what only says how to show its results."""
    context = click.get_current_context()
    words = context.command_path.split()
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if not given or name in ("report", "as_json", "verbose", "quiet"):
            continue
        value = context.params[name]
        values = value if isinstance(value, tuple) else (value,)
        if isinstance(parameter, click.Argument):
            words += map(str, values)
        elif isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            words += [word for each in values for word in (parameter.opts[0], str(each))]
    return shlex.join(words)


def progress_for(verbose: bool, quiet: bool) -> TerminalProgress:
    """The progress display for a verbosity; silences third parties unless verbose."""
    silence_unless(verbose)
    return TerminalProgress(stderr(), 1 if verbose else -1 if quiet else 0)


def silence_unless(verbose: bool) -> None:
    """Keep other packages' messages from the user unless asked for."""
    if not verbose:
        silence_third_parties()


def print_json(value: Any) -> None:
    """Print a JSON-ready value on stdout when the command, one with :func:`json_option`, has ended."""
    results: list[str] = click.get_current_context().meta[_RESULTS]
    results.append(json.dumps(value, indent=2, default=str, allow_nan=False))
