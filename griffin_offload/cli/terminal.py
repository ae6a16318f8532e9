"""What commands share of the terminal: which prompt and its tokens, the answer as it is printed, how far a pass is."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin_offload.cli.options import check_utf8, thinking_flag
from griffin_offload.demo import PROMPT
from griffin_offload.errors import SavedContextError, UsageError, unreadable, why_unusable
from griffin_offload.serving.text_stream import Detokeniser, StopHolder

if TYPE_CHECKING:
    from torch import Tensor

    from griffin_offload.checkpoint.base import Checkpoint
    from griffin_offload.engine.model import GriffinModel
    from griffin_offload.kv_cache.sequence import Context
    from griffin_offload.transformers_api import Tokenizer


def prompt_text(arguments: argparse.Namespace) -> str:
    """The prompt that was asked for, or the demo's; UsageError for none, two, or one that cannot be read."""
    if arguments.prompt is not None and arguments.prompt_file is not None:
        raise UsageError("two prompts: give either an argument or --prompt-file")
    if arguments.prompt_file is not None:
        try:
            from griffin_offload.checkpoint.files import read_text

            text: str = read_text(arguments.prompt_file)
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the name
            why = why_unusable(arguments.prompt_file, error)
            raise UsageError(f"cannot read the prompt from {arguments.prompt_file}: {why}") from error
    elif arguments.prompt == "-":
        text = _standard_input()
    elif arguments.prompt is None and arguments.model is None:
        text = PROMPT
    elif arguments.prompt is None:
        raise UsageError("no prompt: give one as an argument, with --prompt-file, or - for standard input")
    else:
        text = arguments.prompt
    if not text.strip():
        raise UsageError("the prompt is empty")
    check_utf8(text, "the prompt")
    if arguments.system is not None:
        check_utf8(arguments.system, "the system message")
    return text


def is_demos(arguments: argparse.Namespace) -> bool:
    """Whether the prompt is the demo's own, which nobody has seen."""
    return arguments.prompt is None and arguments.prompt_file is None


def _standard_input() -> str:
    from griffin_offload.checkpoint.files import decoded

    try:
        raw = getattr(sys.stdin, "buffer", None)
        return sys.stdin.read() if raw is None else decoded(raw.read(), sys.stdin.encoding)
    except ValueError as error:
        raise UsageError(f"the prompt on standard input is not UTF-8: {error}") from error


def tokenize(tokenizer: "Tokenizer", text: str, arguments: argparse.Namespace) -> "Tensor":
    """Ids [1, T], in the model's chat template where it has one and `--raw` is not given."""
    import torch

    from griffin_offload.checkpoint.tokenizer import encode

    templated = tokenizer.chat_template is not None and not arguments.raw
    thinking = getattr(arguments, "thinking", None)
    for given, flag in ((arguments.system, "--system"), (thinking, thinking_flag(thinking))):
        if given is not None and not templated:
            raise UsageError(f"{flag} needs a chat template: this model has none, or --raw turned it off")
    ids = _templated(tokenizer, text, arguments.system, thinking) if templated else encode(tokenizer, text)
    if not ids:
        raise UsageError("the tokenizer makes no token of the prompt: its files or its chat template are incomplete")
    return torch.tensor([ids], dtype=torch.long, device="cpu")


def _templated(tokenizer: "Tokenizer", text: str, system: str | None, thinking: bool | None) -> list[int]:
    from griffin_offload.checkpoint.tokenizer import encode_messages

    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    return encode_messages(tokenizer, messages, thinking=thinking)


# `run --prompt-cache FILE`: a prompt that was saved, or is to be.


def adopt_saved(path: Path, options: dict[str, object], checkpoint: "Checkpoint") -> None:
    """Make what is "auto" in `options` (`LoadConfig`'s fields) what the context saved at `path` has, and a context that
    is too small for it as large. SavedContextError if it is of another model than `checkpoint`, whose options these
    would not be."""
    from griffin_offload.kv_cache.sequence_file import options_of

    saved = options_of(path, model=checkpoint.fingerprint())
    ctx_size = saved.pop("ctx_size")
    options |= {name: value for name, value in saved.items() if options[name] == "auto"}
    if options["ctx_size"] is not None:
        options["ctx_size"] = max(options["ctx_size"], ctx_size)


