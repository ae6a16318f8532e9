"""Many prompts, from Python: answered by a scheduler as far as they may be, else one after the other."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from griffin_offload.engine.arguments import ONE_ANSWER
from griffin_offload.engine.decoding import DecodingSequence, HasToWait, NextPass
from griffin_offload.engine.report import RunReport
from griffin_offload.engine.residents import Loaded
from griffin_offload.engine.structure import Structure, StructureGuide


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
                if sequence.error is not None:
                    raise sequence.error
                assert sequence.report is not None, "it has ended well"
                yield GeneratedAnswer(row.numbers.pop(sequence), sequence.answer, sequence.report)
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
