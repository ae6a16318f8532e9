"""One request on the worker's thread: every prompt, every answer, one after the other, alone or beside others'."""

import contextlib
import secrets
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from griffin_offload.engine.arguments import ONE_ANSWER
from griffin_offload.engine.decoding import DecodingSequence, HasToWait, NextPass
from griffin_offload.engine.model import GriffinModel
from griffin_offload.engine.report import RunReport
from griffin_offload.engine.scheduler import SequenceScheduler
from griffin_offload.errors import DoesNotFit
from griffin_offload.kv_cache.sequence import Context
from griffin_offload.serving.answer_parts import Part, PartsShown, parts_shown
from griffin_offload.serving.logprobs import CountPenalties, LogitBias, LogprobRecorder, TokenLogprob
from griffin_offload.serving.queue import Finish, Finished, Job, Piece, Progress
from griffin_offload.serving.requests import NO_PENALTIES, sampling_of
from griffin_offload.serving.text_stream import Detokeniser, StopHolder, whole_text
from griffin_offload.serving.tokenization import structure_of

# One answer while it is generated: tokens become text, stop strings end it, an interruption, too.


class Answer(StoppingCriteria):  # type: ignore[misc]
    """Asked after every token whether to go on, which is where it learns of the token: all but the first
    `prompt_tokens` are the answer's.

    `show` is called with text and the tokens that begin in it; tokens of which nothing is shown are left out.
    `interrupted` is asked once a token. `ends` are the ids that end a sequence.
    """

    def __init__(
        self,
        prompt_tokens: int,
        detokeniser: Detokeniser,
        holder: StopHolder,
        recorder: LogprobRecorder | None,
        ends: Collection[int],
        show: Callable[[str, tuple[TokenLogprob, ...]], None],
        interrupted: Callable[[], bool],
        parts: PartsShown | None = None,
        echo: str = "",
    ) -> None:
        self._detokeniser, self._holder, self._recorder = detokeniser, holder, recorder
        self._ends, self._show, self._interrupted = ends, show, interrupted
        self._parts, self._echo, self._seen = parts, echo, prompt_tokens
        self._letters = 0
        self._waiting: deque[TokenLogprob] = deque()
        self.interrupted = self._ended = False

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        tokens = input_ids[0, self._seen :].tolist()
        self._seen = input_ids.shape[1]
        if self._echo:
            self._show(self._echo, ())
            self._echo = ""
        for token in tokens:
            self._add(token)
        self.interrupted = self.interrupted or self._interrupted()
        done = self._holder.stopped or self.interrupted
        return torch.full((1,), done, dtype=torch.bool, device=input_ids.device)

    def _add(self, token: int) -> None:
        if token in self._ends:
            self._ended = True
            return
        if self._recorder is not None:
            self._waiting.append(self._recorder.record(token, self._letters))
        self._grow(self._detokeniser.feed(token))

    def _grow(self, text: str) -> None:
        self._letters += len(text)
        shown = self._holder.feed(text)
        self._give(shown, self._holder.released)

    def _give(self, text: str, before: int) -> None:
        """Show `text`, and the tokens that begin in front of letter `before`."""
        tokens = []
        while self._waiting and self._waiting[0].offset < before:
            tokens.append(self._waiting.popleft())
        if text or tokens:
            self._show(text, tuple(tokens))

    def finish(self, *, over: bool = False) -> Finish:
        """The generation is over: show what was held back, and say why it ended; `over`: nothing could follow."""
        if not self._holder.stopped:
            self._grow(self._detokeniser.flush())
        if not self._holder.stopped:
            self._give(self._holder.flush(), self._letters + 1)
        stopped = over or self._ended or self._holder.stopped
        called = self._parts is not None and self._parts.finish()
        return "length" if not stopped else "tool_calls" if called else "stop"


class Interrupted(Exception):
    """Nobody waits for the answer any more, or nobody may."""


class KeptContexts(Protocol):
    """Contexts of earlier requests."""

    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def take(self, ids: Tensor, *, exact: bool, beside_bytes: int = 0) -> Context: ...
    def keep(self, context: Context) -> None: ...
    def drop_all(self) -> None: ...


class Held(Protocol):
    """The model in the worker's hands, and what belongs to it."""

    @property
    def model(self) -> GriffinModel: ...
    @property
    def sessions(self) -> KeptContexts | None: ...
    @property
    def chat_ends(self) -> frozenset[int]: ...
    @property
    def text_ends(self) -> frozenset[int]: ...


def answer_all(held: Held, job: Job, interrupted: Callable[[], bool]) -> None:
    """Deliver every answer of `job`. Interrupted, when `interrupted` says so: after a token, or a layer of a streamed
    pass. Any GriffinError of `generate`."""
    torch.manual_seed(_seed_of(job))
    generation = _Generation(held, job, interrupted)
    for index, prompt in enumerate(job.prompts):
        ids = _as_ids(prompt)
        with generation.context_for(ids) as context:
            for number in range(job.request.n):
                choice = index * job.request.n + number
                job.figures.add(generation.answer(ids, context, job.max_tokens[index], choice), first=number == 0)


