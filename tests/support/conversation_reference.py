"""A conversation with a dense model whose neurons are masked: the statistic grows over turns, nothing is pruned.

Independent of the package: float64 sums, plain hooks, transformers' own cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from reference import _down_projections, _zero_others
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from griffin_offload.blocks.states import state_kinds
from griffin_offload.transformers_api import CACHE

if TYPE_CHECKING:
    from pathlib import Path

    from griffin_offload import GriffinModel


class MaskedConversation:
    """Greedy turns [1, T] of one sequence; `kept` neurons a layer."""

    def __init__(self, model: PreTrainedModel, down_pattern: str, kept: int) -> None:
        self._model, self._kept = model, kept
        self._down = _down_projections(model, down_pattern)
        # Without the config layers with a window keep everything, and masks do the rest; states need one.
        self._cache = DynamicCache(config=model.config) if state_kinds(model.config) else DynamicCache()
        self._squared = [torch.zeros(1, dtype=torch.float64) for _ in self._down]
        self.selected: list[Tensor] = []

    @torch.no_grad()
    def turn(self, ids: Tensor, new_tokens: int) -> Tensor:
        """The whole sequence after `new_tokens` more; what the cache has of `ids` is not fed again."""
        seen: list[Tensor] = []
        handles = [
            m.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double())) for m in self._down
        ]
        logits = self._forward(ids)
        for handle in handles:
            handle.remove()
        for layer, z in enumerate(seen):
            z = z.reshape(-1, z.shape[-1])
            squares = z**2 / (z**2).sum(-1, keepdim=True).clamp(min=1e-300)
            self._squared[layer] = self._squared[layer] + squares.sum(0)
        self.selected = [squared.topk(self._kept).indices.sort().values for squared in self._squared]
        handles = [
            m.register_forward_pre_hook(lambda _, args, kept=kept: (_zero_others(args[0], kept), *args[1:]))
            for m, kept in zip(self._down, self.selected, strict=True)
        ]
        for step in range(new_tokens):
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            if step + 1 < new_tokens:
                logits = self._forward(ids)
        for handle in handles:
            handle.remove()
        return ids

    def _forward(self, ids: Tensor) -> Tensor:
        past = self._cache.get_seq_length()
        inputs = self._model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=ids.shape[1] - past,
            **{CACHE: self._cache},
            attention_mask=torch.ones_like(ids),
            use_cache=True,
        )
        logits: Tensor = self._model(**inputs).logits
        return logits


def check_turns(model: GriffinModel, path: Path) -> None:
    """A chat reads its new tokens alone, goes back, and goes on where it was saved at `path`."""
    session = model.chat_session(max_new_tokens=6, do_sample=False)
    first, second = session.send("hello"), session.send("and again")
    known = second.report.cached_prompt_tokens  # of its answer, as much as text tells: random tokens are none
    assert first.report.prompt_tokens <= known <= first.report.prompt_tokens + first.report.generated_tokens
    session.save(path)
    third = session.send("once more")
    assert session.undo()
    assert session.send("once more").text == third.text
    other = model.chat_session(max_new_tokens=6, do_sample=False)
    other.load(path)
    again = other.send("once more")
    assert again.text == third.text
    assert again.report.cached_prompt_tokens == third.report.cached_prompt_tokens > known
    session.reset()
    assert session.send("hello").text == first.text
