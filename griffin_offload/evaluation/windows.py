"""Windows of a text: where prompts and their continuations are cut."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from griffin_offload.config import WindowStart
from griffin_offload.errors import UsageError
from griffin_offload.weights.text_file import read_text

SEPARATOR = "<|endoftext|>"
"""Between the documents of a text file."""


def read_documents(path: Path) -> list[str]:
    """The documents of a text file; UsageError for a file that cannot be read."""
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise UsageError(f"cannot read the text {path}: {error}") from error
    pieces = [piece.strip() for piece in text.split(SEPARATOR)]
    return [piece for piece in pieces if piece]


def tokenize(documents: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of every document, without what a tokenizer puts around a text: windows are cut out of it."""
    return [tokenizer(document, add_special_tokens=False)["input_ids"] for document in documents]


def first_tokens(config: Any, tokenizer: Any) -> list[int]:
    """What every window starts with: the BOS token for Gemma, which is lost without it, nothing for others, as in the
    paper."""
    return [tokenizer.bos_token_id] if config.model_type.startswith("gemma") else []


def take_windows(
    documents: list[list[int]], tokens: int, count: int, start: WindowStart, first: Sequence[int] = ()
) -> list[Tensor]:
    """`count` windows of `tokens` ids: spread evenly over the text, or at the starts of documents. Each begins with
    `first`. UsageError, with the numbers, when the text is too short."""
    taken = _cut(documents, tokens - len(first), count, start)
    return [torch.cat([torch.tensor(first, dtype=torch.long, device="cpu"), ids]) for ids in taken]


def _cut(documents: list[list[int]], tokens: int, count: int, start: WindowStart) -> list[Tensor]:
    if start == "documents":
        found = [ids[:tokens] for ids in documents if len(ids) >= tokens][:count]
        if len(found) < count:
            raise UsageError(
                f"{len(found)} of {len(documents)} documents have {tokens} tokens, {count} windows were asked for: "
                "fewer --windows, shorter ones, or --window-start even"
            )
        return [torch.tensor(ids, dtype=torch.long, device="cpu") for ids in found]
    text = torch.tensor([token for ids in documents for token in ids], dtype=torch.long, device="cpu")
    if text.numel() < tokens:
        raise UsageError(f"the text has {text.numel()} tokens, a window {tokens}: a longer text or shorter windows")
    return [text[at : at + tokens] for at in _even_starts(text.numel() - tokens, count)]


def _even_starts(last: int, count: int) -> Iterator[int]:
    if last + 1 < count:
        raise UsageError(f"the text has {last + 1} places for a window, {count} were asked for: fewer --windows")
    yield from (round(number * last / max(count - 1, 1)) for number in range(count))
