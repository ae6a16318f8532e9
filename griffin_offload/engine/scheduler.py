"""Several answers at once: sequences that decode together, and join and leave between tokens.

A sequence joins by the streamed pass of its prompt; then every step computes a token of each (`JointStep`). Which
neurons are resident is a matter of all of them: each pass chooses by the sum of their length-normalised statistics, and
so an answer's share of activation changes when others join. Sampling, penalties, stop strings and seeds are a
sequence's own: transformers' `generate` prepares them as for an answer alone.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from griffin_offload.config import MOST_TOGETHER
from griffin_offload.devices.memory import OutOfMemoryAsError
from griffin_offload.devices.threads import limited_threads
from griffin_offload.engine.arguments import ONE_ANSWER, LoadedModel, empty_context, prepared
from griffin_offload.engine.decoding import DecodingEngine, DecodingSequence, PreparedAnswer, Seed
from griffin_offload.engine.generation import GenerationMode, GenerationState, probabilities_named
from griffin_offload.engine.joint_step import JointStep
from griffin_offload.engine.options import checked_arguments, checked_prompt
from griffin_offload.engine.report import RunReport
from griffin_offload.engine.residents import Loaded
from griffin_offload.engine.spec import ModelSpec
from griffin_offload.engine.structure import Structure, StructureGuide
from griffin_offload.errors import DoesNotFit, GriffinError
from griffin_offload.kv_cache.kv_cache import KVCache
from griffin_offload.kv_cache.sequence import Context
from griffin_offload.kv_cache.workload import Workload
from griffin_offload.transformers_api import StockCache

_CHECK_TOKENS = 4


class HasToWait(GriffinError):
    """A sequence cannot join those that are being decoded; it may when some of them have left."""


class _Passes(Protocol):
    def keep_resident(self, selected: dict[int, Tensor]) -> None: ...


class _Sizes(Protocol):
    @property
    def vocab_size(self) -> int: ...


class JointEngine(DecodingEngine, LoadedModel, Protocol):
    """What is asked of a model whose sequences are decoded together (a `ModelRunner`)."""

    @property
    def loaded(self) -> Loaded: ...
    @property
    def model_spec(self) -> ModelSpec: ...
    @property
    def joint(self) -> JointStep: ...
    @property
    def passes(self) -> _Passes: ...
    @property
    def shape(self) -> _Sizes: ...
    @property
    def embedding_bytes(self) -> int: ...
    def alone(self) -> AbstractContextManager[None]: ...
    def guarded(self) -> OutOfMemoryAsError: ...
    def decode_beside(self, contexts: Sequence[Context]) -> None: ...
    def hold(self, use: Workload, new_tokens: int, cache: StockCache | None) -> None: ...
    def forget_mixed(self, context: Context, prompt_tokens: int) -> None: ...


class SequenceScheduler:
    """The sequences that are being decoded by a model, at most `most`.

    All calls but `working` are made inside of that. A step that fails as a whole ends all sequences: `abandon`.
    """

    def __init__(
        self, engine: JointEngine, report: Callable[[GenerationState, int, float], RunReport], most: int = MOST_TOGETHER
    ) -> None:
        self._engine, self._report, self.most = engine, report, most
        self.running: list[DecodingSequence] = []
        self._selected: dict[int, Tensor] | None = None

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The model is this scheduler's inside: other callers of it wait."""
        engine = self._engine
        with engine.alone(), engine.loaded.ledger.measuring(), limited_threads(engine.loaded.threads):
            engine.loaded.layers.restrict(drafting=False)
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
        self,
        prompt: Tensor,
        *,
        context: Context | None = None,
        seed: Seed = None,
        guide: StructureGuide | None = None,
        **arguments: Any,
    ) -> DecodingSequence:
        """Let a prompt [1, T] pass, behind what `context` knows of it, and its answer join the others. `arguments` are
        those of `generate` for one sequence; `seed` is a number, or what draws; without it torch's global generator
        gives one. With a `guide` it is kept to a structure.

        HasToWait where it would fit if others were not there; whatever `generate` raises of its arguments or its
        prompt. The others go on as before.
        """
        engine = self._engine
        with engine.guarded():
            context = empty_context(engine, 1) if context is None else context
            run, ready = self._prepared(prompt, context, arguments if guide is None else guide.among(arguments))
            run.guide = guide
            sequence = DecodingSequence(engine, run, ready, seed)
            before = engine.loaded.layers.fetched_bytes, engine.embedding_bytes
            try:
                with probabilities_named(engine.model_spec.dtype):
                    sequence.first()
            except BaseException:
                sequence.close()
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
        self, prompt: Tensor, context: Context, arguments: dict[str, object]
    ) -> tuple[GenerationState, PreparedAnswer]:
        engine, ready = self._engine, PreparedAnswer()
        prompt = checked_prompt(prompt, engine.shape.vocab_size).to(engine.model_spec.device)
        refresh = engine.loaded.layers.config.refresh
        mode = GenerationMode(refresh="never" if refresh == "never" else "turn", lookup=False)
        try:
            arguments = ONE_ANSWER | checked_arguments(arguments, prompt)
            run, kwargs = prepared(engine, prompt, arguments, mode, context)
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
        engine.loaded.ledger.hold(kv_cache=0)  # of the prompt that has passed: counted among those that are decoded
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
        engine.decode_beside([other.context for other in self.running])
        if sequence.error is None:
            self._end(sequence)
        sequence.close()
        sequence.context.finish(sequence.ids[0].tolist() if sequence.error is None else None)
        engine.forget_mixed(sequence.context, sequence.run.prompt_tokens)
        self._count()

    def _end(self, sequence: DecodingSequence) -> None:
        engine, run = self._engine, sequence.run
        try:
            run.end_check(engine.model_spec.dtype)
            if run.guide is not None:
                run.guide.complete([sequence.answer.tolist()])
        except GriffinError as error:
            sequence.error = error
            return
        report = self._report(run, sequence.answer.numel(), sequence.seconds)
        sequence.report = replace(report, activation_kept=sequence.activation_kept)

    def abandon(self) -> None:
        """Forget all of them, also outside of `working`."""
        for sequence in self.running:
            sequence.close()
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
    def engine(self) -> JointEngine: ...
    @property
    def last_report(self) -> RunReport | None: ...
    def generate(self, inputs: Tensor, **kwargs: Any) -> Any: ...
    def guide(self, structure: Structure | None, arguments: dict[str, object]) -> StructureGuide | None: ...


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
    arguments = {name: value for name, value in asked[1].items() if name not in (*_MODE, "lookup")}
    try:
        guide = model.guide(arguments.pop("structure", None), arguments)
        return scheduler.begin(asked[0], guide=guide, **arguments)
    except HasToWait:
        return None


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
