"""Drafting: the residents write some tokens, one streamed pass of the full model goes over them.

A pass over drafted tokens replaces their KV entries by the full model's, adds their statistic, and chooses neurons
anew. Here is what such a `generate` is made of; the plain case, a refresh every so many tokens; and exact mode, in
which the pass also judges the tokens.
"""

import time
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from griffin_offload.blocks.states import RopeBorder
from griffin_offload.engine.drafts import DraftLength, LookupState, StepCosts, TextDrafts
from griffin_offload.engine.generation import GenerationState
from griffin_offload.engine.report import DraftReport
from griffin_offload.kernels import table
from griffin_offload.kv_cache.kv_cache import KVCache
from griffin_offload.kv_cache.sequence import Context
from griffin_offload.transformers_api import CACHE, Arguments, StockModel, StockOutput

Streamer: TypeAlias = "BaseStreamer | None"


class FullModel(Protocol):
    """What a loop asks of the model that drafts are made with and passed through."""

    @property
    def border(self) -> RopeBorder | None: ...
    @property
    def decay(self) -> float: ...
    @property
    def step_costs(self) -> StepCosts: ...
    def observe(self, logits: Tensor) -> None: ...
    def full_pass(self, inputs: Arguments, *, choose: bool, each: bool) -> tuple[StockOutput, dict[int, Tensor]]: ...


