"""From messages and texts to token ids, on a thread of its own.

The tokenizer is the model's own: the worker's thread only decodes with it, which changes nothing of it, and a prompt is
encoded in a forked process or, where there is no fork, on this thread alone.
"""

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from griffin_offload.checkpoint.tokenizer import encode, encode_messages
from griffin_offload.engine.structure import check_structure
from griffin_offload.errors import CheckpointError, TemplateError, UsageError, one_line
from griffin_offload.serving.api_errors import invalid
from griffin_offload.serving.requests import Message, Prompt, Request


class Encoder:
    """Makes the prompts of a request; tokenizing a long one must not keep other clients waiting for their tokens."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._thread = ThreadPoolExecutor(1, "griffin-offload-encoder")

    async def encode(self, request: Request) -> list[list[int]]:
        """Token ids of every prompt of `request`; Failure 400 for one that has none."""
        call: Callable[[], list[list[int]]] = functools.partial(self.prompts_of, request)
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def prompts_of(self, request: Request) -> list[list[int]]:
        if request.structure is not None:
            try:
                check_structure(request.structure)
            except UsageError as error:
                name = request.structure.name
                raise invalid(str(error), "response_format" if name == "json_schema" else name) from error
        if request.endpoint == "chat":
            return [self._chat(request.messages)]
        return [self._completion(prompt) for prompt in request.prompts]

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _chat(self, messages: tuple[Message, ...]) -> list[int]:
        if self._tokenizer.chat_template is None:
            raise invalid("this model has no chat template: use /v1/completions", "messages", code="no_chat_template")
        try:
            ids = encode_messages(self._tokenizer, list(messages))
        except TemplateError as error:  # many refuse an odd order of roles
            raise invalid(f"the model's chat template refuses these messages: {error.reason}", "messages") from error
        return _checked(ids, "messages")

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