class PromptCache:
    """The file of one run. SavedContextError at once when it could not be written in the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._error: SavedContextError | None = None
        try:
            self._there = path.is_file()
            absent = not path.exists()
        except OSError as error:  # a directory on the way may not be entered, or the name is too long
            raise SavedContextError(f"--prompt-cache {unreadable(path, error)}") from error
        if not (self._there or absent) or not path.parent.is_dir():
            raise SavedContextError(f"--prompt-cache {path} names no file in a directory that is there: check the name")
        if absent and not os.access(path.parent, os.W_OK):
            raise SavedContextError(
                f"--prompt-cache {path} cannot be written: {path.parent} is read-only for this user: name another place"
            )

    def adopt(self, options: dict[str, object], checkpoint: "Checkpoint") -> None:
        """Let a file that is there say what the plan would have solved: `options` are `LoadConfig`'s."""
        if self._there:
            adopt_saved(self._path, options, checkpoint)

    def arguments(self, model: "GriffinModel", tokens: "Tensor", *, exact: bool) -> dict[str, Any]:
        """What `generate` is given: a context, and what to do with it when the prompt has passed."""
        self._model = model
        if not self._there:
            return {"context": model.new_context(), "prompt_done": self._save}
        context, _ = model.load_context(self._path)
        saved = self._saved = len(context.tokens)
        self._covered = context.covered
        if context.known(tokens[0], exact=exact) == 0:
            print(
                f"griffin-offload: warning: {self._path} holds a prompt of {saved} tokens that this one does not begin "
                "with, so it is not used: delete it, or name another file to save this one",
                file=sys.stderr,
            )
        return {"context": context}

    def _save(self, context: "Context") -> None:
        try:
            self._model.save_context(context, self._path)
        except SavedContextError as error:  # the answer goes on: its prompt has been paid for
            self._error = error

    def close(self, *, quiet: bool) -> None:
        """Raise what went wrong while saving, now that the answer is there; unless `quiet`, say how much of the prompt
        was of use."""
        if self._error is not None:
            raise self._error
        report = self._model.last_report
        assert report is not None, "an answer has a report"
        if self._there and not quiet and 0 < report.cached_prompt_tokens < self._covered:
            print(
                f"note: {report.cached_prompt_tokens} of the {self._saved} tokens in {self._path} were used: behind "
                "them this prompt has others",
                file=sys.stderr,
            )


# An answer on standard output while it is generated.


class TextPrinter:
    """A streamer for `generate`: prints text as soon as its letters are complete, and a newline at the end. What is
    printed is the text of all tokens together, whatever the tokenizer does with spaces between two decodings; up to the
    first of `stops`, of which nothing is printed."""

    def __init__(self, tokenizer: "Tokenizer", stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._text: Detokeniser | None = None

    def put(self, tokens: Any) -> None:
        """The prompt first, then one or more tokens at a time."""
        if self._text is None:
            self._text, self._holder = Detokeniser(self._tokenizer), StopHolder(self._stops)
            return
        self._print("".join(self._holder.feed(self._text.feed(token)) for token in tokens.reshape(-1).tolist()))

    def end(self) -> None:
        """No more tokens come; the next is a prompt."""
        rest = self._holder.feed(self._text.flush()) + self._holder.flush() if self._text is not None else ""
        self._print(rest + "\n")
        self._text = None

    def _print(self, text: str) -> None:
        if text:
            print(text, end="", flush=True)


# How far a pass or a file is, on stderr if that is a terminal.


class Bar:
    """Vanishes when it is left, or at its end where that comes but `once`."""

    def __init__(self, title: str, unit: str = "layer", *, quiet: bool, once: bool = False) -> None:
        from tqdm import tqdm

        self._once = once
        self._bar = tqdm(
            desc=title, unit=unit, unit_scale=unit == "B", leave=False, disable=quiet or None, file=sys.stderr
        )

    def step(self, done: int, total: int) -> None:
        """So many layers or bytes are done, of so many."""
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if self._once and done == total:
            self._bar.close()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