class DraftingLoop:
    """One `generate` of one sequence; transformers calls it as its `custom_generate`.

    Between rounds all of `ids` [1, T] but the last token are in the KV cache, with the full model's entries, and
    `kwargs` are what transformers' forward is given for T tokens. `choose`: passes choose neurons, too.
    """

    verifies = False

    def __init__(
        self,
        engine: FullModel,
        context: Context,
        *,
        choose: bool,
        streamer: Streamer,
        lookup: LookupState | None = None,
    ) -> None:
        self._context, self._choose = context, choose
        self._begin(engine, context.cache, streamer, lookup)
        self.report: DraftReport | None = DraftReport(verified=self.verifies)

    def _begin(self, engine: FullModel, cache: KVCache, streamer: Streamer, lookup: LookupState | None) -> None:
        self._engine, self._cache, self._streamer, self._lookup = engine, cache, streamer, lookup
        self._raw: list[Tensor] = []
        self._scores: list[Tensor] = []
        self.looked_up = lookup.report if lookup is not None else None

    def __call__(
        self,
        model: StockModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """The signature of transformers' decoding methods, and what they return."""
        self._model, self._processor, self._criteria = model, logits_processor, stopping_criteria
        self._config, self._ids = generation_config, input_ids
        ends = generation_config._eos_token_tensor
        self._ends = set() if ends is None else set(ends.tolist())
        if self._lookup is not None:
            self._lookup.text = TextDrafts(input_ids[0].tolist())
        new_tokens = input_ids.shape[1] - self._cache.get_seq_length()
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
        self._add_round(0, 0, 1, 0.0, time.perf_counter() - start)
        return done

    def _add_round(self, *figures: Any) -> None:
        assert self.report is not None, "of loops with streamed passes"
        self.report.add_round(*figures)

    def _with(self, drafts: list[int]) -> Tensor:
        return torch.cat([self._ids, self._ids.new_tensor([drafts])], dim=1)

    def _inputs(self, ids: Tensor, kwargs: Arguments, new_tokens: int, **more: Any) -> dict[str, Any]:
        inputs: Arguments = self._model.prepare_inputs_for_generation(
            ids, next_sequence_length=new_tokens, **kwargs, **more
        )
        return inputs

    def _grown(self, kwargs: Arguments, tokens: int) -> dict[str, Any]:
        """`kwargs` for so many tokens more."""
        grown: dict[str, Any] = self._model._update_model_kwargs_for_generation({}, dict(kwargs), num_new_tokens=tokens)
        return grown

    def _step(self, ids: Tensor, kwargs: Arguments) -> tuple[Tensor, Tensor]:
        """One forward of the residents: (logits as they are, processed scores), both [1, V]."""
        logits = self._model(**self._inputs(ids, kwargs, 1), return_dict=True).logits[:, -1]
        return self._processed(ids, logits)

    def _processed(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        raw = logits.to(torch.float32, copy=True)
        self._engine.observe(raw)
        return raw, self._processor(ids, raw)

    def _pass(self, ids: Tensor, kwargs: Arguments, drafted: int, *, judged: bool) -> tuple[Tensor, dict[int, Tensor]]:
        """The full model over the last `drafted` of `ids` and the token before them: logits [1, drafted + 1, V] and
        s^2 [1, drafted + 1, F] by layer; if they are not judged, of the last token, and of all tokens together. What
        drafting left in the KV cache goes first."""
        known = ids.shape[1] - drafted - 1
        self._cache.crop(known - self._cache.get_seq_length())
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

    def _judge(self, logits: Tensor, drafts: list[int], distributions: Sequence[Tensor | None]) -> bool:
        """Emit the drafts that the model of `logits` [1, drafts + 1, V] agrees with, and its own token after them.
        Without what they were drawn from, drafts are tokens that it would have drawn."""
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
            return self._pick(scores)[0]
        distribution = scores.softmax(-1)
        if torch.rand((), dtype=torch.float32, device=scores.device) * drafted_from[0, draft] < distribution[0, draft]:
            return draft
        rest = (distribution - drafted_from).clamp_(min=0)
        # Nothing left: the two are equal but for rounding.
        return int(torch.multinomial(rest if rest.sum() > 0 else distribution, 1))

    def _emit_own(self, logits: Tensor) -> bool:
        """Emit the full model's token of logits [1, V]."""
        raw, scores = self._processed(self._ids, logits)
        return self._emit(self._pick(scores)[0], raw, scores)

    def _emit(self, token: int, raw: Tensor, scores: Tensor) -> bool:
        """Append a token to the answer; whether it ends there."""
        following = self._ids.new_tensor([[token]])
        self._ids = torch.cat([self._ids, following], dim=1)
        if self._lookup is not None:
            self._lookup.text.add(token)
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
            **{CACHE: self._cache},
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
        self._add_round(drafted, drafted, drafted + 1, draft_s, time.perf_counter() - start)
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
        looked_up = self._looked_up()
        ids, kwargs, distributions = looked_up or self._draft(self._this_side(min(self._length.next(), self._room - 1)))
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
        if looked_up is None:
            self._length.observe(len(drafts), accepted, draft_s, pass_s, ended=done)
        elif self._lookup is not None:
            self._lookup.judged(len(drafts), accepted, ended=done)
        self._add_round(len(drafts), accepted, len(tokens), draft_s, pass_s)
        return done

    def _looked_up(self) -> tuple[Tensor, dict[str, Any], list[Tensor | None]] | None:
        """As `_draft`, from the text, if that is better."""
        if self._lookup is None:
            return None
        found = self._lookup.find(self._ids, self._this_side(self._room - 1))
        if not self._length.prefers(len(found), self._lookup.text.acceptance):
            self._lookup.text.expect(found)
            return None
        return self._with(found), self._grown(self._kwargs, len(found)), [None] * len(found)

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


# Without streamed passes: the residents themselves judge what the text suggests.


class LookupLoop(DraftingLoop):
    """The residents' tokens, several in one forward where the text suggests them. With a seed they are those that
    would have been drawn one by one."""

    def __init__(self, engine: FullModel, cache: KVCache, lookup: LookupState, streamer: Streamer) -> None:
        self._begin(engine, cache, streamer, lookup)
        self._state, self._costs = lookup, engine.step_costs
        self._lookup_asked = None if lookup.only_alike else True
        self.report = None
        self._found: list[int] = []

    def _round(self) -> bool:
        known, text = self._ids.shape[1], self._state.text
        drafts = self._drafts()
        if not drafts:
            text.expect(self._found)
        start = time.perf_counter()
        logits = self._forward(drafts)
        forward_s, start = time.perf_counter() - start, time.perf_counter()
        done = self._judge(logits, drafts, [None] * len(drafts))
        tokens: list[int] = self._ids[0, known:].tolist()
        self._cache.crop(len(tokens) - len(drafts) - 1)
        self._kwargs = self._grown(self._kwargs, len(tokens))
        self._costs.observe(1 + len(drafts), forward_s, (time.perf_counter() - start) / len(tokens))
        if drafts:
            accepted = sum(token == draft for token, draft in zip(tokens, drafts, strict=False))
            self._state.judged(len(drafts), accepted, ended=done)
        return done

    def _drafts(self) -> list[int]:
        """Those that are worth their rows; after a trial, the first time."""
        most = min(self._room, self._cache.tokens_alike) - 1
        self._found = [] if self._costs.rules_out(self._lookup_asked) else self._state.find(self._ids, most)
        drafts = self._found[: self._costs.best(len(self._found), self._state.text.acceptance)]
        if drafts and self._costs.alike is None:
            self._costs.alike = self._rows_are_alike(drafts)
        return [] if self._costs.rules_out(self._lookup_asked) else drafts

    def _rows_are_alike(self, drafts: list[int]) -> bool:
        """Whether the first two rows are the same alone and with the others, which are taken back."""
        together = self._forward(drafts)[0, :2].clone()
        self._cache.crop(-1 - len(drafts))
        alone = [self._forward(drafts[:place], rows=1)[0, -1].clone() for place in range(2)]
        self._cache.crop(-2)
        return torch.equal(together, torch.stack(alone))

    def _forward(self, drafts: list[int], rows: int | None = None) -> Tensor:
        """Logits [1, rows, V] of the residents for the last tokens behind which are `drafts`, by default all of those
        and the one before them."""
        rows = 1 + len(drafts) if rows is None else rows
        ids, kwargs = self._ids, self._kwargs
        if drafts:
            ids, kwargs = self._with(drafts), self._grown(kwargs, len(drafts))
        inputs = self._inputs(ids, kwargs, rows)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = rows
        with table.rows_alike():
            logits: Tensor = self._model(**inputs, return_dict=True).logits
        return logits[:, -rows:]


def loop_of(run: GenerationState, engine: FullModel, streamer: Streamer) -> DraftingLoop:
    """What makes the tokens of a run that drafts."""
    mode, context = run.mode, run.context
    lookup = None
    if run.lookup:
        allowed = run.guide.allowed if run.guide is not None else None
        lookup = LookupState(run.lookup, allowed, only_alike=mode.lookup is None)
    if not mode.pass_tokens or not run.passes:
        assert lookup is not None, "nothing else drafts"
        assert run.own_cache is not None, "drafts are taken back from it"
        return LookupLoop(engine, run.own_cache, lookup, streamer)
    assert context is not None, "drafts are taken back from a context"
    shared: dict[str, Any] = {"choose": mode.refresh != "never", "streamer": streamer}
    if mode.exact:
        return ExactLoop(DraftLength(mode.draft_tokens), engine, context, lookup=lookup, **shared)
    return RefreshLoop(mode.pass_tokens, engine, context, **shared)
