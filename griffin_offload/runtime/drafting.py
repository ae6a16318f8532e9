"""Drafting: the residents write some tokens, one streamed pass of the full model goes over them.

A pass over drafted tokens replaces their KV entries by the full model's, adds their statistic, and chooses neurons
anew. Here is what such a `generate` is made of, and the plain case, a refresh every so many tokens; exact mode, in
which the pass also judges the tokens, is in `exact.py`.
"""

import time
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from griffin_offload.runtime.context import Context
from griffin_offload.runtime.engine import Engine
from griffin_offload.runtime.report import DraftReport


class DraftingLoop:
    """One `generate` of one sequence; transformers calls it as its `custom_generate`.

    Between rounds all of `ids` [1, T] but the last token are in the KV cache, with the full model's entries, and
    `kwargs` are what transformers' forward is given for T tokens. `choose`: passes choose neurons, too.
    """

    verifies = False

    def __init__(self, engine: Engine, context: Context, *, choose: bool, streamer: Any) -> None:
        self._engine, self._context, self._choose, self._streamer = engine, context, choose, streamer
        self._raw: list[Tensor] = []
        self._scores: list[Tensor] = []
        self.report = DraftReport(verified=self.verifies)

    def __call__(
        self,
        model: Any,
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
        inputs = self._inputs(self._ids, self._kwargs, known) | {"past_key_values": self._context.cache}
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
        self._context.fade(self._engine.loaded.layers.config.decay)
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
            past_key_values=self._context.cache,
        )


class RefreshLoop(DraftingLoop):
    """The residents' tokens, and after every `every` of them a pass that corrects their KV entries and gives the
    next token."""

    def __init__(self, every: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._every = every

    def _round(self) -> bool:
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
