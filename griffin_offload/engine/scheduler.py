"""Several answers at once: sequences that decode together, and join and leave between tokens.

A sequence joins by the streamed pass of its prompt; then every step computes a token of each (`JointStep`). Which
neurons are resident is a matter of all of them: each pass chooses by the sum of their length-normalised statistics, and
so an answer's share of activation changes when others join. Sampling, penalties, stop strings and seeds are a
sequence's own: transformers' `generate` prepares them as for an answer alone.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from griffin_offload.devices.threads import limited_threads
from griffin_offload.engine.arguments import ONE_ANSWER, checked_prompt, empty_context, prepared
from griffin_offload.engine.generation import GenerationMode, GenerationState, probabilities_named
from griffin_offload.engine.report import RunReport
from griffin_offload.engine.runner import ModelRunner
from griffin_offload.errors import DoesNotFit, GriffinError
from griffin_offload.kv_cache.kv_cache import KVCache
from griffin_offload.kv_cache.sequence import Context
from griffin_offload.kv_cache.store import Workload
from griffin_offload.transformers_api import StockModel

MOST_TOGETHER = 8
"""Sequences in one step, when nobody says: the kernels for few rows gain little beyond."""
_CHECK_TOKENS = 4


class _Prepared:
    """What transformers' `generate` makes of its arguments, given as its `custom_generate`: nothing is generated."""

    def __call__(
        self,
        model: StockModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        self.ids, self.processor, self.criteria = input_ids, logits_processor, stopping_criteria
        self.config, self.kwargs = generation_config, model_kwargs
        return input_ids


@dataclass
class _Share:
    """What an answer's own activation had of the resident neurons while so many tokens were generated."""

    kept: float
    tokens: int = 0


class DecodingSequence:
    """One answer on its way."""

    def __init__(self, engine: ModelRunner, run: GenerationState, ready: _Prepared, seed: int | None) -> None:
        assert run.context is not None, "a sequence of its own"
        self._engine, self.run, self.context = engine, run, run.context
        self._processor, self._criteria, self._config = ready.processor, ready.criteria, ready.config
        self.ids, self._kwargs, self._prompt_tokens = ready.ids, ready.kwargs, ready.ids.shape[1]
        self._random = torch.Generator(self.ids.device)
        self._random.manual_seed(
            int(torch.randint(2**62, (), dtype=torch.int64, device="cpu")) if seed is None else seed
        )
        self._started = time.perf_counter()
        self._shares: list[_Share] = []
        self.done = False
        self.error: Exception | None = None
        """What ended it, if it did not end well."""
        self.report: RunReport | None = None
        """When it has ended well."""

    @property
    def answer(self) -> Tensor:
        """Its tokens so far [T], without the prompt."""
        return self.ids[0, self._prompt_tokens :]

    @property
    def seconds(self) -> float:
        """Since it joined."""
        return time.perf_counter() - self._started

    def first(self) -> None:
        """Let the prompt, or what the context does not know of it, pass: the first token."""
        new_tokens = self._prompt_tokens - self.context.cache.get_seq_length()
        self._take(self._forward(new_tokens, is_first_iteration=True))

    def step(self) -> None:
        """One token, alone."""
        self._take(self._forward(1))

    def _forward(self, new_tokens: int, **more: Any) -> Tensor:
        model, engine = self._engine.loaded.model, self._engine
        inputs = model.prepare_inputs_for_generation(self.ids, next_sequence_length=new_tokens, **self._kwargs, **more)
        engine.run = self.run
        try:
            logits: Tensor = model(**inputs, return_dict=True).logits[:, -1]
        finally:
            engine.run = None
        return logits

    def take(self, logits: Tensor) -> None:
        """A token from logits [1, V] of a step with others."""
        self._engine.run = self.run
        try:
            self._engine.observe(logits)
        finally:
            self._engine.run = None
        self._take(logits)

    def _take(self, logits: Tensor) -> None:
        scores = self._processor(self.ids, logits.to(torch.float32, copy=True))
        if self._config.do_sample:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self._random)
        else:
            token = scores.argmax(-1, keepdim=True)
        self.ids = torch.cat([self.ids, token], dim=1)
        self._kwargs = self._engine.loaded.model._update_model_kwargs_for_generation({}, self._kwargs)
        if self._shares:
            self._shares[-1].tokens += 1
        self.done = bool(self._criteria(self.ids, None).all())

    def share_anew(self) -> None:
        """Others have joined, or this one: the resident neurons are not those of before."""
        layers = self._engine.loaded.layers
        self.context.selected = layers.selected
        kept = self.context.share_kept(layers.config.batch_statistic, len(layers.decoder))
        self._shares.append(_Share(kept))

    @property
    def activation_kept(self) -> float:
        """Share of this answer's own activation in the resident neurons, mean over its tokens."""
        tokens = sum(share.tokens for share in self._shares)
        if not tokens:
            return self._shares[-1].kept
        return sum(share.kept * share.tokens for share in self._shares) / tokens


