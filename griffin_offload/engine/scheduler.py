"""Several answers at once: sequences that decode together, and join and leave between tokens.

A sequence joins by the streamed pass of its prompt, which prompts that wait together share; then every step computes a
token of each (`JointStep`). Which neurons are resident is a matter of all of them: each pass chooses by the sum of
their length-normalised statistics, and so an answer's share of activation changes when others join. Sampling,
penalties, stop strings and seeds are a sequence's own: transformers' `generate` prepares them as for an answer alone.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from griffin_offload.config import MOST_TOGETHER, RESIDENT_PROMPT_TOKENS
from griffin_offload.devices.memory import OutOfMemoryAsError
from griffin_offload.devices.threads import limited_threads
from griffin_offload.engine.arguments import ONE_ANSWER, LoadedModel, empty_context, prepared
from griffin_offload.engine.decoding import DecodingEngine, DecodingSequence, HasToWait, NextPass, PreparedAnswer, Seed
from griffin_offload.engine.generation import GenerationMode, GenerationState, probabilities_named
from griffin_offload.engine.joint_step import JointStep
from griffin_offload.engine.options import checked_arguments, checked_prompt
from griffin_offload.engine.report import RunReport
from griffin_offload.engine.residents import Loaded
from griffin_offload.engine.spec import ModelSpec
from griffin_offload.engine.structure import StructureGuide
from griffin_offload.errors import DoesNotFit, GriffinError
from griffin_offload.kv_cache.kv_cache import KVCache
from griffin_offload.kv_cache.sequence import Context
from griffin_offload.kv_cache.workload import Workload
from griffin_offload.transformers_api import StockCache

_CHECK_TOKENS = 4


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
    def decode_beside(self, contexts: Sequence[Context], passing: Sequence[Workload] = ()) -> None: ...
    def pass_together(self, runs: Sequence[tuple[GenerationState, Context]], prompts: Sequence[Tensor]) -> Tensor: ...
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
        self._prepared: list[DecodingSequence] = []
        self._selected: dict[int, Tensor] | None = None

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The model is this scheduler's inside: other callers of it wait."""
        engine = self._engine
        with engine.alone(), engine.loaded.ledger.measuring(), limited_threads(engine.loaded.threads):
            engine.loaded.layers.restrict(drafting=False)
            self._beside()
            yield

    @property
    def has_room(self) -> bool:
        """Whether one more may begin. Of the first two it is tried whether the model computes them together at all."""
        others = [*self.running, *self._prepared]
        if not others:
            return True
        if len(others) >= self.most or any(self._alone(sequence.run.use) for sequence in others):
            return False
        return self._tried.why_alone is None

    @property
    def _tried(self) -> JointStep:
        """What computes several together, after it was tried."""
        engine, config = self._engine, self._engine.loaded.model.config
        engine.joint.check(
            lambda: KVCache(config, ctx_tokens=_CHECK_TOKENS, bits=engine.plan.kv_bits), engine.model_spec.device
        )
        return engine.joint

    def begin(self, prompt: Tensor, **arguments: Any) -> DecodingSequence:
        """`prepare` one sequence and let it `join` by itself, with its error as one of this call."""
        assert not self._prepared, "those come first"
        sequence = self.prepare(prompt, **arguments)
        self.join()
        if sequence.error is not None:
            raise sequence.error
        return sequence

    def prepare(
        self,
        prompt: Tensor,
        *,
        context: Context | None = None,
        seed: Seed = None,
        guide: StructureGuide | None = None,
        **arguments: Any,
    ) -> DecodingSequence:
        """An answer to a prompt [1, T], behind what `context` knows of it, for the next `join`. `arguments` are those
        of `generate` for one sequence; `seed` is a number, or what draws; without it torch's global generator gives
        one. With a `guide` it is kept to a structure.

        HasToWait where it would fit if others were not there, NextPass where those that are prepared have to pass
        first; whatever `generate` raises of its arguments. The others go on as before.
        """
        engine = self._engine
        with engine.guarded():
            context = empty_context(engine, 1) if context is None else context
            run, ready = self._checked(prompt, context, arguments if guide is None else guide.among(arguments))
            run.guide = guide
            sequence = DecodingSequence(engine, run, ready, seed)
            self._prepared.append(sequence)
            self._beside()
        return sequence

    def join(self) -> None:
        """Let the prompts of all that are prepared pass, together where there are several: their answers begin beside
        the others. One whose first token fails has an `error` and is not among the running ones. What is raised of the
        pass concerns all that were prepared; the others go on as before."""
        engine, sequences = self._engine, self._prepared
        self._prepared = []
        before = engine.loaded.layers.fetched_bytes, engine.embedding_bytes
        try:
            with engine.guarded(), probabilities_named(engine.model_spec.dtype):
                self._pass(sequences)
        except BaseException:
            self._drop(sequences)  # a pass that was cut short chose for some layers: `step` gathers what was before
            raise
        self._drop([sequence for sequence in sequences if sequence.error is not None])
        joined = [sequence for sequence in sequences if sequence.error is None]
        if not joined:
            return
        for other in self.running:  # what these prompts have streamed is none of theirs
            other.run.fetched_bytes += engine.loaded.layers.fetched_bytes - before[0]
            other.run.embedding_bytes += engine.embedding_bytes - before[1]
        self.running += joined
        self._chosen()

    def _pass(self, sequences: Sequence[DecodingSequence]) -> None:
        """The first token of each."""
        self._beside()
        if len(sequences) == 1:
            sequences[0].first()
            return
        runs = [(sequence.run, sequence.context) for sequence in sequences]
        logits = self._engine.pass_together(runs, [sequence.prompt for sequence in sequences])
        for row, sequence in enumerate(sequences):
            self._try(sequence, partial(sequence.take, logits[row : row + 1]))

    def _drop(self, sequences: Sequence[DecodingSequence]) -> None:
        """These have not joined."""
        for sequence in sequences:
            sequence.close()
            sequence.context.finish(None)
        self._count()

    def _beside(self) -> None:
        """Tell the engine who is there: those that are decoded, and those that are prepared."""
        contexts = [sequence.context for sequence in self.running]
        self._engine.decode_beside(contexts, [sequence.run.use for sequence in self._prepared])

    def _checked(
        self, prompt: Tensor, context: Context, arguments: dict[str, object]
    ) -> tuple[GenerationState, PreparedAnswer]:
        engine, ready = self._engine, PreparedAnswer(arguments.get("streamer"))
        prompt = checked_prompt(prompt, engine.shape.vocab_size).to(engine.model_spec.device)
        refresh = engine.loaded.layers.config.refresh
        mode = GenerationMode(refresh="never" if refresh == "never" else "turn", lookup=False)
        reason = self._why_next(prompt, context)
        if reason is not None:
            raise NextPass(reason)
        try:
            arguments = ONE_ANSWER | checked_arguments(arguments, prompt)
            run, kwargs = prepared(engine, prompt, arguments, mode, context)
        except DoesNotFit as error:
            if not self.running and not self._prepared:
                raise
            raise (NextPass if self._prepared else HasToWait)(str(error)) from error
        if (self.running or self._prepared) and self._alone(run.use):
            raise HasToWait(f"beyond {run.use.ctx_tokens} tokens its positions are turned by angles of its own")
        run.joint, run.ready = True, context.start(prompt[0], exact=False)
        run.cached_tokens = len(context.tokens)
        engine.loaded.model.generate(prompt, custom_generate=ready, **kwargs)
        return run, ready

    def _why_next(self, prompt: Tensor, context: Context) -> str | None:
        """Why a prompt, behind what `context` knows of it, does not pass together with those that are prepared; None if
        it may, or where there are none. It passes alone then, like the prompts of models of `why_prompts_alone`. What
        has more tokens than a planned prompt is not let in, so that no pass takes longer, or more workspace."""
        if not self._prepared or prompt.dim() != 2:  # other prompts are refused by name
            return None
        joint, plan, runs = self._tried, self._engine.plan, [sequence.run for sequence in self._prepared]
        lengths = [prompt.shape[1], *(run.prompt_tokens for run in runs)]
        if joint.why_prompts_alone is not None:
            return joint.why_prompts_alone
        if context.known(prompt[0], exact=False) or any(run.cached_tokens for run in runs):
            return "a prompt goes on from what is kept"
        if not all(map(joint.fits_windows, lengths)):
            return "a prompt is longer than the window of a layer"
        resident = not plan.streamed and self._engine.model_spec.hardware.computes_on_cpu
        most = min(plan.prompt_tokens, RESIDENT_PROMPT_TOKENS if resident else plan.prompt_tokens)
        if sum(lengths) > most:
            return f"prompts of {sum(lengths)} tokens in all are more than the {most} that may pass together"
        return None

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
        self._beside()
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
                caches = [sequence.context.cache for sequence in going_on]
                logits = engine.joint(tokens, caches, reports=[sequence.run.graphs for sequence in going_on])
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
        for sequence in [*self.running, *self._prepared]:
            sequence.close()
        self.running.clear()
        self._prepared.clear()
        self._selected = None
        self._engine.decode_beside(())
