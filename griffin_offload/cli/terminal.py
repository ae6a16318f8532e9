"""Where a conversation is held: a terminal, in which Ctrl-C stops an answer, or a pipe, which the first error ends."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from griffin_offload.cli.generation import PrefillBar, check_utf8, cut_note
from griffin_offload.errors import GriffinError, UsageError, as_line
from griffin_offload.runtime.session import ChatSession, Reply
from griffin_offload.units import format_bytes

_HELP = """\
/undo        take the last question and its answer back
/reset       begin anew
/stats       figures of the conversation
/save FILE   write the conversation, KV cache included
/load FILE   go on with a saved one
/help        this list
/exit        leave, like Ctrl-D; Ctrl-C stops an answer
//...        a message that begins with one slash"""


class Terminal:
    """Reads messages and commands; answers go to stdout, all else to stderr."""

    def __init__(self, session: ChatSession, *, stops: Sequence[str], quiet: bool, as_json: bool) -> None:
        self._session, self._stops, self._quiet, self._as_json = session, stops, quiet, as_json
        self._interactive = sys.stdin.isatty()
        self._leaving = False
        self._streamed_bytes = self._passes = self._answered = 0
        self._commands: dict[str, Callable[[], None]] = {
            "/help": lambda: _say(_HELP),
            "/undo": self._undo,
            "/reset": self._reset,
            "/stats": self._stats,
            "/exit": self._exit,
        }
        self._file_commands: dict[str, Callable[[Path], None]] = {"/save": self._save, "/load": self._load}

    def run(self) -> int:
        """Until the end of input, or /exit; the exit code."""
        if self._interactive:
            import readline  # noqa: F401 - input() edits lines with it
        while not self._leaving:
            try:
                self._turn()
            except GriffinError as error:
                if not self._interactive:
                    raise
                _say(f"griffin-offload: error: {as_line(error)}")
            except KeyboardInterrupt:  # between answers: while a file is read, for example
                if not self._interactive:
                    raise
                _say("\n(interrupted)")
        return 0

    def _turn(self) -> None:
        """One line of input."""
        try:
            line = self._read()
        except EOFError:
            self._leaving = True
            return
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            _say("\n/exit or Ctrl-D to leave")
            return
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input is not UTF-8: {error}") from error
        if line.startswith("/") and not line.startswith("//"):
            self._obey(line)
        elif line.strip():
            self._answer((line.removeprefix("/") if line.startswith("//") else line).rstrip())

    def _read(self) -> str:
        if not self._interactive:
            return input().removeprefix("\ufeff")  # the byte order mark of a file that is piped in
        if sys.stdout.isatty():
            return input("> ")
        print("> ", end="", file=sys.stderr, flush=True)  # input() would write it among the answers
        return input()

    def _obey(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if name in self._file_commands:
            if not argument:
                raise UsageError(f"{name} needs the name of a file")
            # os.path's, unlike Path's own, leaves an unknown ~user as it is.
            self._file_commands[name](Path(os.path.expanduser(argument)))
        elif name not in self._commands:
            raise UsageError(f"no command {name}: /help lists them, //... is a message")
        elif argument:
            raise UsageError(f"{name} stands alone: leave out {argument!r}")
        else:
            self._commands[name]()

    def _answer(self, text: str) -> None:
        from griffin_offload.cli.streaming import TextPrinter

        check_utf8(text, "the message")
        model, quiet = self._session.model, self._quiet or self._as_json
        streamer = None
        if not self._as_json:
            streamer = TextPrinter(model.tokenizer, self._stops)
        try:
            # In a script Ctrl-C ends the program; here it ends the answer.
            with PrefillBar(model, quiet=quiet), _Interrupts(catch=self._interactive) as interrupts:
                reply = self._session.send(text, streamer=streamer, interrupted=interrupts.asked)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            _say("\n(cancelled: the message was not added)")
            return
        self._count(reply)
        if self._as_json:
            print(json.dumps(_as_json(reply)), flush=True)
        elif not quiet:
            _say("\n".join(self._figures(reply)))

    def _count(self, reply: Reply) -> None:
        report = reply.report
        self._answered += 1
        self._streamed_bytes += report.prefill_streamed_bytes + report.decode_streamed_bytes
        self._passes += report.drafting.passes if report.drafting else 0

    def _figures(self, reply: Reply) -> Iterator[str]:
        report, known = reply.report, self._session.used_tokens
        if reply.dropped_messages:
            yield f"(context full: the oldest {reply.dropped_messages} messages were dropped)"
        if reply.finish == "interrupted":
            yield "(interrupted: kept as far as it came)"
        streamed = format_bytes(report.prefill_streamed_bytes + report.decode_streamed_bytes)
        yield (
            f"[{report.prompt_tokens} tok in {report.prefill_s:.2f} s, {report.generated_tokens} tok at "
            f"{report.decode_tokens_per_s:.1f} tok/s, streamed {streamed}, activation kept "
            f"{report.activation_kept:.2f}, context {known} of {self._session.model.plan.context_tokens}]"
        )
        if reply.finish == "length":
            full = f"the answer was cut at {reply.most_tokens} tokens, the context is full: /reset, or raise --ctx-size"
            yield f"({full if reply.shortened else cut_note(reply.most_tokens)})"

    def _exit(self) -> None:
        self._leaving = True

    def _undo(self) -> None:
        _say("(took the last question and its answer back)" if self._session.undo() else "(nothing to take back)")

    def _reset(self) -> None:
        self._session.reset()
        _say("(begun anew)")

    def _save(self, path: Path) -> None:
        self._session.save(path)
        _say(f"(saved to {path}, {format_bytes(path.stat().st_size)})")

    def _load(self, path: Path) -> None:
        self._session.load(path)
        _say(f"(loaded {path}: {self._session.turns} turns, {self._session.used_tokens} tokens)")

    def _stats(self) -> None:
        session, model = self._session, self._session.model
        passes = f" ({self._passes} passes between tokens)" if self._passes else ""
        report = model.last_report
        peak = f", peak {format_bytes(report.peak_device_bytes)}" if report is not None else ""
        _say(
            f"turns {session.turns} ({self._answered} answered here)\n"
            f"context {session.used_tokens} of {model.plan.context_tokens} tokens\n"
            f"streamed {format_bytes(self._streamed_bytes)}{passes}\n"
            f"resident {format_bytes(model.resident_bytes)}{peak} of {format_bytes(model.plan.budget_bytes)}"
        )


class _Interrupts:
    """Ctrl-C during an answer: while tokens come it ends the answer, before the first one, or again, the turn."""

    def __init__(self, *, catch: bool) -> None:
        self._catch = catch
        self._decoding = self._pressed = False

    def asked(self) -> bool:
        """Asked after every token: whether to stop."""
        self._decoding = True
        return self._pressed

    def __enter__(self) -> "_Interrupts":
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, _: int, __: FrameType | None) -> None:
        if not self._catch or not self._decoding or self._pressed:
            raise KeyboardInterrupt
        self._pressed = True


def _as_json(reply: Reply) -> dict[str, Any]:
    return {
        "text": reply.text,
        "finish_reason": reply.finish,
        "dropped_messages": reply.dropped_messages,
        "report": reply.report.to_json(),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
