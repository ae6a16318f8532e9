"""Answers on their way, beside others: what transformers' `generate` prepared for each, and its tokens so far. And many
prompts, from Python: answered by a scheduler as far as they may be, else one after the other.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from griffin_offload.engine.arguments import ONE_ANSWER
from griffin_offload.engine.generation import GenerationState
from griffin_offload.engine.report import RunReport
from griffin_offload.engine.residents import Loaded
from griffin_offload.engine.structure import Structure, StructureGuide
from griffin_offload.errors import GriffinError
from griffin_offload.transformers_api import StockModel


class HasToWait(GriffinError):
    """A sequence cannot join those that are being decoded; it may when some of them have left."""


class NextPass(HasToWait):
    """It may join those that are being decoded, but not by the pass of the prompts that are prepared: by the next."""


class PreparedAnswer:
    """What transformers' `generate` makes of its arguments, given as its `custom_generate`: nothing is generated."""

    def __init__(self, streamer: Any) -> None:
        self.streamer = streamer  # `generate` itself gives it the prompt, and to what it calls here no streamer

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
class ActivationShare:
    """What an answer's own activation had of the resident neurons while so many tokens were generated."""

    kept: float
    tokens: int = 0


Seed = int | torch.Generator | None


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    if seed is None:
        seed = int(torch.randint(2**62, (), dtype=torch.int64, device="cpu"))
    return torch.Generator(device).manual_seed(seed)


class DecodingEngine(Protocol):
    """What an answer on its way asks of its model (a `ModelRunner`)."""

    run: GenerationState | None

    @property
    def loaded(self) -> Loaded: ...
    def observe(self, logits: Tensor) -> None: ...


class DecodingSequence:
    """One answer on its way."""

    def __init__(self, engine: DecodingEngine, run: GenerationState, ready: PreparedAnswer, seed: Seed) -> None:
        assert run.context is not None, "a sequence of its own"
        self._engine, self.run, self.context = engine, run, run.context
        self._processor, self._criteria, self._config = ready.processor, ready.criteria, ready.config
        self._streamer = ready.streamer
        self.ids, self._kwargs, self._prompt_tokens = ready.ids, ready.kwargs, ready.ids.shape[1]
        self._random = seed if isinstance(seed, torch.Generator) else _generator(seed, self.ids.device)
        self._started = time.perf_counter()
        self._shares: list[ActivationShare] = []
        self.done = False
        self.error: Exception | None = None
        """What ended it, if it did not end well."""
        self.report: RunReport | None = None
        """When it has ended well."""

    @property
    def prompt(self) -> Tensor:
        """Its prompt's tokens [1, T]."""
        return self.ids[:, : self._prompt_tokens]

    @property
    def answer(self) -> Tensor:
        """Its tokens so far [T], without the prompt."""
        return self.ids[0, self._prompt_tokens :]

    def result(self) -> RunReport:
        """Of one that has ended: its report. Raises what ended it, if it did not end well."""
        if self.error is not None:
            raise self.error
        assert self.report is not None, "it has ended well"
        return self.report

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
        """A token from logits [1, V] of a step with others, or of a pass with theirs."""
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
        if self._streamer is not None:
            self._streamer.put(token[0].cpu())
        self.done = bool(self._criteria(self.ids, None).all())
        if self.done and self._streamer is not None:
            self._streamer.end()

    def close(self) -> None:
        """Nothing more is asked of what computes beside it."""
        if self.run.guide is not None:
            self.run.guide.close()

    def share_anew(self) -> None:
        """Others have joined, or this one: the resident neurons are not those of before."""
        layers = self._engine.loaded.layers
        self.context.selected = layers.selected
        kept = self.context.share_kept(layers.config.batch_statistic, layers.feed_forwards)
        self._shares.append(ActivationShare(kept))

    @property
    def activation_kept(self) -> float:
        """Share of this answer's own activation in the resident neurons, mean over its tokens."""
        tokens = sum(share.tokens for share in self._shares)
        if not tokens:
            return self._shares[-1].kept
        return sum(share.kept * share.tokens for share in self._shares) / tokens


# Many prompts.


