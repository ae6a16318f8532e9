"""Log probabilities of tokens, as the model gave them: before temperature and top_p."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor

# Of a token that the checkpoint's generation config forbids; JSON knows no infinity.
_LEAST = -9999.0
_BYTE_TOKEN_LETTERS = len("<0x00>")


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer."""

    text: str
    bytes: tuple[int, ...] | None
    """None where the tokenizer does not say."""
    logprob: float
    alternatives: tuple["TokenLogprob", ...] = ()
    """The likeliest tokens, this one among them or not."""
    offset: int = 0
    """Letters of the answer in front of it."""


class LogprobRecorder(LogitsProcessor):  # type: ignore[misc]
    """Sees the scores of every token before they are changed for sampling, and remembers the last ones."""

    def __init__(self, tokenizer: Any, alternatives: int) -> None:
        self._tokenizer, self._alternatives = tokenizer, alternatives
        self._scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._scores = scores
        return scores

    def record(self, token: int, offset: int) -> TokenLogprob:
        """`token` was drawn from the last scores, with `offset` letters before it."""
        assert self._scores is not None, "scores come before tokens"
        logprobs = self._scores[0].float().log_softmax(-1)
        values, ids = logprobs.topk(min(self._alternatives, logprobs.numel()))
        best = zip(ids.tolist(), values.tolist(), strict=True)
        alternatives = tuple(self._named(i, value) for i, value in best)
        return replace(self._named(token, float(logprobs[token])), alternatives=alternatives, offset=offset)

    def _named(self, token: int, logprob: float) -> TokenLogprob:
        text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return TokenLogprob(text, token_bytes(self._tokenizer, token, text), max(logprob, _LEAST))


def token_bytes(tokenizer: Any, token: int, text: str) -> tuple[int, ...] | None:
    """The bytes that `token` stands for, also where they are a part of a letter; `text` is what it decodes to."""
    if "\ufffd" not in text:
        return tuple(text.encode())
    name = tokenizer.convert_ids_to_tokens(token)
    if len(name) == _BYTE_TOKEN_LETTERS and name.startswith("<0x"):
        return (int(name[3:5], 16),)
    letters = _byte_letters()
    return tuple(letters[letter] for letter in name) if all(letter in letters for letter in name) else None


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes: printable ones as they are, the others from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
