"""What fits: a request's tokens against the context and the caps, before it may wait for the model."""

from dataclasses import dataclass

from griffin_offload.config import ServeConfig
from griffin_offload.serving.failure import Failure, invalid
from griffin_offload.serving.requests import Request

_CODE = "context_length_exceeded"


@dataclass(frozen=True)
class Caps:
    """The most tokens of one prompt, of one answer, and of both."""

    context: int
    prompt: int
    output: int


def caps_of(config: ServeConfig, context_tokens: int, planned_prompt_tokens: int) -> Caps:
    """The server's own caps within what memory is planned for."""
    prompt = min(config.max_prompt_tokens or context_tokens, planned_prompt_tokens, context_tokens - 1)
    return Caps(context_tokens, prompt, min(config.max_output_tokens or context_tokens, context_tokens - 1))


def output_tokens(request: Request, prompt: list[int], caps: Caps) -> int:
    """Tokens the answer to `prompt` may have; Failure 400 with the numbers if they do not fit."""
    param = "messages" if request.endpoint == "chat" else "prompt"
    if len(prompt) > caps.prompt:
        raise invalid(f"the prompt has {len(prompt)} tokens, {caps.prompt} are allowed: shorten it", param, _CODE)
    wanted, room = request.max_tokens, caps.context - len(prompt)
    if wanted is None:
        return min(room, caps.output)
    if wanted > caps.output:
        raise invalid(f"max_tokens is {wanted}, {caps.output} are allowed", "max_tokens")
    if wanted > room:
        raise _too_long(len(prompt), wanted, caps, param)
    return wanted


def _too_long(prompt_tokens: int, wanted: int, caps: Caps, param: str) -> Failure:
    return invalid(
        f"a prompt of {prompt_tokens} tokens and {wanted} new ones are {prompt_tokens + wanted}, the context is "
        f"{caps.context}: shorten one of them",
        param,
        _CODE,
    )
