"""Drafting: the residents write some tokens, one streamed pass of the full model goes over them.

A pass over drafted tokens replaces their KV entries by the full model's, adds their statistic, and chooses neurons
anew. Here is what such a `generate` is made of; the plain case, a refresh every so many tokens; and exact mode, in
which the pass also judges the tokens.
"""

import time
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from griffin_offload.blocks.rope import RopeBorder
from griffin_offload.config import AUTO_DRAFT_TOKENS
from griffin_offload.engine.generation import GenerationState
from griffin_offload.engine.report import DraftReport
from griffin_offload.kv_cache.sequence import Context
from griffin_offload.transformers_api import CACHE, StockModel

# How many tokens to draft before the next verifying pass.


# What is assumed before anything was seen, and how fast that is forgotten.
_PRIOR_ACCEPTED, _PRIOR_TESTED = 4.0, 5.0
_DECAY = 0.9


class DraftLength:
    """A fixed number of drafts, or the one that gives the most tokens per second by what was measured so far.

    If every draft is accepted with probability a, a pass after N drafts yields (1 - a^(N+1)) / (1 - a) tokens in
    T_pass + N * t_draft seconds.
    """

    def __init__(self, fixed: int | None) -> None:
        self._fixed = fixed
        self._accepted, self._tested = _PRIOR_ACCEPTED, _PRIOR_TESTED
        self._pass_s = self._draft_s = 0.0

    @property
    def acceptance(self) -> float:
        """Estimated probability that a draft is accepted when all before it were."""
        return self._accepted / self._tested

    def next(self) -> int:
        """Drafts before the next pass."""
        if self._fixed is not None:
            return self._fixed
        if not self._draft_s:
            return AUTO_DRAFT_TOKENS // 2  # nothing was measured yet
        return max(range(1, AUTO_DRAFT_TOKENS + 1), key=self._tokens_per_s)

    def _tokens_per_s(self, drafts: int) -> float:
        a = min(self.acceptance, 0.999)
        return (1 - a ** (drafts + 1)) / (1 - a) / (self._pass_s + drafts * self._draft_s)

    def observe(self, drafted: int, accepted: int, draft_s: float, pass_s: float, *, ended: bool) -> None:
        """A round: `draft_s` seconds for all its drafts, `pass_s` for the pass. In one that `ended` the answer, the
        draft after the last accepted one was not judged."""
        rejected = accepted < drafted and not ended
        self._accepted = self._accepted * _DECAY + accepted
        self._tested = self._tested * _DECAY + accepted + rejected
        self._pass_s = _mean(self._pass_s, pass_s)
        if drafted:
            self._draft_s = _mean(self._draft_s, draft_s / drafted)


def _mean(before: float, now: float) -> float:
    return (before + now) / 2 if before else now


class FullModel(Protocol):
    """What a loop asks of the model that drafts are made with and passed through."""

    @property
    def border(self) -> RopeBorder | None: ...
    @property
    def decay(self) -> float: ...
    def observe(self, logits: Tensor) -> None: ...
    def full_pass(self, inputs: dict[str, Any], *, choose: bool, each: bool) -> tuple[Any, dict[int, Tensor]]: ...


