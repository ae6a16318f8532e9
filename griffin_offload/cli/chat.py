"""`griffin-offload chat`: a conversation in the terminal, or one message per line of standard input."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, get_args

from griffin_offload.cli.options import (
    Commands,
    add_generation_options,
    add_model_options,
    add_run_options,
    check_utf8,
    cut_note,
    heavy_imports,
    load_options,
    model_of,
    quiet_libraries,
    sampling_of,
    stops_of,
    thinking_flag,
)
from griffin_offload.cli.plan import plan_lines
from griffin_offload.cli.terminal import Bar, adopt_saved
from griffin_offload.config import ChatConfig, LoadConfig, Overflow
from griffin_offload.errors import GriffinError, UsageError, as_line
from griffin_offload.units import format_bytes

if TYPE_CHECKING:
    from griffin_offload.engine.chat import ChatSession, Reply
    from griffin_offload.transformers_api import Tokenizer


# Where a conversation is held: a terminal, in which Ctrl-C stops an answer, or a pipe, which the first error ends.


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

    def __init__(self, session: "ChatSession", *, stops: Sequence[str], quiet: bool, as_json: bool) -> None:
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
        from griffin_offload.cli.terminal import TextPrinter

        check_utf8(text, "the message")
        model, quiet = self._session.model, self._quiet or self._as_json
        streamer = None
        if not self._as_json:
            streamer = TextPrinter(model.tokenizer, self._stops)
        try:
            # In a script Ctrl-C ends the program; here it ends the answer.
            with (
                Bar("prefill", quiet=quiet, once=True) as bar,
                Interrupts(catch=self._interactive) as interrupts,
            ):
                model.progress = bar.step
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

    def _count(self, reply: "Reply") -> None:
        report = reply.report
        self._answered += 1
        self._streamed_bytes += report.prefill_streamed_bytes + report.decode_streamed_bytes
        self._passes += report.drafting.passes if report.drafting else 0

    def _figures(self, reply: "Reply") -> Iterator[str]:
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


class Interrupts:
    """Ctrl-C during an answer: while tokens come it ends the answer, before the first one, or again, the turn."""

    def __init__(self, *, catch: bool) -> None:
        self._catch = catch
        self._decoding = self._pressed = False

    def asked(self) -> bool:
        """Asked after every token: whether to stop."""
        self._decoding = True
        return self._pressed

    def __enter__(self) -> "Interrupts":
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


def _as_json(reply: "Reply") -> dict[str, Any]:
    return {
        "text": reply.text,
        "finish_reason": reply.finish,
        "dropped_messages": reply.dropped_messages,
        "report": reply.report.to_json(),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def add_parser(commands: Commands) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser(
        "chat",
        help="hold a conversation",
        description="Every turn streams only its own tokens. Commands begin with a slash: /help lists them. When "
        "standard input is no terminal, each line is a message, and the first error ends the program with its exit "
        "code.",
        epilog="example: griffin-offload chat -m ./model --max-gpu-mem 12GB",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message, for models with a chat template")
    parser.add_argument("--raw", action="store_true", help="no chat template: texts are put one after the other")
    parser.add_argument("--load", type=Path, metavar="FILE", help="go on with a conversation that /save wrote")
    parser.add_argument(
        "--on-overflow",
        choices=get_args(Overflow),
        default=ChatConfig.on_overflow,
        help="when the context is full: refuse the message, or drop the oldest turns until -n tokens, or a quarter of "
        f"the context, are free (default: {ChatConfig.on_overflow})",
    )
    add_generation_options(parser, ChatConfig.max_new_tokens)
    add_model_options(parser, json="print each turn as one JSON object")
    add_run_options(parser)
    parser.set_defaults(command=chat)


def chat(arguments: argparse.Namespace) -> int:
    """Read messages and commands until the end; answers go to stdout as they come, all else to stderr."""
    sampling, options = sampling_of(arguments), load_options(arguments) | {"keep_prompts": True}
    stops = stops_of(arguments)
    _check_conversation(arguments)
    LoadConfig(**options)  # a bad flag is reported before any file is looked at
    with heavy_imports():
        from griffin_offload.checkpoint.registry import open_checkpoint
        from griffin_offload.engine.model import GriffinModel
        from griffin_offload.kv_cache.sequence_file import read_notes

    quiet_libraries()
    if arguments.load is not None:
        read_notes(arguments.load)  # a file that is none is told before the model is looked for
    checkpoint = open_checkpoint(model_of(arguments), offline=arguments.offline, adapter=arguments.adapter)
    if arguments.load is not None:
        adopt_saved(arguments.load, options, checkpoint)
    tokenizer = checkpoint.tokenizer()
    _check_template(tokenizer, arguments)
    model = GriffinModel.from_pretrained(checkpoint.path, **options)
    model.tokenizer = tokenizer
    session = model.chat_session(
        system=arguments.system,
        raw=arguments.raw,
        thinking=arguments.thinking,
        stop_strings=stops,
        overflow=arguments.on_overflow,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        **sampling,
    )
    if arguments.load is not None:
        session.load(arguments.load)
    if arguments.verbose:
        print("\n".join(plan_lines(model.plan)), file=sys.stderr)
    if not arguments.quiet:
        print(_introduction(session, arguments), file=sys.stderr, flush=True)
    return Terminal(session, stops=stops, quiet=arguments.quiet, as_json=arguments.json).run()


def _check_conversation(arguments: argparse.Namespace) -> None:
    """UsageError for flags that would do nothing, and without standard input, before anything is loaded."""
    if sys.stdin is None:
        raise UsageError("standard input is closed: messages come from there")
    for given, flag in ((arguments.system, "--system"), (arguments.thinking, thinking_flag(arguments.thinking))):
        if given is not None and arguments.raw:
            raise UsageError(f"{flag} needs a chat template, and --raw turns it off: leave one of them out")
    if arguments.system is not None:
        check_utf8(arguments.system, "the system message")
    if arguments.load is not None and (arguments.system is not None or arguments.raw):
        flag = "--raw" if arguments.raw else "--system"
        raise UsageError(f"a saved conversation has its own beginning: leave out {flag} or --load")


def _check_template(tokenizer: "Tokenizer", arguments: argparse.Namespace) -> None:
    """UsageError for flags that the model's chat template has no use for."""
    from griffin_offload.checkpoint.tokenizer import thinking_switches

    if arguments.system is not None and tokenizer.chat_template is None:
        raise UsageError("--system needs a chat template, and this model has none: leave it out")
    if arguments.thinking is not None:
        thinking_switches(tokenizer)


def _introduction(session: "ChatSession", arguments: argparse.Namespace) -> str:
    from griffin_offload.kv_cache.kv_cache import why_not_back

    plan = session.model.plan
    notes = "" if session.templated else "; no chat template: texts are put one after the other"
    if session.context is None:
        notes += f"; every turn reads the whole conversation: {why_not_back(session.model.model.config)}"
    return (
        f"{arguments.model or 'the embedded demo'}: {plan.in_words}, density {plan.density:.2f}, context "
        f"{plan.context_tokens} tokens, budget {format_bytes(plan.budget_bytes)}{notes}"
    )
