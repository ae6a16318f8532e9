"""How an answer ends: at an end of sequence, at a stop string, or at its last allowed token."""

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria

Finish = Literal["stop", "length", "interrupted"]

# Tokens that a letter may be spread over, and some that have no text of their own.
_TOKENS_PER_LETTER, _SPARE_TOKENS = 4, 8


class StopStrings(StoppingCriteria):  # type: ignore[misc]
    """Ends one sequence when its text behind the first `prompt_tokens` holds one of `stops`.

    transformers' own criterion goes through the whole vocabulary first, seconds for 262,144 words; here the last tokens
    are decoded again for each new one.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_tokens: int) -> None:
        self._tokenizer, self._stops, self._start = tokenizer, tuple(stops), prompt_tokens
        self._window = _TOKENS_PER_LETTER * max(map(len, self._stops), default=0) + _SPARE_TOKENS
        self.happened = False

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        if self._stops and not self.happened:
            tail = input_ids[0, max(self._start, input_ids.shape[1] - self._window) :]
            text = self._tokenizer.decode(tail, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            self.happened = any(stop in text for stop in self._stops)
        return torch.full((input_ids.shape[0],), self.happened, dtype=torch.bool, device=input_ids.device)


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the stop string that is complete first; of several that end there, the one that begins first."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)[1]] if found else text


def ends_of(generation_config: Any, arguments: dict[str, Any] | None = None) -> set[int]:
    """Ids that end a sequence, by the arguments of a `generate`, else by the model's config."""
    ends = (arguments or {}).get("eos_token_id", generation_config.eos_token_id)
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)


def finish_of(answer: Tensor, most_tokens: int, ends: Collection[int], *, stopped: bool) -> Finish:
    """Why the `answer` [T] is over; `stopped`: by a stop string. Also with its last allowed token it may have ended."""
    full = answer.numel() >= most_tokens and not stopped
    return "length" if full and int(answer[-1]) not in ends else "stop"
