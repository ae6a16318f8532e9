"""One request on the worker's thread: every prompt, every answer, one after the other."""

import contextlib
import secrets
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from griffin_offload.engine.arguments import ONE_ANSWER
from griffin_offload.engine.model import GriffinModel
from griffin_offload.engine.report import RunReport
from griffin_offload.errors import DoesNotFit
from griffin_offload.kv_cache.sequence import Context
from griffin_offload.serving.answer_parts import AnswerFormat, AnswerParser, Part, format_of, parser_for
from griffin_offload.serving.logprobs import LogprobRecorder, TokenLogprob
from griffin_offload.serving.queue import Finish, Finished, Job, Piece
from griffin_offload.serving.requests import NO_PENALTIES, Request
from griffin_offload.serving.text_stream import Detokeniser, StopHolder, special_ids, whole_text
from griffin_offload.serving.tokenization import structure_of

Tokens = tuple[TokenLogprob, ...]

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
    ) -> None:
        self._detokeniser, self._holder, self._recorder = detokeniser, holder, recorder
        self._ends, self._show, self._interrupted = ends, show, interrupted
        self._seen = prompt_tokens
        self._letters = 0
        self._waiting: deque[TokenLogprob] = deque()
        self.interrupted = self._ended = False

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        tokens = input_ids[0, self._seen :].tolist()
        self._seen = input_ids.shape[1]
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
        return "stop" if over or self._ended or self._holder.stopped else "length"


# Scores are divided by the temperature in float32: below this that would be a division by nothing.
_COLDEST = 1e-4


class Interrupted(Exception):
    """Nobody waits for the answer any more, or nobody may."""


class KeptContexts(Protocol):
    """Contexts of earlier requests."""

    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def take(self, ids: Tensor, *, exact: bool) -> Context: ...
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
    seed = job.request.seed
    torch.manual_seed(secrets.randbits(63) if seed is None else seed)
    generation = _Generation(held, job, interrupted)
    for index, prompt in enumerate(job.prompts):
        ids = torch.tensor([prompt], dtype=torch.long, device="cpu")
        with generation.context_for(ids) as context:
            for number in range(job.request.n):
                choice = index * job.request.n + number
                job.figures.add(generation.answer(ids, context, job.max_tokens[index], choice), first=number == 0)


class LogitBias(LogitsProcessor):  # type: ignore[misc]
    """Adds to the scores of some tokens."""

    def __init__(self, bias: tuple[tuple[int, float], ...]) -> None:
        self._tokens, self._added = zip(*bias, strict=True)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        added = torch.tensor(self._added, dtype=scores.dtype, device=scores.device)
        places = torch.tensor(self._tokens, dtype=torch.long, device=scores.device)
        return scores.index_add(1, places, added.expand(scores.shape[0], -1))


# Tokens of a prompt's end that say whether it has begun the answer's thoughts.
_PROMPT_END = 16


