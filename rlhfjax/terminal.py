"""The voice of the command line: exit codes, one-line errors, and text of models that cannot steer a terminal."""

import io
import os
import re
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from rlhfjax import stores
from rlhfjax.errors import RlhfjaxError
from rlhfjax.host import stopping

# Typer comes with its own copy of click in newer versions; this is its usage error in every version.
_UsageError: Any = typer.BadParameter.__mro__[1]

_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor, erase
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\|$)"  # OSC, DCS, SOS, PM, APC: titles, links, clipboard
    r"|\x1b[ -/]*[0-~]?"  # all other escapes
    r"|\x9b[0-?]*[ -/]*[@-~]"  # CSI in one byte
)
# What is left: control characters but tab and newline, and those that reorder or hide text.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_READER_GONE = 141  # what shells report for a program that wrote into a closed pipe


def printable(text: str) -> str:
    """Text that only shows: terminal escapes, control characters and direction overrides are taken out."""
    return _CONTROLS.sub("", _ESCAPES.sub("", text.replace("\r\n", "\n")))


def say(text: str) -> None:
    """Progress and notes, on stderr."""
    typer.echo(printable(stores.named(text)), err=True)


def take_any_text() -> None:
    """Let stdout and stderr show what their encoding lacks as an escape such as \\xe9, instead of failing at it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it was closed
            stream.reconfigure(errors="backslashreplace")


class _ReaderGone(Exception):
    """The program that read our output has ended."""


class Door(TyperGroup):
    """The command group that turns every expected error into `error: …` on stderr and its exit code."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run a command line and exit. A bug leaves as the exception it is: a traceback and exit code 1."""
        take_any_text()
        try:
            with stopping.honoured(say):
                code = super().main(*args, standalone_mode=False, **kwargs)
                if sys.stdout:
                    sys.stdout.flush()
        except RlhfjaxError as error:
            code = fail(str(error), error.exit_code)
        except _UsageError as error:
            code = _usage(error)
        except (_ReaderGone, BrokenPipeError):
            # Python flushes stdout once more at exit; what is left goes nowhere instead of failing again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = _READER_GONE
        if code == 130:
            typer.echo("interrupted", err=True)
        sys.exit(code or 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _ReaderGone from None


def fail(message: str, code: int) -> int:
    """Says what went wrong; returns the exit code."""
    typer.echo(f"error: {printable(stores.named(message))}", err=True)
    return code


def _usage(error: Any) -> int:
    """The message and where help is; a bare `rlhfjax` shows the help itself."""
    context = error.ctx
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(context.get_help(), err=True)
        return 2
    hint = f"\nsee: {context.command_path} --help" if context else ""
    return fail(f"{error.format_message().rstrip('.')}{hint}", 2)
