"""From messages and texts to token ids, on a thread of its own.

The tokenizer is the model's own: the worker's thread only decodes with it, which changes nothing of it, and a prompt is
encoded in a forked process or, where there is no fork, on this thread alone.
"""

import asyncio
import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from griffin_offload.checkpoint.tokenizer import encode, encode_messages, template_has, thinking_switches
from griffin_offload.engine.structure import Structure, check_structure
from griffin_offload.errors import CheckpointError, TemplateError, UsageError, one_line
from griffin_offload.serving.answer_parts import AnswerFormat, format_of
from griffin_offload.serving.api_errors import invalid, unsupported
from griffin_offload.serving.requests import Prompt, Request
from griffin_offload.transformers_api import Tokenizer


def format_for_tools(tokenizer: Tokenizer) -> AnswerFormat | None:
    """How the model writes calls; None where it is not known."""
    found = format_of(tokenizer)
    return found if found is not None and found.calls else None


def structure_of(request: Request, tokenizer: Tokenizer) -> Structure | None:
    """What the answer has to be: what was asked for, or a call that is forced. ApiError where the model's form of calls
    cannot be forced."""
    if not request.tools.forced:
        return request.structure
    found = format_for_tools(tokenizer)
    if found is None or found.own or found.name == "gpt-oss":
        name = "no known form of calls" if found is None else f"calls in a form ({found.name}) that is not forced"
        raise unsupported("tool_choice", f"the model has {name}: use auto")
    added = {one.content: token for token, one in tokenizer.added_tokens_decoder.items()}
    sides = (_in_grammar(text, added) for text in (found.opening, found.closing))
    return request.tools.forced_structure(*sides)


def _in_grammar(text: str, added: dict[str, int]) -> str:
    """`text` as a grammar writes it: added tokens by their numbers."""
    word = text.strip("\n")
    if word not in added:
        return json.dumps(text) if text else ""
    before, behind = ("\n" if text.startswith("\n") else ""), ("\n" if text.endswith("\n") else "")
    parts = [json.dumps(before) if before else "", f"<[{added[word]}]>", json.dumps(behind) if behind else ""]
    return " ".join(part for part in parts if part)


class Encoder:
    """Makes the prompts of a request; tokenizing a long one must not keep other clients waiting for their tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._thread = ThreadPoolExecutor(1, "griffin-offload-encoder")

    async def encode(self, request: Request) -> list[list[int]]:
        """Token ids of every prompt of `request`; ApiError 400 for one that has none."""
        call: Callable[[], list[list[int]]] = functools.partial(self.prompts_of, request)
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def prompts_of(self, request: Request) -> list[list[int]]:
        structure = structure_of(request, self._tokenizer)
        if structure is not None:
            try:
                check_structure(structure)
            except UsageError as error:
                names = {"json_schema": "response_format", "grammar": "tools" if request.tools.forced else "grammar"}
                raise invalid(str(error), names.get(structure.name, structure.name)) from error
        if any(token >= self._vocab_size for token, _ in request.logit_bias):
            raise invalid(f"logit_bias names a token beyond the last one, {self._vocab_size - 1}", "logit_bias")
        if request.endpoint == "chat":
            return [self._chat(request)]
        return [self._completion(prompt) for prompt in request.prompts]

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _chat(self, request: Request) -> list[int]:
        if self._tokenizer.chat_template is None:
            raise invalid("this model has no chat template: use /v1/completions", "messages", code="no_chat_template")
        try:
            ids = encode_messages(self._tokenizer, list(request.messages), **self._variables(request))
        except TemplateError as error:  # many refuse an odd order of roles
            raise invalid(f"the model's chat template refuses these messages: {error.reason}", "messages") from error
        return _checked(ids, "messages")

    def _variables(self, request: Request) -> dict[str, Any]:
        """Of the template: the client's, how much to think, and tools; ApiError for what it has no words for."""
        found = dict(request.variables)
        for name in found:
            if not template_has(self._tokenizer, name):
                where = f"chat_template_kwargs.{name}"
                raise invalid(f"the model's chat template has no variable {name!r}: leave it out", where)
        if request.tools:
            if format_for_tools(self._tokenizer) is None or not template_has(self._tokenizer, "tools"):
                raise unsupported("tools", "the model's chat template has no known way to call functions")
            found["tools"] = [*request.tools.functions]
        if request.effort is not None:
            found |= self._effort(request.effort)
        return found

    def _effort(self, effort: str) -> dict[str, Any]:
        if template_has(self._tokenizer, "reasoning_effort"):
            return {"reasoning_effort": effort}
        try:
            return dict.fromkeys(thinking_switches(self._tokenizer), effort not in ("none", "minimal"))
        except UsageError:
            raise unsupported("reasoning_effort", "the model's chat template has no switch for thinking") from None

    def _completion(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            try:
                return _checked(encode(self._tokenizer, prompt), "prompt")
            except CheckpointError as error:
                raise invalid(f"the model's tokenizer refuses this prompt: {one_line(error)}", "prompt") from error
        if max(prompt) >= self._vocab_size:
            raise invalid(f"prompt has a token id {max(prompt)}: they go up to {self._vocab_size - 1}", "prompt")
        return prompt


def _checked(ids: list[int], param: str) -> list[int]:
    if not ids:
        raise invalid(f"{param} is empty: the tokenizer makes no token of it", param)
    return ids