class DraftingLoop:
    """One `generate` of one sequence; transformers calls it as its `custom_generate`.

    Between rounds all of `ids` [1, T] but the last token are in the KV cache, with the full model's entries, and
    `kwargs` are what transformers' forward is given for T tokens. `choose`: passes choose neurons, too.
    """

    verifies = False

    def __init__(self, engine: FullModel, context: Context, *, choose: bool, streamer: Any) -> None:
        self._engine, self._context, self._choose, self._streamer = engine, context, choose, streamer
        self._raw: list[Tensor] = []
        self._scores: list[Tensor] = []
        self.report = DraftReport(verified=self.verifies)

    def __call__(
        self,
        model: StockModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """The signature of transformers' decoding methods, and what they return."""
        self._model, self._processor, self._criteria = model, logits_processor, stopping_criteria
        self._config, self._ids = generation_config, input_ids
        ends = generation_config._eos_token_tensor
        self._ends = set() if ends is None else set(ends.tolist())
        new_tokens = input_ids.shape[1] - self._context.cache.get_seq_length()
        inputs = self._inputs(input_ids, model_kwargs, new_tokens, is_first_iteration=True)
        self._kwargs = self._grown(model_kwargs, 1)
        done = self._emit_own(model(**inputs, return_dict=True).logits[:, -1])
        while not done:
            done = self._reread() if self._at_border else self._round()
        if self._streamer is not None:
            self._streamer.end()
        return self._result()

    def _round(self) -> bool:
        """Draft, pass; whether the answer is complete."""
        raise NotImplementedError

    @property
    def _room(self) -> int:
        """Tokens that may still be generated."""
        return int(self._criteria.max_length) - self._ids.shape[1]

    @property
    def _at_border(self) -> bool:
        """Whether the model turns all positions by other angles from the next token on, and reads everything again."""
        border = self._engine.border
        return border is not None and border.rereads and self._ids.shape[1] == border.tokens + 1

    def _this_side(self, drafts: int) -> int:
        """As many of `drafts` as one pass may hold: none crosses the border, where each token alone would not."""
        border, known = self._engine.border, self._ids.shape[1]
        return drafts if border is None or known > border.tokens else min(drafts, border.tokens - known)

    def _reread(self) -> bool:
        """All tokens but those to come, streamed once more; whether the answer ends with the next one."""
        start, known = time.perf_counter(), self._ids.shape[1]
        self._context.begin_again()
        inputs = self._inputs(self._ids, self._kwargs, known) | {CACHE: self._context.cache}
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = 1
        output, sums = self._engine.full_pass(inputs, choose=self._choose, each=False)
        self._context.passed({index: total.sum(1) for index, total in sums.items()}, 0)
        self._kwargs = self._grown(self._kwargs, 1)
        done = self._emit_own(output.logits[:, -1])
        self.report.add_round(0, 0, 1, 0.0, time.perf_counter() - start)
        return done

    def _inputs(self, ids: Tensor, kwargs: dict[str, Any], new_tokens: int, **more: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = self._model.prepare_inputs_for_generation(
            ids, next_sequence_length=new_tokens, **kwargs, **more
        )
        return inputs

    def _grown(self, kwargs: dict[str, Any], tokens: int) -> dict[str, Any]:
        """`kwargs` for so many tokens more."""
        grown: dict[str, Any] = self._model._update_model_kwargs_for_generation({}, dict(kwargs), num_new_tokens=tokens)
        return grown

    def _step(self, ids: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """One forward of the residents: (logits as they are, processed scores), both [1, V]."""
        logits = self._model(**self._inputs(ids, kwargs, 1), return_dict=True).logits[:, -1]
        return self._processed(ids, logits)

    def _processed(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        raw = logits.to(torch.float32, copy=True)
        self._engine.observe(raw)
        return raw, self._processor(ids, raw)

    def _pass(
        self, ids: Tensor, kwargs: dict[str, Any], drafted: int, *, judged: bool
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The full model over the last `drafted` of `ids` and the token before them: logits [1, drafted + 1, V] and
        s^2 [1, drafted + 1, F] by layer; if they are not judged, of the last token, and of all tokens together."""
        self._context.cache.crop(-drafted)
        inputs = self._inputs(ids, kwargs, drafted + 1)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = drafted + 1 if judged else 1
        self._context.fade(self._engine.decay)
        output, sums = self._engine.full_pass(inputs, choose=self._choose, each=judged)
        return output.logits, sums

    def _pick(self, scores: Tensor) -> tuple[int, Tensor | None]:
        """A token by its scores [1, V], and the distribution it was drawn from."""
        if not self._config.do_sample:
            return int(scores.argmax(-1)), None
        distribution = scores.softmax(-1)
        return int(torch.multinomial(distribution, 1)), distribution

    def _emit_own(self, logits: Tensor) -> bool:
        """Emit the full model's token of logits [1, V]."""
        raw, scores = self._processed(self._ids, logits)
        return self._emit(self._pick(scores)[0], raw, scores)

    def _emit(self, token: int, raw: Tensor, scores: Tensor) -> bool:
        """Append a token to the answer; whether it ends there."""
        following = self._ids.new_tensor([[token]])
        self._ids = torch.cat([self._ids, following], dim=1)
        if self._config.return_dict_in_generate and self._config.output_scores:
            self._scores.append(scores)
        if self._config.return_dict_in_generate and self._config.output_logits:
            self._raw.append(raw)
        if self._streamer is not None:
            self._streamer.put(following[0].cpu())
        return bool(self._criteria(self._ids, tuple(self._scores) or None).all())

    def _result(self) -> Any:
        if not self._config.return_dict_in_generate:
            return self._ids
        return GenerateDecoderOnlyOutput(
            sequences=self._ids,
            scores=tuple(self._scores) or None,
            logits=tuple(self._raw) or None,
            **{CACHE: self._context.cache},
        )


class RefreshLoop(DraftingLoop):
    """The residents' tokens, and after every `every` of them a pass that corrects their KV entries and gives the
    next token."""

    def __init__(self, every: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._every = every

    def _round(self) -> bool:
        self._context.cache.keep_start()
        start, drafted = time.perf_counter(), self._this_side(self._every - 1)
        for _ in range(drafted):
            raw, scores = self._step(self._ids, self._kwargs)
            self._kwargs = self._grown(self._kwargs, 1)
            if self._emit(self._pick(scores)[0], raw, scores):
                return True
        draft_s, start = time.perf_counter() - start, time.perf_counter()
        logits, sums = self._pass(self._ids, self._kwargs, drafted, judged=False)
        start_token = self._ids.shape[1] - drafted - 1
        self._context.passed({index: total.sum(1) for index, total in sums.items()}, start_token)
        self._kwargs = self._grown(self._kwargs, 1)
        done = self._emit_own(logits[:, -1])
        self.report.add_round(drafted, drafted, drafted + 1, draft_s, time.perf_counter() - start)
        return done


# Exact mode: the pruned model drafts, one streamed pass of the full model verifies.


class ExactLoop(DraftingLoop):
    """Rounds of drafting and verifying."""

    verifies = True

    def __init__(self, length: DraftLength, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._length = length

    def _round(self) -> bool:
        self._context.cache.keep_start()
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


def loop_of(run: GenerationState, engine: FullModel, streamer: Any) -> DraftingLoop:
    """What makes the tokens of a run that has streamed passes between them."""
    mode, context = run.mode, run.context
    assert context is not None, "drafts are taken back from a context"
    shared: dict[str, Any] = {"choose": mode.refresh != "never", "streamer": streamer}
    if mode.exact:
        return ExactLoop(DraftLength(mode.draft_tokens), engine, context, **shared)
    return RefreshLoop(mode.pass_tokens, engine, context, **shared)
