"""One request on the worker's thread: every prompt, every answer, one after the other."""

import secrets
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from griffin_offload.runtime.context import Context
from griffin_offload.runtime.model import GriffinModel
from griffin_offload.serving.answer import Answer
from griffin_offload.serving.job import Finished, Job, Piece
from griffin_offload.serving.keeper import Held
from griffin_offload.serving.logprobs import LogprobRecorder
from griffin_offload.serving.requests import Request
from griffin_offload.serving.stops import StopHolder
from griffin_offload.serving.text import Detokeniser

# Scores are divided by the temperature in float32: below this that would be a division by nothing.
_COLDEST = 1e-4


class Interrupted(Exception):
    """Nobody waits for the answer any more, or nobody may."""


def answer_all(held: Held, job: Job, interrupted: Callable[[], bool]) -> None:
    """Deliver every answer of `job`. Interrupted, when `interrupted` says so: after a token, or a layer of a streamed
    pass. Any GriffinError of `generate`."""
    seed = job.request.seed
    torch.manual_seed(secrets.randbits(63) if seed is None else seed)
    choice = 0
    for prompt, max_tokens in zip(job.prompts, job.max_tokens, strict=True):
        ids = torch.tensor([prompt])
        exact = held.model.engine.loaded.layers.config.exact if job.request.exact is None else job.request.exact
        context = held.sessions.take(ids[0], exact=exact) if held.sessions is not None else None
        if held.sessions is not None:
            held.model.engine.keep_idle(held.sessions.nbytes)
        try:
            for number in range(job.request.n):
                _answer(held.model, job, ids, context, max_tokens, choice, interrupted)
                job.figures.add(_report(held.model), first=number == 0)
                choice += 1
        except BaseException:
            if context is not None and exact:
                context.clear()  # a verifying pass that was cut short has faded its statistic
            raise
        finally:
            if held.sessions is not None and context is not None:
                held.sessions.keep(context)


def _answer(
    model: GriffinModel,
    job: Job,
    ids: torch.Tensor,
    context: Context | None,
    max_tokens: int,
    choice: int,
    interrupted: Callable[[], bool],
) -> None:
    request, tokenizer = job.request, model.tokenizer
    recorder = LogprobRecorder(tokenizer, request.top_logprobs) if request.top_logprobs is not None else None
    before = ids[0].tolist() if request.endpoint == "completions" else ()

    def asked() -> bool:
        job.token()
        return interrupted()

    answer = Answer(
        Detokeniser(tokenizer, before),
        StopHolder(request.stops),
        recorder,
        ends=_ends(model),
        show=lambda text, tokens: job.deliver(Piece(choice, text, tokens)),
        interrupted=asked,
    )
    answer.begin(ids.shape[1])

    def layer_done(*_: int) -> None:
        if interrupted():
            raise Interrupted

    model.progress = model.engine.pass_progress = layer_done
    try:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            context=context,
            exact=request.exact,
            max_new_tokens=max_tokens,
            num_beams=1,
            stopping_criteria=StoppingCriteriaList([answer]),
            logits_processor=LogitsProcessorList([recorder] if recorder is not None else []),
            **sampling_of(request, model.model.generation_config),
        )
    finally:
        model.progress = model.engine.pass_progress = None
    if answer.interrupted:
        raise Interrupted
    job.deliver(Finished(choice, answer.finish()))


def sampling_of(request: Request, given: Any) -> dict[str, Any]:
    """Arguments of `generate`. What the request leaves out is the checkpoint's, if that samples, else OpenAI's 1."""
    samples = bool(given.do_sample)
    temperature = _first(request.temperature, given.temperature if samples else None, 1.0)
    top_p = _first(request.top_p, given.top_p if samples else None, 1.0)
    if temperature < _COLDEST or top_p == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    top_k = _first(given.top_k if samples else None, 0)
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _ends(model: GriffinModel) -> set[int]:
    ends = model.model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends} - {None}


def _report(model: GriffinModel) -> Any:
    assert model.last_report is not None, "a generate that ended well has a report"
    return model.last_report