@dataclass(frozen=True)
class GeneratedAnswer:
    """The answer to prompt number `index`: its `tokens` [T], without the prompt."""

    index: int
    tokens: Tensor
    report: RunReport


class _Engine(Protocol):
    @property
    def loaded(self) -> Loaded: ...


class _Model(Protocol):
    @property
    def keeps_contexts(self) -> bool: ...
    @property
    def engine(self) -> _Engine: ...
    @property
    def last_report(self) -> RunReport | None: ...
    def generate(self, inputs: Tensor, **kwargs: Any) -> Any: ...
    def guide(self, structure: Structure | None, arguments: dict[str, object]) -> StructureGuide | None: ...


class _Scheduler(Protocol):
    """What is asked of a `SequenceScheduler`."""

    running: list[DecodingSequence]

    @property
    def has_room(self) -> bool: ...
    def working(self) -> AbstractContextManager[None]: ...
    def prepare(self, prompt: Tensor, **arguments: Any) -> DecodingSequence: ...
    def join(self) -> None: ...
    def step(self) -> list[DecodingSequence]: ...
    def abandon(self) -> None: ...


_MODE = ("exact", "draft_tokens", "refresh")  # of `generate` alone
_Asked = tuple[Tensor, dict[str, Any]]


def answers(model: _Model, scheduler: _Scheduler, prompts: Iterator[_Asked]) -> Iterator[GeneratedAnswer]:
    """Answers to `prompts`, each with its arguments, in the order in which they end."""
    row = _Row(model, scheduler, prompts)
    try:
        while row.waiting is not None or scheduler.running:
            if row.waiting is not None and not scheduler.running and _needs_the_model(model, row.waiting[1][1]):
                yield _alone(model, *row.waiting)
                row.take_next()
                continue
            ended: list[DecodingSequence] = []
            with scheduler.working():
                must_wait = False
                while not ended:
                    must_wait = must_wait or row.begin()
                    ended = scheduler.step()
            for sequence in ended:
                report = sequence.result()
                yield GeneratedAnswer(row.numbers.pop(sequence), sequence.answer, report)
    finally:
        scheduler.abandon()


class _Row:
    """Prompts that come to a scheduler in their order. `waiting` is the next one; None: there are no more."""

    def __init__(self, model: _Model, scheduler: _Scheduler, prompts: Iterator[_Asked]) -> None:
        self._model, self._scheduler, self._prompts = model, scheduler, enumerate(prompts)
        self.numbers: dict[DecodingSequence, int] = {}
        """Of those that have begun."""
        self.take_next()

    def take_next(self) -> None:
        self.waiting: tuple[int, _Asked] | None = next(self._prompts, None)

    def begin(self) -> bool:
        """Let as many begin as pass together. Whether the next one has to wait for the end of others."""
        begun, must_wait = [], False
        while self.waiting is not None and self._scheduler.has_room:
            try:
                sequence = self._prepared(self.waiting[1])
            except NextPass:
                break
            except HasToWait:
                must_wait = True
                break
            begun.append(sequence)
            self.numbers[sequence] = self.waiting[0]
            self.take_next()
        if begun:
            self._scheduler.join()
        for sequence in begun:
            if sequence.error is not None:
                raise sequence.error
        return must_wait

    def _prepared(self, asked: _Asked) -> DecodingSequence:
        if _needs_the_model(self._model, asked[1]):
            raise HasToWait("it has the model alone")
        arguments = {name: value for name, value in asked[1].items() if name not in (*_MODE, "lookup")}
        guide = self._model.guide(arguments.pop("structure", None), arguments)
        return self._scheduler.prepare(asked[0], guide=guide, **arguments)


def _needs_the_model(model: _Model, arguments: dict[str, Any]) -> bool:
    """Whether these arguments are for `generate` alone: passes between tokens, or layers that keep a state."""
    config = model.engine.loaded.layers.config
    exact, drafts, refresh = (arguments.get(name, getattr(config, name)) for name in _MODE)
    return (
        exact or arguments.get("lookup") or drafts is not None or isinstance(refresh, int) or not model.keeps_contexts
    )


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
