"""Exact mode: the pruned model drafts, one streamed pass of the full model verifies.

The longest prefix of drafts that the full model agrees with is kept, and one more token, the full model's own, comes
with it: speculative decoding (arXiv 2211.17192), the model being its own draft. Greedily every token is the full
model's first choice; when sampling, tokens are distributed as the full model's.
"""

import time
from typing import Any

import torch
from torch import Tensor

from griffin_offload.runtime.draft_length import DraftLength
from griffin_offload.runtime.drafting import DraftingLoop, RefreshLoop
from griffin_offload.runtime.engine import Engine
from griffin_offload.runtime.run import Run


class ExactLoop(DraftingLoop):
    """Rounds of drafting and verifying."""

    verifies = True

    def __init__(self, length: DraftLength, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._length = length

    def _round(self) -> bool:
        start, known = time.perf_counter(), self._ids.shape[1]
        ids, kwargs, distributions = self._draft(self._this_side(min(self._length.next(), self._room - 1)))
        drafts: list[int] = ids[0, known:].tolist()
        draft_s, start = time.perf_counter() - start, time.perf_counter()
        logits, sums = self._pass(ids, kwargs, len(drafts), judged=True)
        done = self._judge(logits, drafts, distributions)
        tokens: list[int] = self._ids[0, known:].tolist()
        self._context.cache.crop(len(tokens) - len(drafts) - 1)
        self._context.passed({index: rows[:, : len(tokens)].sum(1) for index, rows in sums.items()}, known - 1)
        self._kwargs = self._grown(self._kwargs, len(tokens))
        accepted = sum(token == draft for token, draft in zip(tokens, drafts, strict=False))
        pass_s = time.perf_counter() - start
        self._length.observe(len(drafts), accepted, draft_s, pass_s, ended=done)
        self.report.add_round(len(drafts), accepted, len(tokens), draft_s, pass_s)
        return done

    def _draft(self, count: int) -> tuple[Tensor, dict[str, Any], list[Tensor | None]]:
        """`ids` and `kwargs` after up to `count` tokens of the residents, and what those were drawn from; nothing is
        drafted behind an end of sequence."""
        ids, kwargs, distributions = self._ids, self._kwargs, []
        for _ in range(count):
            token, distribution = self._pick(self._step(ids, kwargs)[1])
            ids = torch.cat([ids, ids.new_tensor([[token]])], dim=1)
            kwargs = self._grown(kwargs, 1)
            distributions.append(distribution)
            if token in self._ends:
                break
        return ids, kwargs, distributions

    def _judge(self, logits: Tensor, drafts: list[int], distributions: list[Tensor | None]) -> bool:
        """Emit the drafts that the full model agrees with, and its own token after them."""
        for position, draft in enumerate(drafts):
            raw, scores = self._processed(self._ids, logits[:, position])
            token = self._verdict(scores, draft, distributions[position])
            if self._emit(token, raw, scores):
                return True
            if token != draft:
                return False
        return self._emit_own(logits[:, -1])

    def _verdict(self, scores: Tensor, draft: int, drafted_from: Tensor | None) -> int:
        """`draft`, or the full model's token in its place, by its scores [1, V]."""
        if drafted_from is None:
            return int(scores.argmax(-1))
        distribution = scores.softmax(-1)
        if torch.rand((), dtype=torch.float32, device=scores.device) * drafted_from[0, draft] < distribution[0, draft]:
            return draft
        rest = (distribution - drafted_from).clamp_(min=0)
        # Nothing left: the two are equal but for rounding.
        return int(torch.multinomial(rest if rest.sum() > 0 else distribution, 1))


def loop_of(run: Run, engine: Engine, streamer: Any) -> DraftingLoop:
    """What makes the tokens of a run that has streamed passes between them."""
    mode, context = run.mode, run.context
    assert context is not None, "drafts are taken back from a context"
    shared: dict[str, Any] = {"choose": mode.refresh != "never", "streamer": streamer}
    if mode.exact:
        return ExactLoop(DraftLength(mode.draft_tokens), engine, context, **shared)
    return RefreshLoop(mode.pass_tokens, engine, context, **shared)
