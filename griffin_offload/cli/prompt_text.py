"""What run and inspect share: which prompt, and its tokens."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from griffin_offload.cli.generation import check_utf8, thinking_flag
from griffin_offload.demo import PROMPT
from griffin_offload.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from torch import Tensor


def prompt_text(arguments: argparse.Namespace) -> str:
    """The prompt that was asked for, or the demo's; UsageError for none, two, or one that cannot be read."""
    if arguments.prompt is not None and arguments.prompt_file is not None:
        raise UsageError("two prompts: give either an argument or --prompt-file")
    if arguments.prompt_file is not None:
        try:
            from griffin_offload.weights.text_file import read_text

            text: str = read_text(arguments.prompt_file)
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the name
            raise UsageError(f"cannot read the prompt from {arguments.prompt_file}: {error}") from error
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
    from griffin_offload.weights.text_file import decoded

    try:
        raw = getattr(sys.stdin, "buffer", None)
        return sys.stdin.read() if raw is None else decoded(raw.read(), sys.stdin.encoding)
    except ValueError as error:
        raise UsageError(f"the prompt on standard input is not UTF-8: {error}") from error


def tokenize(tokenizer: Any, text: str, arguments: argparse.Namespace) -> "Tensor":
    """Ids [1, T], in the model's chat template where it has one and `--raw` is not given."""
    import torch

    from griffin_offload.runtime.prompts import encode

    templated = tokenizer.chat_template is not None and not arguments.raw
    thinking = getattr(arguments, "thinking", None)
    for given, flag in ((arguments.system, "--system"), (thinking, thinking_flag(thinking))):
        if given is not None and not templated:
            raise UsageError(f"{flag} needs a chat template: this model has none, or --raw turned it off")
    ids = _templated(tokenizer, text, arguments.system, thinking) if templated else encode(tokenizer, text)
    if not ids:
        raise UsageError("the prompt is empty: the tokenizer makes no token of it")
    return torch.tensor([ids], dtype=torch.long, device="cpu")


def _templated(tokenizer: Any, text: str, system: str | None, thinking: bool | None) -> list[int]:
    from griffin_offload.runtime.prompts import encode_messages

    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    try:
        return encode_messages(tokenizer, messages, thinking=thinking)
    except CheckpointError as error:  # a template is a program of the checkpoint's author
        raise CheckpointError(f"the model's chat template fails, --raw turns it off: {error}") from error
