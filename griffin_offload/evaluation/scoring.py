"""From hidden states to figures: log-probabilities of the scored tokens, and how far a variant is from the full model.

Logits exist for a few positions at a time. V vocabulary, G scored tokens.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from griffin_offload.engine.stock import stock_forward
from griffin_offload.errors import UnsupportedModel
from griffin_offload.transformers_api import StockModel


@dataclass(frozen=True)
class Scores:
    """One sample under one variant, a number for each of its G scored tokens, in host memory."""

    log_probs: Tensor
    """float32, natural logarithm."""
    kl: Tensor
    """KL(full model || variant) of the prediction, in nats."""
    agrees: Tensor
    """bool: the most likely token is the full model's."""
    greedy: Tensor
    """bool: the token itself is the most likely one."""
    activation_kept: float
    """Share of s^2 / S that the chosen neurons hold, mean over layers."""

    def first(self, tokens: int) -> "Scores":
        """Of the first `tokens` scored tokens alone."""
        part = slice(tokens)
        return replace(
            self,
            log_probs=self.log_probs[part],
            kl=self.kl[part],
            agrees=self.agrees[part],
            greedy=self.greedy[part],
        )


def stack_of(model: StockModel, decoder: nn.ModuleList) -> nn.Module:
    """The module that runs the decoder layers, from token ids to the last norm."""
    for module in model.modules():
        if any(child is decoder for child in module.children()):
            return module
    raise UnsupportedModel("the decoder layers belong to no module of the model")


@dataclass
class _StackOutput(BaseModelOutputWithPastAndCrossAttentions):  # type: ignore[misc]
    """With all that the models around the stack read of it."""

    router_logits: Any = None


@contextlib.contextmanager
def stock_head(model: StockModel, stack: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function from hidden states [N, H] to the model's logits [N, V] inside the context.

    It is the stock forward with the stack's output given: head, scale and soft cap are the model's own.
    """
    given: list[Tensor] = []

    def output(*_: Any, **__: Any) -> _StackOutput:
        return _StackOutput(last_hidden_state=given[-1])

    def logits(hidden: Tensor) -> Tensor:
        given[:] = [hidden[:, None]]
        ids = torch.zeros(hidden.shape[0], 1, dtype=torch.long, device=hidden.device)
        found: Tensor = stock_forward(model)(input_ids=ids, use_cache=False).logits
        return found[:, 0]

    stack.forward = output
    try:
        yield logits
    finally:
        del stack.forward


def score_rows(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, kept: list[float], positions_at_once: int
) -> list[Scores]:
    """Scores of one sample: `hidden` is [1 + variants, G, H], the full model first; `targets` [G]; `kept` of each."""
    columns: list[list[tuple[Tensor, ...]]] = [[] for _ in hidden]
    for start in range(0, targets.numel(), positions_at_once):
        part = slice(start, start + positions_at_once)
        full = head(hidden[0, part]).float().log_softmax(-1)
        columns[0].append(_compare(full, full, targets[part]))
        for row in range(1, hidden.shape[0]):
            own = head(hidden[row, part]).float().log_softmax(-1)
            columns[row].append(_compare(full, own, targets[part]))
    found = []
    for chunks, share in zip(columns, kept, strict=True):
        log_probs, kl, agrees, greedy = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        found.append(Scores(log_probs, kl, agrees, greedy, share))
    return found


def _compare(full: Tensor, own: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """(log-probabilities, KL, agreement, greedy) of a few positions; `full` and `own` are log-softmaxed [N, V]."""
    best = own.argmax(-1)
    kl = (
        torch.zeros(targets.numel(), dtype=torch.float32, device=own.device)
        if own is full
        else (full.exp() * (full - own)).sum(-1)
    )
    found = own.gather(-1, targets[:, None])[:, 0], kl, best == full.argmax(-1), best == targets
    return tuple(tensor.cpu() for tensor in found)
