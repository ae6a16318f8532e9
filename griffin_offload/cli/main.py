"""The entry point: parse, run one command, turn errors into one line and an exit code."""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from griffin_offload import __version__
from griffin_offload.errors import (
    GriffinError,
    OutOfMemory,
    UsageError,
    as_line,
    limit_reached,
    memory_refused,
    why_unusable,
)

_INTERRUPTED = 130
COMMANDS = ("run", "chat", "serve", "batch", "models", "pull", "plan", "convert", "export", "bench", "eval", "inspect")
"""Each is a module beside this one."""


class _Help(argparse.HelpFormatter):
    """Says the default of every option that has one and does not name it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        if not text or "default" in text or default in (None, False, argparse.SUPPRESS) or not action.option_strings:
            return text
        shown = ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})" if shown else text


class _Parser(argparse.ArgumentParser):
    """The parser of this program and, by way of its subparsers, of every command."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": _Help, **settings})
        # "-5GB" is a value, though a wrong one: no option of ours begins with a digit. Python 3.14 takes it so unasked.
        self._negative_number_matcher = re.compile(r"-\.?\d")
        self.register("type", int, _whole_number)
        self.register("type", float, _number)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but what a command does not know is refused here, with its own usage and not the program's."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """As argparse's, but what is wrong with one option's value is one line, as all other errors: it names
        the option and the remedy, and a screen of usage would hide them."""
        option = message.removeprefix("argument ")
        if option == message or not option.startswith("-"):
            super().error(message)
        if option.endswith("expected one argument"):
            option += ": write --option=VALUE where the value begins with a dash"
        self.exit(UsageError.exit_code, f"griffin-offload: error: {as_line(UsageError(option))}\n")


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number: write for example 8") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number: write for example 0.5") from None


def build_parser(commands: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of `commands`; imports no torch."""
    parser = _Parser(
        prog="griffin-offload",
        description="Run language models larger than the device: each prompt streams the weights once and keeps the "
        "feed-forward neurons it uses; generation then runs fully on the device.",
    )
    parser.add_argument("--version", action="version", version=f"griffin-offload {__version__}")
    parsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in commands:
        import_module(f"griffin_offload.cli.{command}").add_parser(parsers)
    return parser


def _warn(message: Warning | str) -> None:
    print(f"griffin-offload: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _print_any_letter() -> None:
    """Letters that standard output's encoding lacks are written as \\uXXXX, as Python does on standard error: an
    answer may hold any, and a redirected output on Windows, or a terminal of another age, does not."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None and sys.stdout.errors in ("strict", "surrogateescape"):
        reconfigure(errors="backslashreplace")


def _said(error: Exception) -> str:
    """Of the machine's troubles: what could not be used, why, and what to do."""
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)):
        path = Path(os.fsdecode(error.filename))
        return as_line(GriffinError(f"{path} cannot be used: {why_unusable(path, error, 'use')}"))
    return f"{type(error).__name__}: {as_line(error)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 runtime, 2 usage, 3 does not fit, 4 model, 130 Ctrl-C."""
    _print_any_letter()
    words = sys.argv[1:] if arguments is None else arguments
    parsed = build_parser(words[:1] if words and words[0] in COMMANDS else COMMANDS).parse_args(words)
    parsed.alone = arguments is None  # the process is this program
    # Warnings are news for the user, one line each, not for the author of a Python file.
    warnings.showwarning = lambda message, *_: _warn(message)
    try:
        code: int = parsed.command(parsed)
        sys.stdout.flush()
        return code
    except GriffinError as error:
        limit = limit_reached(error)  # what could not be read for want of one is not to blame
        print(f"griffin-offload: error: {as_line(error) if limit is None else limit}", file=sys.stderr)
        return error.exit_code if limit is None else GriffinError.exit_code
    except KeyboardInterrupt:
        print("\ngriffin-offload: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`| head`); let nothing more be written to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, MemoryError, RuntimeError) as error:  # the machine's troubles: a full disk, a lost mount
        limit = limit_reached(error)
        if limit is not None:
            print(f"griffin-offload: error: {limit}", file=sys.stderr)
            return GriffinError.exit_code
        if isinstance(error, RuntimeError) and not memory_refused(error):
            raise  # a bug of ours
        print(f"griffin-offload: error: {_said(error)}", file=sys.stderr)
        return OutOfMemory.exit_code if memory_refused(error) else GriffinError.exit_code
