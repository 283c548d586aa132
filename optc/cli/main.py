"""The ``optc`` command: one file per subcommand, loaded when asked for; every failure one line and exit code 2."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

import click

import optc
from optc.cli.failures import in_one_line
from optc.cli.streams import ReaderLeft
from optc.errors import UnknownNameError

COMMANDS = {
    "optimize": "Run passes over a model, prove them, lower it, measure it, save an artifact.",
    "partition": "Cut a model into stages that run as a pipeline on several devices.",
    "profile": "Measure models or artifacts with MLPerf LoadGen.",
    "compare": "Say which of several models, artifacts or saved runs is faster, and how sure that is.",
    "explain": "Show why each layer of an artifact has the format it has.",
    "passes": "List the passes, or describe one.",
    "backends": "List the backends and whether they run here.",
    "doctor": "Show what is installed, what works and what this machine can do.",
}


_COMPLETION = "_OPTC_COMPLETE"
"""Shells set it to ask for completions."""


class _Commands(click.Group):
    """A group whose subcommands are imported on use; the listing needs none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            raise UnknownNameError("command", cmd_name, COMMANDS, hint=f"commands: {', '.join(COMMANDS)}")
        command: click.Command = importlib.import_module(f"optc.cli.{cmd_name}").command
        command.short_help = COMMANDS[cmd_name]
        return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(optc.__version__, prog_name="optc")
def cli() -> None:
    """What LLVM's opt is to programs, for neural networks: verified, measured passes over PyTorch models."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the ``optc`` command.

    Exits 0 on success and 2 with one line on stderr on anything that went wrong; only a bug in optc prints a traceback.
    SIGTERM, and SIGHUP unless it is ignored, clean up as Ctrl-C does and exit with 143 and 129.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup has it ignored
        signal.signal(signal.SIGHUP, _interrupt)
    sys.exit(run(argv))


def _interrupt(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGHUP:  # a terminal that is closed sends it twice: not while cleaning up
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def run(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        result: Any = cli.main(args=argv, prog_name="optc", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.UsageError as error:
        return _fail(_usage_message(error))
    except (KeyboardInterrupt, click.Abort) as error:
        status = _fail("interrupted; nothing was left half-written")
        number = next(iter((error.__cause__ or error).args), None)
        return 128 + number if number in (signal.SIGTERM, signal.SIGHUP) else status
    except ReaderLeft:
        return _silent()
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and type(sys.stdout).__name__ == "_PacifyFlushWrapper":
            return _silent()  # click's way to end a --help that nobody reads to its end
        line = None if _COMPLETION in os.environ else in_one_line(error)  # click ends with sys.exit() then
        if line is None:
            raise
        if "-v" in argv or "--verbose" in argv:
            import traceback

            traceback.print_exc()
        return _fail(line)


def _silent() -> int:
    """Nothing more is read of standard output, where Python writes what is left as it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _fail(message: str) -> int:
    with suppress(OSError):  # the terminal may be gone
        click.echo(f"optc: {message}", err=True)
    return 2


def _usage_message(error: click.UsageError) -> str:
    """click's message on one line, with the closest option names where one is unknown."""
    if isinstance(error, click.NoSuchOption):
        known = [name for p in error.ctx.command.get_params(error.ctx) for name in p.opts] if error.ctx else []
        return str(UnknownNameError("option", error.option_name, known, hint="see --help"))
    return " ".join(error.format_message().split())


if __name__ == "__main__":
    main()