class HasToWait(GriffinError):
    """A sequence cannot join those that are being decoded; it may when some of them have left."""


class SequenceScheduler:
    """The sequences that are being decoded by a model, at most `most`.

    All calls but `working` are made inside of that. A step that fails as a whole ends all sequences: `leave_all`.
    """

    def __init__(
        self, engine: ModelRunner, report: Callable[[GenerationState, int, float], RunReport], most: int = MOST_TOGETHER
    ) -> None:
        self._engine, self._report, self.most = engine, report, most
        self.running: list[DecodingSequence] = []
        self._selected: dict[int, Tensor] | None = None

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The model is this scheduler's inside: other callers of it wait."""
        engine = self._engine
        with engine.alone(), engine.loaded.ledger.measuring(), limited_threads(engine.loaded.threads):
            engine.decode_beside([sequence.context for sequence in self.running])
            yield

    @property
    def has_room(self) -> bool:
        """Whether one more may begin. Of the first two it is tried whether the model computes them together at all."""
        if not self.running:
            return True
        if len(self.running) >= self.most or any(self._alone(sequence.run.use) for sequence in self.running):
            return False
        engine, config = self._engine, self._engine.loaded.model.config
        engine.joint.check(
            lambda: KVCache(config, ctx_tokens=_CHECK_TOKENS, bits=engine.plan.kv_bits), engine.model_spec.device
        )
        return engine.joint.why_alone is None

    def begin(
        self, prompt: Tensor, *, context: Context | None = None, seed: int | None = None, **arguments: Any
    ) -> DecodingSequence:
        """Let a prompt [1, T] pass, behind what `context` knows of it, and its answer join the others. `arguments` are
        those of `generate` for one sequence; without a `seed` torch's global generator gives one.

        HasToWait where it would fit if others were not there; whatever `generate` raises of its arguments or its
        prompt. The others go on as before.
        """
        engine = self._engine
        with engine.guarded():
            context = empty_context(engine, 1) if context is None else context
            run, ready = self._prepared(prompt, context, arguments)
            sequence = DecodingSequence(engine, run, ready, seed)
            before = engine.loaded.layers.fetched_bytes, engine.embedding_bytes
            try:
                with probabilities_named(engine.model_spec.dtype):
                    sequence.first()
            except BaseException:
                context.finish(None)
                self._count()  # a pass that was cut short chose for some layers: `step` gathers what was there before
                raise
            for other in self.running:  # what this prompt has streamed is none of theirs
                other.run.fetched_bytes += engine.loaded.layers.fetched_bytes - before[0]
                other.run.embedding_bytes += engine.embedding_bytes - before[1]
            self.running.append(sequence)
            self._chosen()
        return sequence

    def _prepared(
        self, prompt: Tensor, context: Context, arguments: dict[str, Any]
    ) -> tuple[GenerationState, _Prepared]:
        engine, ready = self._engine, _Prepared()
        prompt = checked_prompt(prompt, engine.shape.vocab_size).to(engine.model_spec.device)
        mode = GenerationMode(refresh="never" if engine.loaded.layers.config.refresh == "never" else "turn")
        try:
            run, kwargs = prepared(engine, prompt, ONE_ANSWER | arguments, mode, context)
        except DoesNotFit as error:
            if not self.running:
                raise
            raise HasToWait(str(error)) from error
        if self.running and self._alone(run.use):
            raise HasToWait(f"beyond {run.use.ctx_tokens} tokens its positions are turned by angles of its own")
        run.joint, run.ready = True, context.start(prompt[0], exact=False)
        run.cached_tokens = len(context.tokens)
        engine.loaded.model.generate(prompt, custom_generate=ready, **kwargs)
        return run, ready

    def _alone(self, use: Workload) -> bool:
        """Whether a use may cross the border behind which lengths decide how all positions are turned."""
        border = self._engine.border
        return border is not None and use.ctx_tokens > border.tokens

    def _chosen(self) -> None:
        """A prompt has passed: which neurons the running ones go on with, and what they take."""
        engine = self._engine
        self._selected = engine.loaded.layers.selected
        for sequence in self.running:
            sequence.share_anew()
        self._count()

    def _count(self) -> None:
        """Enter what the running ones take into the ledger."""
        engine, running = self._engine, self.running
        engine.decode_beside([sequence.context for sequence in running])
        if running:
            largest = max((sequence.run.use for sequence in running), key=lambda use: use.ctx_tokens)
            engine.hold(replace(largest, together=len(running)), 1, None)

    def step(self) -> list[DecodingSequence]:
        """A token of every running sequence; those that ended, well or not, which have left."""
        engine = self._engine
        with engine.guarded():
            if self._selected is not None:
                engine.passes.keep_resident(self._selected)
            going_on = [sequence for sequence in self.running if not sequence.done]
            if len(going_on) == 1:
                self._try(going_on[0], going_on[0].step)
            elif going_on:
                tokens = torch.cat([sequence.ids[:, -1:] for sequence in going_on])
                logits = engine.joint(tokens, [sequence.context.cache for sequence in going_on])
                for row, sequence in enumerate(going_on):
                    self._try(sequence, partial(sequence.take, logits[row : row + 1]))
            ended = [sequence for sequence in self.running if sequence.done]
            for sequence in ended:
                self.leave(sequence)
        return ended

    def _try(self, sequence: DecodingSequence, compute: Callable[[], None]) -> None:
        """An error of one sequence's processors, criteria or numbers ends that one alone."""
        try:
            with probabilities_named(self._engine.model_spec.dtype):
                compute()
        except Exception as error:
            sequence.done, sequence.error = True, error

    def leave(self, sequence: DecodingSequence) -> None:
        """Take `sequence` out, done or not. What its context knows stays, unless it failed."""
        engine = self._engine
        self.running.remove(sequence)
        if sequence.error is None:
            self._end(sequence)
        sequence.context.finish(sequence.ids[0].tolist() if sequence.error is None else None)
        engine.forget_mixed(sequence.context, sequence.run.prompt_tokens)
        self._count()

    def _end(self, sequence: DecodingSequence) -> None:
        engine, run = self._engine, sequence.run
        try:
            run.end_check(engine.model_spec.dtype)
        except GriffinError as error:
            sequence.error = error
            return
        report = self._report(run, sequence.answer.numel(), sequence.seconds)
        sequence.report = replace(report, activation_kept=sequence.activation_kept)

    def leave_all(self, error: Exception) -> list[DecodingSequence]:
        """All of them, ended by `error`."""
        gone = list(self.running)
        for sequence in gone:
            sequence.done, sequence.error = True, error
            self.leave(sequence)
        self._selected = None
        return gone

    def abandon(self) -> None:
        """Forget all of them, also outside of `working`."""
        self.running.clear()
        self._selected = None
        self._engine.decode_beside(())