def why_not_beside(held: Held, job: Job) -> str | None:
    """Why `job` is not answered beside others; None if it may be."""
    config = held.model.engine.loaded.layers.config
    if config.exact if job.request.exact is None else job.request.exact:
        return "exact mode verifies its own drafts"
    if isinstance(config.refresh, int):
        return f"refresh={config.refresh} streams between its tokens"
    return held.model.why_alone if held.sessions is not None else "no context can be kept"


def _seed_of(job: Job) -> int:
    return secrets.randbits(63) if job.request.seed is None else job.request.seed


def _as_ids(prompt: list[int]) -> Tensor:
    return torch.tensor([prompt], dtype=torch.long, device="cpu")


class _Generation:
    """The answers to one job."""

    def __init__(self, held: Held, job: Job, interrupted: Callable[[], bool]) -> None:
        self._held, self._model, self._job, self._interrupted = held, held.model, job, interrupted
        self._request, self._tokenizer = job.request, held.model.tokenizer
        self._ends = held.chat_ends if job.request.endpoint == "chat" else held.text_ends

    @property
    def _ending_words(self) -> set[int]:
        """Special tokens among the checkpoint's stop strings: they have no text to be found in."""
        vocabulary = self._tokenizer.get_added_vocab()
        return {vocabulary[word] for word in _texts(self._model.generation_config.stop_strings) if word in vocabulary}

    @contextlib.contextmanager
    def context_for(self, ids: Tensor) -> Iterator[Context | None]:
        """The kept context that knows most of the prompt `ids` [1, T]; it is kept again afterwards. None for models
        of which none can be kept."""
        sessions, engine = self._held.sessions, self._model.engine
        if sessions is None:
            yield None
            return
        loaded = engine.loaded.layers.config.exact
        exact = loaded if self._request.exact is None else self._request.exact
        context = sessions.take(ids[0], exact=exact, beside_bytes=sum(other.nbytes for other in engine.beside))
        engine.keep_idle(sessions.nbytes)
        try:
            yield context
        except BaseException:
            if exact:
                context.clear()  # a verifying pass that was cut short has faded its statistic
            raise
        finally:
            sessions.keep(context)
            engine.keep_idle(sessions.nbytes)

    def answer(self, ids: Tensor, context: Context | None, max_tokens: int, choice: int) -> RunReport:
        """Deliver one answer to the prompt `ids` [1, T]."""
        before, sessions = self._job.tokens, self._held.sessions
        try:
            return self._answer(ids, context, max_tokens, choice)
        except DoesNotFit:
            if self._job.tokens > before or not sessions:
                raise
        # It needs more than the plan, as exact mode may: what is kept for others has to go.
        sessions.drop_all()
        self._model.engine.keep_idle(0)
        return self._answer(ids, context, max_tokens, choice)

    def _answer(self, ids: Tensor, context: Context | None, max_tokens: int, choice: int) -> RunReport:
        model = self._model
        answer, arguments = self.asked(ids, max_tokens, choice)
        with self.watching():
            structure = structure_of(self._request, self._tokenizer)
            model.generate(ids, context=context, exact=self._request.exact, structure=structure, **arguments)
        assert model.last_report is not None, "a generate that ended well has a report"
        self.finish(answer, choice, model.last_report, context)
        return model.last_report

    def asked(self, ids: Tensor, max_tokens: int, choice: int) -> tuple[Answer, dict[str, Any]]:
        """What an answer is taken by, and arguments of `generate` for it."""
        request, recorder = self._request, None
        if request.top_logprobs is not None:
            chat = request.endpoint == "chat"
            recorder = LogprobRecorder(self._tokenizer, request.top_logprobs, begins=chat)
        bias = LogitBias(request.logit_bias) if request.logit_bias else None
        counted, asked = None, (request.presence_penalty, request.frequency_penalty)
        if any(asked):
            counted = CountPenalties(ids.shape[1], *asked)
        answer = self._new_answer(ids, recorder, choice)
        return answer, {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": max_tokens,
            **ONE_ANSWER,
            **({"eos_token_id": sorted(self._ends)} if self._ends else {}),
            "stopping_criteria": StoppingCriteriaList([answer]),
            "logits_processor": LogitsProcessorList([one for one in (recorder, bias, counted) if one is not None]),
            **(NO_PENALTIES | sampling_of(request, self._model.generation_config)),
        }

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, a streamed pass ends with a layer after which nobody waits any more."""
        with _watched(self._model, self.layer_done):
            yield

    def finish(self, answer: Answer, choice: int, report: RunReport, context: Context | None) -> None:
        """Say that `answer` is complete; Interrupted if it is not."""
        if answer.interrupted:
            raise Interrupted
        if context is not None:
            layers = self._model.engine.loaded.layers
            kept = context.shares_kept(layers.config.batch_statistic)
            self._job.figures.kept_by_layer = [kept.get(index, 1.0) for index in range(len(layers.decoder))]
        over = report.structure is not None and report.structure.over
        self._job.deliver(Finished(choice, answer.finish(over=over)))

    def _new_answer(self, ids: Tensor, recorder: LogprobRecorder | None, choice: int) -> Answer:
        prompt: list[int] = ids[0].tolist()
        chat, parts = self._request.endpoint == "chat", None

        def deliver(part: Part, tokens: tuple[TokenLogprob, ...]) -> None:
            self._job.deliver(Piece(choice, part.text, tokens, part.kind, part.call, self._job.tokens))

        if chat:
            parts = parts_shown(self._tokenizer, prompt, self._request.tools.functions, deliver)
        return Answer(
            ids.shape[1],
            Detokeniser(self._tokenizer, () if chat else prompt, () if parts is None else parts.kept),
            StopHolder((*self._request.stops, *_texts(self._model.generation_config.stop_strings))),
            recorder,
            ends=self._ends | self._ending_words,
            show=parts.show if parts is not None else lambda text, tokens: deliver(Part(text), tokens),
            interrupted=self._token_done,
            parts=parts,
            echo=whole_text(self._tokenizer, prompt) if self._request.echo else "",
        )

    def _token_done(self) -> bool:
        self._job.token()
        return self._interrupted()

    def layer_done(self, done: int, layers: int) -> None:
        if self._interrupted():
            raise Interrupted
        if self._request.return_progress:
            self._job.deliver(Progress(done, layers))


class JobBeside:
    """A job whose answers are decoded beside those of others, one of its own at a time.

    Errors are those of `answer_all`. HasToWait from `prepare_next`, which may be called again when others have left,
    and NextPass, when those that are prepared have passed.
    """

    def __init__(self, held: Held, job: Job, scheduler: SequenceScheduler, interrupted: Callable[[], bool]) -> None:
        self.job, self._held, self._scheduler = job, held, scheduler
        self._generation = _Generation(held, job, interrupted)
        self._interrupted, self.layer_done = interrupted, self._generation.layer_done
        self._random = torch.Generator(held.model.device).manual_seed(_seed_of(job))
        self._choice = 0
        self._context = contextlib.ExitStack()
        self._of_prompt: Context | None = None
        self._answer: Answer | None = None
        self.sequence: DecodingSequence | None = None
        """What is being decoded."""

    def prepare_next(self) -> None:
        """Prepare the next answer for `pass_prompts`."""
        if self._interrupted():
            raise Interrupted
        index = self._choice // self.job.request.n
        ids = _as_ids(self.job.prompts[index])
        if self._of_prompt is None:
            self._of_prompt = self._context.enter_context(self._generation.context_for(ids))
        try:
            self.sequence = self._prepare(ids, self.job.max_tokens[index])
        except HasToWait:
            if self._choice % self.job.request.n == 0:
                self.close()  # others may have its context meanwhile
            raise

    def _prepare(self, ids: Tensor, max_tokens: int) -> DecodingSequence:
        sessions = self._held.sessions
        try:
            return self._preparing(ids, max_tokens)
        except NextPass:
            raise  # it may fit there beside what is kept
        except (DoesNotFit, HasToWait):
            if not sessions:
                raise
        # What is decoded comes before what is kept for others.
        sessions.drop_all()
        self._held.model.engine.keep_idle(0)
        return self._preparing(ids, max_tokens)

    def _preparing(self, ids: Tensor, max_tokens: int) -> DecodingSequence:
        self._answer, arguments = self._generation.asked(ids, max_tokens, self._choice)
        model = self._held.model
        guide = model.guide(structure_of(self.job.request, model.tokenizer), arguments)
        return self._scheduler.prepare(ids, context=self._of_prompt, seed=self._random, guide=guide, **arguments)

    def ended(self) -> bool:
        """The sequence has ended: whether it was the last one."""
        sequence, answer, job = self.sequence, self._answer, self.job
        assert sequence is not None and answer is not None, "an answer has begun"  # noqa: PT018
        self.sequence = None
        report = sequence.result()
        self._generation.finish(answer, self._choice, report, self._of_prompt)
        first = self._choice % job.request.n == 0
        job.figures.add(report, first=first)
        self._choice += 1
        if self._choice % job.request.n == 0:
            self.close()
        return self._choice == len(job.prompts) * job.request.n

    def close(self) -> None:
        """Keep the context for others."""
        self._of_prompt = None
        self._context.close()


def pass_prompts(model: GriffinModel, scheduler: SequenceScheduler, jobs: Sequence[JobBeside]) -> None:
    """Let the prompts of prepared `jobs` pass. Interrupted when nobody waits for any of them; who leaves before the
    others takes no further token."""

    def layer_done(done: int, layers: int) -> None:
        left = 0
        for job in jobs:
            try:
                job.layer_done(done, layers)
            except Interrupted:
                left += 1
        if left == len(jobs):
            raise Interrupted

    with _watched(model, layer_done):
        scheduler.join()


@contextlib.contextmanager
def _watched(model: GriffinModel, layer_done: Callable[[int, int], None]) -> Iterator[None]:
    model.progress = model.engine.passes.progress_between = layer_done
    try:
        yield
    finally:
        model.progress = model.engine.passes.progress_between = None


def _texts(strings: str | list[str] | None) -> list[str]:
    return [strings] if isinstance(strings, str) else strings or []
