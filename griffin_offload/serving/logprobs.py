"""Log probabilities of tokens, as the model gave them: before penalties, bans, temperature and top_p. And what a client
adds to some, or takes from those that were there."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from transformers import LogitsProcessor

from griffin_offload.engine.generation import LogitsObserver
from griffin_offload.serving.text_stream import special_ids, token_text
from griffin_offload.transformers_api import Tokenizer

# Of a token that the model itself rules out; JSON knows no infinity.
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


class LogprobRecorder(LogitsObserver):
    """Sees the logits of every token, and remembers the last ones. `begins`: the answer's text has nothing before it,
    so that its first token may lose a space."""

    def __init__(self, tokenizer: Tokenizer, alternatives: int, *, begins: bool = False) -> None:
        self._tokenizer, self._alternatives, self._first = tokenizer, alternatives, begins
        self._logits: Tensor | None = None

    def observe(self, logits: Tensor) -> None:
        self._logits = logits

    def record(self, token: int, offset: int) -> TokenLogprob:
        """`token` was drawn with the last logits, with `offset` letters before it."""
        assert self._logits is not None, "logits come before tokens"
        logprobs = self._logits[0].float().log_softmax(-1)
        values, ids = logprobs.topk(min(self._alternatives, logprobs.numel()))
        best = zip(ids.tolist(), values.tolist(), strict=True)
        alternatives = tuple(self._named(i, value) for i, value in best)
        named = replace(self._named(token, float(logprobs[token])), alternatives=alternatives, offset=offset)
        self._first = self._first and token in special_ids(self._tokenizer)
        return named

    def _named(self, token: int, logprob: float) -> TokenLogprob:
        text = token_text(self._tokenizer, token, first=self._first)
        spelt: tuple[int, ...] | None = ()  # special tokens have a name and no text
        if token not in special_ids(self._tokenizer):
            begins = self._first and "\ufffd" not in text
            spelt = tuple(text.encode()) if begins else token_bytes(self._tokenizer, token, text)
        return TokenLogprob(text, spelt, max(logprob, _LEAST))


class LogitBias(LogitsProcessor):  # type: ignore[misc]
    """Adds to the scores of some tokens."""

    def __init__(self, bias: tuple[tuple[int, float], ...]) -> None:
        self._tokens, self._added = zip(*bias, strict=True)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        added = torch.tensor(self._added, dtype=scores.dtype, device=scores.device)
        places = torch.tensor(self._tokens, dtype=torch.long, device=scores.device)
        return scores.index_add(1, places, added.expand(scores.shape[0], -1))


class CountPenalties(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's two penalties: tokens of the answer lose `presence` once, and `frequency` as often as they are there.

    transformers has neither. The prompt, the first `prompt_tokens`, does not count.
    """

    def __init__(self, prompt_tokens: int, presence: float, frequency: float) -> None:
        self._prompt_tokens, self._presence, self._frequency = prompt_tokens, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        answer = input_ids[:, self._prompt_tokens :]
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


def token_bytes(tokenizer: Tokenizer, token: int, text: str) -> tuple[int, ...] | None:
    """The bytes that `token` adds to a text, also where they are a part of a letter; `text` is what it decodes to."""
    if "\ufffd" not in text:
        return tuple(token_text(tokenizer, token).encode())
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
