"""`griffin-offload chat`: a conversation in the terminal, or one message per line of standard input."""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, get_args

from griffin_offload.cli.generation import PrefillBar, add_generation_options, sampling_of
from griffin_offload.cli.options import add_model_options, add_run_options, load_options, model_of, quiet_libraries
from griffin_offload.cli.plan import plan_lines
from griffin_offload.cli.prompt_cache import adopt_saved
from griffin_offload.config import LoadConfig, Overflow
from griffin_offload.errors import GriffinError, UsageError
from griffin_offload.units import format_bytes

if TYPE_CHECKING:
    from griffin_offload.runtime.session import ChatSession, Reply

_HELP = """\
/undo        take the last question and its answer back
/reset       begin anew
/stats       figures of the conversation
/save FILE   write the conversation, KV cache included
/load FILE   go on with a saved one
/help        this list
/exit        leave, like Ctrl-D; Ctrl-C stops an answer
//...        a message that begins with one slash"""


def add_parser(commands: Any) -> None:
    """Add the command to the main parser."""
    parser = commands.add_parser(
        "chat",
        help="hold a conversation",
        description="Every turn streams only its own tokens. Commands begin with a slash: /help lists them. When "
        "standard input is no terminal, each line is a message, and the first error ends the program.",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message, for models with a chat template")
    parser.add_argument("--raw", action="store_true", help="no chat template: texts are put one after the other")
    parser.add_argument("--load", type=Path, metavar="FILE", help="go on with a conversation that /save wrote")
    parser.add_argument(
        "--on-overflow",
        choices=get_args(Overflow),
        default="error",
        help="when the context is full: refuse the message, or drop the oldest turns (default: error)",
    )
    add_generation_options(parser)
    add_model_options(parser)
    add_run_options(parser)
    parser.set_defaults(command=chat)


def chat(arguments: argparse.Namespace) -> int:
    """Read messages and commands until the end; answers go to stdout as they come, all else to stderr."""
    sampling, options = sampling_of(arguments), load_options(arguments) | {"keep_prompts": True}
    quiet_libraries()
    if arguments.load is not None:
        adopt_saved(arguments.load, options)
    LoadConfig(**options)  # a bad flag is reported before any weight is looked at
    from griffin_offload.runtime.model import GriffinModel

    model = GriffinModel.from_pretrained(model_of(arguments), **options)
    session = model.chat_session(
        system=arguments.system,
        raw=arguments.raw,
        overflow=arguments.on_overflow,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        **sampling,
    )
    if arguments.load is not None:
        session.load(arguments.load)
    if arguments.verbose:
        print("\n".join(plan_lines(model.plan)), file=sys.stderr)
    return _Terminal(session, arguments).run()


class _Terminal:
    """Where a conversation is held."""

    def __init__(self, session: "ChatSession", arguments: argparse.Namespace) -> None:
        self._session, self._arguments = session, arguments
        self._interactive = sys.stdin.isatty()
        self._streamed_bytes = self._passes = self._answered = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: _say(_HELP),
            "/undo": self._undo,
            "/reset": self._reset,
            "/stats": self._stats,
            "/save": self._save,
            "/load": self._load,
        }

    def run(self) -> int:
        plan = self._session.model.plan
        if not self._arguments.quiet:
            templated = "" if self._session.templated else "; no chat template: texts are put one after the other"
            _say(f"{plan.precision}, density {plan.density:.2f}, context {plan.context_tokens} tokens{templated}")
        for line in self._lines():
            if line in ("/exit", "/quit"):
                break
            try:
                self._take(line)
            except GriffinError as error:
                if not self._interactive:
                    raise
                _say(f"griffin-offload: error: {error}")
        return 0

    def _lines(self) -> Iterator[str]:
        """Messages and commands, stripped, without empty ones."""
        if self._interactive:
            import readline  # noqa: F401 - input() edits lines with it
        while True:
            try:
                line = input("> ") if self._interactive else input()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                _say("\n/exit or Ctrl-D to leave")
                continue
            except UnicodeDecodeError as error:
                raise UsageError(f"standard input is not UTF-8: {error}") from error
            if line.strip():
                yield line.rstrip() if line[0] != "/" else line.strip()

    def _take(self, line: str) -> None:
        if not line.startswith("/") or line.startswith("//"):
            self._answer(line.removeprefix("/") if line.startswith("//") else line)
            return
        name, _, argument = line.partition(" ")
        if name not in self._commands:
            raise UsageError(f"no command {name}: /help lists them, //... is a message")
        self._commands[name](argument.strip())

    def _answer(self, text: str) -> None:
        from transformers import TextStreamer

        model, quiet = self._session.model, self._arguments.quiet or self._arguments.json
        streamer = None
        if not self._arguments.json:
            streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
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
        if self._arguments.json:
            print(json.dumps(_as_json(reply)), flush=True)
        elif not quiet:
            _say("\n".join(self._figures(reply)))

    def _count(self, reply: "Reply") -> None:
        report = reply.report
        self._answered += 1
        self._streamed_bytes += report.prefill_streamed_bytes + report.decode_streamed_bytes
        self._passes += report.drafting.passes if report.drafting else 0

    def _figures(self, reply: "Reply") -> Iterator[str]:
        report, known = reply.report, len(self._session.context.tokens)
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

    def _undo(self, _: str) -> None:
        _say("(took the last question and its answer back)" if self._session.undo() else "(nothing to take back)")

    def _reset(self, _: str) -> None:
        self._session.reset()
        _say("(begun anew)")

    def _save(self, argument: str) -> None:
        path = _path(argument, "/save")
        self._session.save(path)
        _say(f"(saved to {path}, {format_bytes(path.stat().st_size)})")

    def _load(self, argument: str) -> None:
        path = _path(argument, "/load")
        self._session.load(path)
        _say(f"(loaded {path}: {self._session.turns} turns, {len(self._session.context.tokens)} tokens)")

    def _stats(self, _: str) -> None:
        session, model = self._session, self._session.model
        passes = f" ({self._passes} passes between tokens)" if self._passes else ""
        report = model.last_report
        peak = f", peak {format_bytes(report.peak_device_bytes)}" if report is not None else ""
        _say(
            f"turns {session.turns} ({self._answered} answered here)\n"
            f"context {len(session.context.tokens)} of {model.plan.context_tokens} tokens\n"
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


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise UsageError(f"{command} needs the name of a file")
    return Path(argument).expanduser()


def _as_json(reply: "Reply") -> dict[str, Any]:
    return {
        "text": reply.text,
        "finish": reply.finish,
        "dropped_messages": reply.dropped_messages,
        "report": reply.report.to_json(),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
