"""Tokens become text as they come, whole letters only."""

from collections.abc import Sequence
from typing import Any

# Bytes that are no UTF-8 (yet) are decoded as this.
_INCOMPLETE = "\ufffd"
# Tokens before an answer that say whether its first one begins a word: some tokenizers drop a space at the start.
_BEFORE = 5


class Detokeniser:
    """The text of an answer, token by token; special tokens have none.

    A letter may be spread over several tokens: nothing is returned until it is complete. Only the tokens since the
    last complete letter, and those of the piece before it, are decoded again.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before[-_BEFORE:])
        self._shown = len(self._ids)

    def feed(self, token: int) -> str:
        """What `token` completes."""
        self._ids.append(token)
        text = self._decode(len(self._ids))
        return "" if text.endswith(_INCOMPLETE) else self._advance(text)

    def flush(self) -> str:
        """The rest, with replacement characters for bytes that never became a letter."""
        return self._advance(self._decode(len(self._ids)))

    def _advance(self, text: str) -> str:
        new = text[len(self._decode(self._shown)) :]
        if new:
            del self._ids[: self._shown]
            self._shown = len(self._ids)
        return new

    def _decode(self, end: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