class PartsShown:
    """Delivers an answer by its parts: text, thoughts, calls."""

    def __init__(self, found: AnswerFormat, parser: AnswerParser, deliver: Callable[[Part, Tokens], None]) -> None:
        self._format, self._parser, self._deliver = found, parser, deliver
        self._called = False

    def kept(self, tokenizer: Any) -> frozenset[int]:
        """Special tokens by which the parts are told."""
        special = special_ids(tokenizer)
        if self._format.own:
            return special
        return special & {tokenizer.convert_tokens_to_ids(marker) for marker in self._format.markers}

    def show(self, text: str, tokens: Tokens) -> None:
        self._all(self._parser.feed(text), tokens)

    def finish(self) -> bool:
        """The answer is over: deliver what was held back, and say whether something was called."""
        self._all(self._parser.finish(), ())
        return self._called

    def _all(self, parts: list[Part], tokens: Tokens) -> None:
        if tokens and not parts:
            parts = [Part()]  # log probabilities are of all tokens
        for part in parts:
            self._called = self._called or part.call is not None
            self._deliver(part, tokens)
            tokens = ()


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
        sessions = self._held.sessions
        if sessions is None:
            yield None
            return
        loaded = self._model.engine.loaded.layers.config.exact
        exact = loaded if self._request.exact is None else self._request.exact
        context = sessions.take(ids[0], exact=exact)
        self._model.engine.keep_idle(sessions.nbytes)
        try:
            yield context
        except BaseException:
            if exact:
                context.clear()  # a verifying pass that was cut short has faded its statistic
            raise
        finally:
            sessions.keep(context)

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
        request, model = self._request, self._model
        recorder = None
        if request.top_logprobs is not None:
            chat = request.endpoint == "chat"
            recorder = LogprobRecorder(self._tokenizer, request.top_logprobs, begins=chat)
        parts = self._parts(ids, choice)
        answer = self._new_answer(ids, recorder, choice, parts)
        if request.echo:
            self._job.deliver(Piece(choice, whole_text(self._tokenizer, ids[0].tolist())))
        ends: dict[str, Any] = {"eos_token_id": sorted(self._ends)} if self._ends else {}
        model.progress = model.engine.passes.progress_between = self._layer_done
        try:
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                context=context,
                exact=request.exact,
                structure=structure_of(request, self._tokenizer),
                max_new_tokens=max_tokens,
                **ONE_ANSWER,
                **ends,
                stopping_criteria=StoppingCriteriaList([answer]),
                logits_processor=self._processors(recorder),
                **(NO_PENALTIES | sampling_of(request, model.generation_config)),
            )
        finally:
            model.progress = model.engine.passes.progress_between = None
        if answer.interrupted:
            raise Interrupted
        report = model.last_report
        assert report is not None, "a generate that ended well has a report"
        over = report.structure is not None and report.structure.over
        reason = answer.finish(over=over)
        called = parts is not None and parts.finish()
        self._job.deliver(Finished(choice, "tool_calls" if called and reason == "stop" else reason))
        return report

    def _processors(self, recorder: LogprobRecorder | None) -> LogitsProcessorList:
        bias = LogitBias(self._request.logit_bias) if self._request.logit_bias else None
        return LogitsProcessorList([one for one in (recorder, bias) if one is not None])

    def _parts(self, ids: Tensor, choice: int) -> "PartsShown | None":
        """What takes a chat's answer apart, if the model writes more than text."""
        found = format_of(self._tokenizer) if self._request.endpoint == "chat" else None
        if found is None:
            return None
        prompt: str = self._tokenizer.decode(ids[0].tolist() if found.own else ids[0, -_PROMPT_END:].tolist())
        tools = list(self._request.tools.functions) or None
        return PartsShown(
            found,
            parser_for(found, prompt, tools),
            lambda part, tokens: self._job.deliver(Piece(choice, part.text, tokens, part.kind, part.call)),
        )

    def _new_answer(
        self, ids: Tensor, recorder: LogprobRecorder | None, choice: int, parts: "PartsShown | None"
    ) -> Answer:
        before = ids[0].tolist() if self._request.endpoint == "completions" else ()
        return Answer(
            ids.shape[1],
            Detokeniser(self._tokenizer, before, () if parts is None else parts.kept(self._tokenizer)),
            StopHolder((*self._request.stops, *_texts(self._model.generation_config.stop_strings))),
            recorder,
            ends=self._ends | self._ending_words,
            show=parts.show
            if parts is not None
            else lambda text, tokens: self._job.deliver(Piece(choice, text, tokens)),
            interrupted=self._token_done,
        )

    def _token_done(self) -> bool:
        self._job.token()
        return self._interrupted()

    def _layer_done(self, *_: int) -> None:
        if self._interrupted():
            raise Interrupted


def sampling_of(request: Request, given: Any) -> dict[str, Any]:
    """Arguments of `generate`. What the request leaves out is the checkpoint's, if that samples, else OpenAI's 1."""
    samples = bool(given.do_sample)
    temperature = _first(request.temperature, given.temperature if samples else None, 1.0)
    top_p = _first(request.top_p, given.top_p if samples else None, 1.0)
    penalty = {} if request.repetition_penalty is None else {"repetition_penalty": request.repetition_penalty}
    if temperature < _COLDEST or top_p == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None, **penalty}
    top_k = _first(request.top_k, given.top_k if samples else None, 0)
    min_p = given.min_p if samples and request.min_p is None else request.min_p
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, **penalty}


def _texts(strings: str | list[str] | None) -> list[str]:
    return [strings] if isinstance(strings, str) else strings or []


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
