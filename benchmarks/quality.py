"""What a variant predicts on real text, teacher-forced, and how far that is from the dense 16-bit model.

W windows, P prompt tokens, G generated tokens, V vocabulary. The prompt goes through the model in one bare forward,
which is the streamed pass that selects neurons. The G text tokens after it go through what is resident, so all G
predictions of a window are made by the residents; the prompt's own last prediction is not counted.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Windows:
    """ids [W, P + G + 1]: the last token is only predicted."""

    ids: Tensor
    prompt_tokens: int

    @property
    def targets(self) -> Tensor:
        """[W, G]"""
        return self.ids[:, self.prompt_tokens + 1 :]


def take_windows(path: Path, tokenizer: Any, count: int, prompt_tokens: int, generate_tokens: int) -> Windows:
    """The first window of every document, then their second ones, and so on, until `count`."""
    size = prompt_tokens + generate_tokens + 1
    documents = [text.strip() for text in path.read_text(encoding="utf-8").split(SEPARATOR)]
    per_document = [list(_cut(tokenizer(text).input_ids, size)) for text in documents if text]
    in_turn = (ids for turn in zip_longest(*per_document) for ids in turn if ids is not None)
    found = list(islice(in_turn, count))
    if len(found) < count:
        raise SystemExit(f"error: {path.name} has {len(found)} windows of {size} tokens, {count} were asked for")
    return Windows(torch.tensor(found), prompt_tokens)


def _cut(ids: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(ids) - size + 1, size):
        yield ids[start : start + size]


def reference_log_probs(model: Any, windows: Windows) -> Tensor:
    """float32 [W, G, V] of a stock model, in one forward per window."""
    first = windows.prompt_tokens
    return torch.stack([_log_probs(model(ids[None, :-1]).logits[0, first:]) for ids in windows.ids])


def resident_log_probs(model: Any, ids: Tensor, prompt_tokens: int, *, by_token: bool) -> Tensor:
    """float32 [G, V] of one window [P + G + 1]: streamed prompt, then all other tokens at once or one by one.

    At once they go through the block path of quantised matrices, one by one through the decode kernel.
    """
    cache = model(input_ids=ids[None, :prompt_tokens], logits_to_keep=1).past_key_values
    given = ids[None, prompt_tokens:-1]
    parts = given.split(1 if by_token else given.shape[1], dim=1)
    return _log_probs(torch.cat([model(input_ids=part, past_key_values=cache).logits[0] for part in parts]))


def _log_probs(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


@dataclass(frozen=True)
class Quality:
    """Over all predicted tokens; KL(dense 16 bit || variant) in nats per token."""

    perplexity: float
    kl: float
    top1_agreement: float
    window_nll: list[float]
    """Mean negative log-likelihood of each window: differences between variants have a spread over them."""
    kernel_perplexity_change: float
    """Perplexity token by token over the same at once, less 1, on a few windows: the decode kernel's own rounding."""
    kernel_kl: float
    """KL(at once || token by token) on the same windows."""


def window_nll(log_probs: Tensor, targets: Tensor) -> list[float]:
    found: list[float] = (-log_probs.gather(-1, targets[..., None]).double().mean(dim=(1, 2))).tolist()
    return found


def perplexity(log_probs: Tensor, targets: Tensor) -> float:
    return math.exp(statistics.mean(window_nll(log_probs, targets)))


def divergence(reference: Tensor, log_probs: Tensor) -> float:
    return (reference.exp() * (reference - log_probs)).double().sum(-1).mean().item()


def measure_quality(model: Any, windows: Windows, reference: Tensor, kernel_windows: int) -> Quality:
    """Of a loaded `GriffinModel.model`, against the reference's log-probabilities [W, G, V]."""
    first = windows.prompt_tokens
    at_once = torch.stack([resident_log_probs(model, ids, first, by_token=False) for ids in windows.ids])
    few: Sequence[Tensor] = windows.ids[:kernel_windows]
    by_token = torch.stack([resident_log_probs(model, ids, first, by_token=True) for ids in few])
    some, some_targets = at_once[:kernel_windows], windows.targets[:kernel_windows]
    return Quality(
        perplexity=perplexity(at_once, windows.targets),
        kl=statistics.mean(map(divergence, reference, at_once)),
        top1_agreement=(reference.argmax(-1) == at_once.argmax(-1)).double().mean().item(),
        window_nll=window_nll(at_once, windows.targets),
        kernel_perplexity_change=perplexity(by_token, some_targets) / perplexity(some, some_targets) - 1,
        kernel_kl=divergence(some, by_token),
    )
