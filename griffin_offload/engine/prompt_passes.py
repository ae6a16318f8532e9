"""How neurons come to be resident: the streamed pass of a prompt chooses them; or they were chosen before, by the
prompt of a context or of a caller's KV cache, and are gathered again.
"""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from griffin_offload.blocks.base import unhook
from griffin_offload.engine.generation import GenerationState, tokens_of
from griffin_offload.engine.layer_pass import DecoderLayers, Progress
from griffin_offload.engine.model_interface import StockForward
from griffin_offload.engine.prefill import PromptGroups, StreamedPass, choose_together, grouped, sums_until
from griffin_offload.engine.report import PrefillReport
from griffin_offload.engine.residents import materialise
from griffin_offload.errors import GriffinError, UsageError
from griffin_offload.kv_cache.kv_cache import RecordedWriter, SplitWriter, single_steps
from griffin_offload.kv_cache.kv_layer import States, copies
from griffin_offload.kv_cache.sequence import Chosen, Context, Statistic, chosen_for, remember, seams_of
from griffin_offload.transformers_api import CACHE, Arguments, StockCache, StockOutput


class PromptPasses:
    """Forwards of prompts through a loaded model, and what they choose. Nothing here asks for memory or books it."""

    def __init__(
        self,
        layers: DecoderLayers,
        device: torch.device,
        *,
        chooses: bool,
        skips_tokens: bool,
        forward: StockForward,
        state_writers: dict[int, str],
    ) -> None:
        """`chooses`: layers are streamed, so that prompts choose. `skips_tokens`: some layers are passed by the tokens
        alone whose logits are asked for. `forward` is the stock model's. `state_writers` are `ModelSizes`'."""
        self._layers, self._device, self._forward = layers, device, forward
        self._writers = [layers.decoder[index].get_submodule(name) for index, name in state_writers.items()]
        self._chooses, self._skips_tokens = chooses, skips_tokens
        self._linears = [
            (block.module, name, part)
            for block, counts in zip(layers.blocks, layers.counts, strict=True)
            for name, part in block.module.named_modules()
            if sum(counts) < block.neurons and any(part is linear for linear in block.linears)
        ]
        """Of pruned feed-forwards: the module, and of each projection the name in it and the projection."""
        self._key = uuid.uuid4().hex
        self.last: PrefillReport | None = None
        self.progress: Progress | None = None
        self.progress_between: Progress | None = None
        """The same for streamed passes between two tokens of an answer."""

    def prefill(
        self,
        mask: Tensor,
        context: Context | None,
        args: Sequence[Any],
        kwargs: Arguments,
        start: int | None = None,
        beside: Sequence[Context] = (),
    ) -> tuple[StockOutput, StreamedPass]:
        """The streamed pass over a prompt's tokens, the first of which is number `start`, by default that behind the
        context's, whose earlier ones choose, too; and so do the sequences that decode `beside` it."""
        self.last = None  # until this prompt has chosen its neurons, none are
        self._check_linears()
        seams = self._seams(mask.shape[1], context)
        groups, choosing = grouped(mask, seams)
        streamed = StreamedPass(
            self._layers,
            groups,
            earlier=context.squared if context is not None else None,
            beside=[other.squared for other in beside],
            choosing_groups=choosing,
            keep=context is not None,
            progress=self.progress,
        )
        with streamed, self._split_at(seams, mask.shape[1], context) as held:
            output = self._forward(*args, **self._for_every_token(kwargs, mask.shape[1]))
        self._check_visited(streamed)
        if context is not None:
            start = len(context.tokens) if start is None else start
            self._note_passed(context, streamed.sums, seams, groups, held, start)
        self.last = streamed.reports()[0]
        return output, streamed

    def prefill_together(
        self,
        contexts: Sequence[Context],
        tokens: Sequence[int],
        forward: Callable[[], Tensor],
        beside: Sequence[Context],
    ) -> tuple[Tensor, StreamedPass]:
        """`forward` as the streamed pass over the prompts of empty `contexts`, so many tokens each, behind each other:
        what it gives, and the pass. They choose together, and with the sequences that decode `beside` them."""
        self.last = None
        self._check_linears()
        seams = [seams_of(count, stateful=False) for count in tokens]
        ones = [torch.ones(1, count, dtype=torch.float32, device=self._device) for count in tokens]
        parts = [grouped(mask, own) for mask, own in zip(ones, seams, strict=True)]
        prompts = _behind_each_other(parts)
        streamed = StreamedPass(
            self._layers,
            torch.block_diag(*(groups[0] for groups, _ in parts))[None],
            beside=[other.squared for other in beside],
            prompts=prompts,
            keep=True,
            progress=self.progress,
        )
        with streamed:
            logits = forward()
        self._check_visited(streamed)
        sums: list[Statistic] = [{} for _ in prompts]
        for index in list(streamed.sums):  # each its own, so that they go one after the other
            table = streamed.sums.pop(index)
            for own, prompt in zip(sums, prompts, strict=True):
                own[index] = prompt.own(table).clone()
        for context, own_seams, (groups, _) in zip(contexts, seams, parts, strict=True):
            self._note_passed(context, sums.pop(0), own_seams, groups, [None] * len(own_seams), 0)
        return logits, streamed

    def _check_visited(self, streamed: StreamedPass) -> None:
        if streamed.unvisited:
            raise GriffinError(f"the forward left out {streamed.unvisited} layers: no neurons are chosen for them")

    def _note_passed(
        self,
        context: Context,
        sums: Statistic,
        seams: list[int],
        groups: Tensor,
        held: list[States | None],
        start: int,
    ) -> None:
        """The prompt of `context` has passed from token `start` on: s^2 [1, G, F] of its `groups` [1, G, T]."""
        context.passed({index: table.sum(1) for index, table in sums.items()}, start)
        context.selected = self._layers.selected
        if seams and sums:
            context.mark_seams(seams, sums_until(sums, groups, seams), held)

    def _check_linears(self) -> None:
        """UsageError where somebody has put another module in a projection's place, as peft does."""
        for module, name, linear in self._linears:
            there = module.get_submodule(name)
            if there is not linear:
                raise UsageError(
                    f"{type(there).__name__} stands in the place of {name} in a feed-forward, whose neurons change "
                    "with every prompt: merge an adapter while weights pass (from_pretrained(..., adapter=DIR)), or "
                    "load the model with density=1.0"
                )

    def between_tokens(
        self, inputs: Arguments, context: Context, *, choose: bool, each: bool
    ) -> tuple[StockOutput, StreamedPass]:
        """A streamed pass over `inputs` behind `context`, between two tokens of its answer: (the model's output, the
        pass with its s^2 [1, G, F] by layer), G being one, or with `each` the tokens."""
        tokens, device = tokens_of(inputs).shape[1], self._device
        groups = torch.eye(tokens, dtype=torch.float32, device=device)
        groups = groups if each else torch.ones_like(groups[:1])
        earlier, progress = context.squared, self.progress_between
        streamed = StreamedPass(
            self._layers, groups[None], earlier=earlier, choose=choose, keep=True, progress=progress
        )
        with streamed, self._recorded(context, tokens if each else 0), single_steps(self._writers):
            output = self._forward(**self._for_every_token(inputs, tokens), return_dict=True)
        if choose:
            context.selected = self._layers.selected
        return output, streamed

    def _seams(self, tokens: int, context: Context | None) -> list[int]:
        """Where in a prompt of so many tokens there are states to go back to."""
        if context is None or context.tokens or (context.cache.stateful and not self._writers):
            return []
        return seams_of(tokens, stateful=bool(context.cache.stateful))

    @contextlib.contextmanager
    def _split_at(self, seams: list[int], tokens: int, context: Context | None) -> Iterator[list[States | None]]:
        """While a prompt of so many tokens passes, layers with states are halted at the one of `seams` that there is
        then: copies of what they hold."""
        if context is None or not context.cache.stateful or not seams:
            yield [None] * len(seams)
            return
        layers = context.cache.stateful
        held: States = [{} for _ in layers]

        @contextlib.contextmanager
        def behind(number: int) -> Iterator[None]:
            held[number] = copies(layers[number : number + 1])[0]
            context.cache.halted = context.cache.layers.index(layers[number])
            yield
            context.cache.halted = None

        try:
            for number, writer in enumerate(self._writers):
                unhook(writer)  # of a pass whose end was interrupted
                writer.__dict__["forward"] = SplitWriter(writer, tokens, seams[0], partial(behind, number))
            yield [held]
        finally:
            context.cache.halted = None
            for writer in self._writers:
                unhook(writer)

    @contextlib.contextmanager
    def _recorded(self, context: Context, tokens: int) -> Iterator[None]:
        """While drafts pass, what writes states is recorded, so that these can go back to any of the `tokens`."""
        if tokens < 2 or not context.cache.stateful:
            yield
            return
        recorded = []
        try:
            for writer in self._writers:
                unhook(writer)
                recorded.append(RecordedWriter(writer, tokens))
                writer.__dict__["forward"] = recorded[-1]
            yield
        finally:
            for writer in self._writers:
                unhook(writer)
        context.cache.writers = recorded

    def _for_every_token(self, kwargs: Arguments, tokens: int) -> dict[str, Any]:
        """`kwargs` with which every one of `tokens` passes all layers: those that read other layers' KV entries are
        passed by the tokens alone whose logits are asked for by number, but not by place, and every token chooses."""
        keep = kwargs.get("logits_to_keep")
        if not self._skips_tokens or not isinstance(keep, int) or not keep:
            return kwargs
        places = torch.arange(tokens - min(keep, tokens), tokens, dtype=torch.int64, device=self._device)
        return kwargs | {"logits_to_keep": places}

    def resume(self, context: Context, tokens: int, beside: Sequence[Context] = (), *, joint: bool = False) -> None:
        """Make the compact parameters those that `context` chose, if another one has chosen since; `tokens` go on. A
        `joint` sequence chooses anew, with those that decode `beside` it."""
        start, before = time.perf_counter(), self._layers.fetched_bytes
        if joint and context.squared:
            self.choose_together([context, *beside])
            context.selected = self._layers.selected
        else:
            self.keep_resident(context.selected)
        seconds, fetched_bytes = time.perf_counter() - start, self._layers.fetched_bytes - before
        kept = context.share_kept(self._layers.config.batch_statistic, self._layers.feed_forwards)
        self.last = PrefillReport(tokens, seconds, fetched_bytes, 0.0, seconds, kept, None)

    def go_on(self, run: GenerationState, arguments: Arguments, args: Sequence[Any], kwargs: Arguments) -> StockOutput:
        """The tokens behind a KV cache of the caller's: of residents, as every forward with a filled one."""
        start, before = time.perf_counter(), self._layers.fetched_bytes
        chosen = self.adopt(arguments[CACHE])
        output = self._forward(*args, **kwargs)
        seconds, fetched_bytes = time.perf_counter() - start, self._layers.fetched_bytes - before
        tokens = tokens_of(arguments).shape[0] * (run.prompt_tokens - run.past_tokens)
        kept = 1.0 if chosen is None else chosen.activation_kept
        self.last = PrefillReport(tokens, seconds, fetched_bytes, 0.0, 0.0, kept, None)
        return output

    def adopt(self, cache: StockCache) -> Chosen | None:
        """Make resident what the prompt in `cache` chose, if another one has chosen since; None where all neurons are.
        GriffinError if no prompt of this model has filled it."""
        if not self._chooses:
            return None
        chosen = chosen_for(cache)
        if chosen is None or chosen.engine != self._key:
            raise GriffinError(
                "the KV cache is filled but no neurons are chosen for it: no prompt was streamed into it by this model"
            )
        self.keep_resident(chosen.selected)
        return chosen

    def note_chosen(self, cache: StockCache | None) -> None:
        """The neurons that are resident are those that `cache` goes on with."""
        if self._chooses and self.last is not None:
            remember(cache, Chosen(self._key, self._layers.selected, self.last.activation_kept))

    def choose_together(self, contexts: Sequence[Context]) -> None:
        """Make resident what the prompts of all `contexts` choose together."""
        chosen = {
            index: choose_together(
                self._layers, index, [context.squared[index] for context in contexts], self._layers.norms.get(index)
            )
            for index in contexts[0].squared
        }
        now = self._layers.selected
        if chosen and not (now and all(torch.equal(now[index], found) for index, found in chosen.items())):
            self.keep_resident(chosen)

    def keep_resident(self, selected: dict[int, Tensor]) -> None:
        """Gather `selected`, unless they are resident."""
        if self._layers.selected is not selected:
            self.last = None
            materialise(self._layers, selected, self._layers.stream.dtype)


def _behind_each_other(parts: Sequence[tuple[Tensor, int]]) -> list[PromptGroups]:
    """Of prompts that lie behind each other, each given as `grouped` gives it, which groups are whose."""
    found: list[PromptGroups] = []
    for groups, choosing in parts:
        start = found[-1].end if found else 0
        found.append(PromptGroups(start, start + choosing, start + groups.shape[1]))
    return found