# Many prompts, from Python.


@dataclass(frozen=True)
class GeneratedAnswer:
    """The answer to prompt number `index`: its `tokens` [T], without the prompt."""

    index: int
    tokens: Tensor
    report: RunReport


class _Model(Protocol):
    @property
    def keeps_contexts(self) -> bool: ...
    @property
    def engine(self) -> ModelRunner: ...
    @property
    def last_report(self) -> RunReport | None: ...
    def generate(self, inputs: Tensor, **kwargs: Any) -> Any: ...


_MODE = ("exact", "draft_tokens", "refresh")  # of `generate` alone
_Asked = tuple[Tensor, dict[str, Any]]


def answers(model: _Model, scheduler: SequenceScheduler, prompts: Iterator[_Asked]) -> Iterator[GeneratedAnswer]:
    """Answers to `prompts`, each with its arguments, in the order in which they end."""
    numbered = enumerate(prompts)
    waiting = next(numbered, None)
    numbers: dict[DecodingSequence, int] = {}
    try:
        while waiting is not None or scheduler.running:
            if waiting is not None and not scheduler.running and _needs_the_model(model, waiting[1][1]):
                yield _alone(model, *waiting)
                waiting = next(numbered, None)
                continue
            ended: list[DecodingSequence] = []
            with scheduler.working():
                must_wait = False
                while not ended:
                    if waiting is not None and not must_wait and scheduler.has_room:
                        begun = _begin(model, scheduler, waiting[1])
                        must_wait = begun is None
                        if begun is not None:
                            numbers[begun] = waiting[0]
                            waiting = next(numbered, None)
                    ended = scheduler.step()
            for sequence in ended:
                if sequence.error is not None:
                    raise sequence.error
                assert sequence.report is not None, "it has ended well"
                yield GeneratedAnswer(numbers.pop(sequence), sequence.answer, sequence.report)
    finally:
        scheduler.abandon()


def _begin(model: _Model, scheduler: SequenceScheduler, asked: _Asked) -> DecodingSequence | None:
    """The sequence that has begun; None while it has to wait for the end of others."""
    if _needs_the_model(model, asked[1]):
        return None
    try:
        return scheduler.begin(asked[0], **{name: value for name, value in asked[1].items() if name not in _MODE})
    except HasToWait:
        return None


def _needs_the_model(model: _Model, arguments: dict[str, Any]) -> bool:
    """Whether these arguments are for `generate` alone: passes between tokens, or layers that keep a state."""
    config = model.engine.loaded.layers.config
    exact, drafts, refresh = (arguments.get(name, getattr(config, name)) for name in _MODE)
    return exact or drafts is not None or isinstance(refresh, int) or not model.keeps_contexts


def _alone(model: _Model, index: int, asked: _Asked) -> GeneratedAnswer:
    prompt, arguments = asked
    seed = arguments.pop("seed", None)
    devices = [] if prompt.device.type == "cpu" else [prompt.device]
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        output = model.generate(prompt, **(ONE_ANSWER | arguments))
    assert model.last_report is not None, "it has ended well"
    return GeneratedAnswer(index, output[0, prompt.shape[1] :], model.last_report)
