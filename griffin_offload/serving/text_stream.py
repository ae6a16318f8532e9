"""Tokens become text as they come, whole letters only."""

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # run and chat read this before torch is there
    from griffin_offload.transformers_api import Tokenizer

# Stop strings in a text that comes in pieces: cut at the first one, and never shown in part.


class StopHolder:
    """Lets a text through, but for what may still become one of `stops`.

    The text ends where the first of them is complete (of several that end at the same letter, the one that begins
    first), however the text is divided into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.released = 0
        """Letters let through so far."""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """What may be shown now; nothing more once a stop string was found."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(text, min(found)[1])
        return self._release(text, len(text) - self._possible(text))

    def flush(self) -> str:
        """The rest: the text has ended without a stop string."""
        return self._release(self._held, len(self._held))

    def _release(self, text: str, letters: int) -> str:
        self._held = "" if self.stopped else text[letters:]
        self.released += letters
        return text[:letters]

    def _possible(self, text: str) -> int:
        """Letters at the end of `text` that a stop string may begin with."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(text))
        for letters in range(longest, 0, -1):
            end = text[-letters:]
            if any(stop.startswith(end) for stop in self._stops):
                return letters
        return 0


# Bytes that are no UTF-8 (yet) are decoded as this.
_INCOMPLETE = "\ufffd"
# Tokens before an answer that say whether its first one begins a word: some tokenizers drop a space at the start.
_BEFORE = 5


class Detokeniser:
    """The text of an answer, token by token; special tokens have none.

    Joined, it is what the tokenizer makes of all tokens at once. With tokens `before` it is what they are followed by:
    a space in front of the first word stays. A letter may be spread over several tokens: nothing is returned until it
    is complete. Only the tokens since the last complete letter, and those of the piece before it, are decoded again.
    """

    def __init__(self, tokenizer: "Tokenizer", before: Sequence[int] = (), kept: Collection[int] = ()) -> None:
        """`kept` are special tokens that are text here, by their names."""
        self._tokenizer, self._special = tokenizer, special_ids(tokenizer) - frozenset(kept)
        self._ids = list(before[-_BEFORE:])
        self._shown = len(self._ids)

    def feed(self, token: int) -> str:
        """What `token` completes."""
        if token in self._special:
            return ""
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
        # Special tokens stand among those before the answer alone, where they are what its first word follows.
        text: str = self._tokenizer.decode(
            self._ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


@lru_cache(maxsize=4)
def special_ids(tokenizer: "Tokenizer") -> frozenset[int]:
    """Ids of the tokens that are no text of an answer."""
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def whole_text(tokenizer: "Tokenizer", tokens: Sequence[int]) -> str:
    """The text of an answer, all at once: what pieces of it make together."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def token_text(tokenizer: "Tokenizer", token: int, *, first: bool = False) -> str:
    """What `token` adds to a text, or begins one with: there some tokenizers drop a space."""
    alone: str = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if first or _INCOMPLETE in alone:
        return alone
    twice: str = tokenizer.decode([token, token], clean_up_tokenization_spaces=False)
    return twice[len(alone) :]
