"""What a client asks for: OpenAI's bodies, checked and in one form."""

from dataclasses import dataclass
from typing import Any, Literal

from griffin_offload.config import ServeConfig, Structure
from griffin_offload.errors import UsageError
from griffin_offload.serving.api_errors import ApiError, invalid, unsupported
from griffin_offload.serving.validation import FieldReader

# The messages of a chat: roles that a template knows, and texts.

NO_PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
}
"""Arguments of `generate`: clients get no penalty that they did not ask for; they can ask for the first one."""


Message = dict[str, str]

ROLES = ("system", "user", "assistant")
# What clients call instructions to models that think; templates know them as the system's.
_INSTRUCTIONS = "developer"
_MAX_MESSAGES = 10_000
# What an answer of a client library carries when it is sent back; empty, or it would ask for something.
_EMPTY: dict[str, tuple[Any, ...]] = {
    "name": (),
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "tool_call_id": (),
}


def parse_messages(fields: FieldReader) -> tuple[Message, ...]:
    """Role and text of each message; Failure names the one that cannot be used."""
    found = fields.raw("messages")
    if not isinstance(found, list) or not 0 < len(found) <= _MAX_MESSAGES:
        raise fields.wrong("messages", f"a list of 1 to {_MAX_MESSAGES} messages")
    return tuple(_message(value, f"messages[{index}]") for index, value in enumerate(found))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise invalid(f"{where} has to be an object", where)
    role = "system" if value.get("role") == _INSTRUCTIONS else value.get("role")
    if role in ("tool", "function"):
        raise unsupported(f"{where}.role", f"{role}: the roles are {', '.join(ROLES)}")
    fields = FieldReader(value, known=("role", "content"), neutral=_EMPTY, where=where)
    if role not in ROLES:
        raise fields.wrong("role", f"one of {', '.join(ROLES)}")
    return {"role": role, "content": _content(fields)}


def _content(fields: FieldReader) -> str:
    """One text, or the texts of all parts, a line each."""
    found = fields.raw("content")
    if not isinstance(found, list):
        text = fields.text("content")
        if text is None:
            raise fields.wrong("content", "given: a string, or a list of text parts")
        return text
    texts = []
    for index, part in enumerate(found):
        where = f"{fields.path('content')}[{index}]"
        if not isinstance(part, dict):
            raise invalid(f"{where} has to be an object", where)
        if part.get("type") != "text":
            raise unsupported(f"{where}.type", "the model reads text parts alone")
        text = FieldReader(part, known=("type", "text"), where=where).text("text")
        if text is None:
            raise invalid(f"{where}.text has to be given", f"{where}.text")
        texts.append(text)
    if not texts:
        raise fields.wrong("content", "a string, or a list of text parts, of which it has none")
    return "\n".join(texts)


Endpoint = Literal["chat", "completions"]
ENDPOINTS: dict[str, Endpoint] = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
"""By their paths."""
Prompt = str | list[int]

MAX_STOPS = 4
_MAX_STOP_LETTERS = 1000
_MAX_TOP_LOGPROBS = {"chat": 20, "completions": 5}
# Of OpenAI's, for completions that name no length.
_COMPLETION_TOKENS = 16
_LARGEST = 2**31 - 1
# 1 is none; 0 would be a division by nothing.
_LEAST_PENALTY, _MOST_PENALTY = 0.01, 100
_COMMON = {
    "model",
    "stream",
    "stream_options",
    "max_tokens",
    "temperature",
    "top_p",
    "stop",
    "seed",
    "logprobs",
    "n",
    "density",
    "exact",
    "min_p",
    "repetition_penalty",
    "response_format",
    "regex",
    "grammar",
}
_KNOWN = {
    "chat": {*_COMMON, "messages", "max_completion_tokens", "top_logprobs"},
    "completions": {*_COMMON, "prompt"},
}
# They say who asks and how others may bill or store it; no answer depends on them.
_IGNORED = ("user", "safety_identifier", "prompt_cache_key", "metadata")
# Names of OpenAI's API, and the values with which they ask for nothing.
_NEUTRAL: dict[str, dict[str, tuple[Any, ...]]] = {
    "chat": {
        "audio": (),
        "frequency_penalty": (0,),
        "function_call": ("none",),
        "functions": ([],),
        "logit_bias": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "presence_penalty": (0,),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning_effort": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    },
    "completions": {
        "best_of": (1,),
        "echo": (False,),
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "presence_penalty": (0,),
        "suffix": (),
    },
}


@dataclass(frozen=True)
class Request:
    """One body that passed every check which needs no tokenizer."""

    endpoint: Endpoint
    messages: tuple[Message, ...] = ()
    """Of a chat."""
    prompts: tuple[Prompt, ...] = ()
    """Of completions: texts or token ids."""
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stops: tuple[str, ...] = ()
    seed: int | None = None
    top_logprobs: int | None = None
    """Log probabilities are asked for, and so many alternatives; None: they are not."""
    n: int = 1
    density: float | None = None
    exact: bool | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    structure: Structure | None = None
    """What the answer has to be."""


def parse_request(endpoint: Endpoint, values: dict[str, Any], served: str, config: ServeConfig) -> Request:
    """The request that `values` make; Failure names the first field that cannot be used."""
    fields = FieldReader(values, known=_KNOWN[endpoint], neutral=_NEUTRAL[endpoint], ignored=_IGNORED)
    _check_model(fields, served)
    n = fields.integer("n", 1, config.max_choices) or 1
    chat = endpoint == "chat"
    prompts = () if chat else _prompts(fields, config.max_choices // n)
    stream = bool(fields.flag("stream"))
    return Request(
        endpoint=endpoint,
        messages=parse_messages(fields) if chat else (),
        prompts=prompts,
        stream=stream,
        include_usage=_include_usage(fields, stream),
        max_tokens=_max_tokens(fields) or (None if chat else _COMPLETION_TOKENS),
        temperature=fields.number("temperature", 0, 2),
        top_p=fields.number("top_p", 0, 1),
        stops=_stops(fields),
        seed=fields.integer("seed", -(2**63), 2**63 - 1),
        top_logprobs=_chat_logprobs(fields) if chat else fields.integer("logprobs", 0, _MAX_TOP_LOGPROBS[endpoint]),
        n=n,
        density=fields.number("density", 0, 1),
        exact=fields.flag("exact"),
        min_p=fields.number("min_p", 0, 1),
        repetition_penalty=fields.number("repetition_penalty", _LEAST_PENALTY, _MOST_PENALTY),
        structure=_structure(fields),
    )


def _check_model(fields: FieldReader, served: str) -> None:
    model = fields.text("model")
    if model is None:
        raise fields.wrong("model", f"given: {served!r} is served here")
    check_served(model, served)


def check_served(model: str, served: str) -> None:
    """Failure 404 unless `model` is the one that is served."""
    if model != served:
        raise ApiError(
            404, f"no model {model[:100]!r}: {served!r} is served here", param="model", code="model_not_found"
        )


_JSON_OBJECT = Structure(json_schema={"type": "object"})


def _structure(fields: FieldReader) -> Structure | None:
    """By one of three fields; Failure for several of them."""
    found = {name: fields.text(name) for name in ("regex", "grammar")}
    given = {name: text for name, text in found.items() if text is not None}
    form = _response_format(fields)
    if (form is not None and given) or len(given) > 1:
        raise invalid(
            "response_format, regex and grammar each say what an answer has to be: give one", "response_format"
        )
    return Structure(**given) if given else form


def _response_format(fields: FieldReader) -> Structure | None:
    form = fields.raw("response_format")
    if form is None:
        return None
    if not isinstance(form, dict):
        raise fields.wrong("response_format", "an object")
    kind = form.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise invalid("response_format.type has to be text, json_object or json_schema", "response_format.type")
    known = ("type", "json_schema") if kind == "json_schema" else ("type",)
    inner = FieldReader(form, known=known, where="response_format").raw("json_schema")
    if kind != "json_schema":
        return _JSON_OBJECT if kind == "json_object" else None
    where = "response_format.json_schema"
    if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
        raise invalid(f"{where}.schema has to be given, an object", f"{where}.schema")
    reader = FieldReader(inner, known=("name", "schema", "strict", "description"), where=where)
    for name in ("name", "description"):
        reader.text(name)
    reader.flag("strict")  # the schema is kept to in either case
    try:
        return Structure(json_schema=inner["schema"])
    except UsageError as error:
        raise invalid(str(error), f"{where}.schema") from error


def _max_tokens(fields: FieldReader) -> int | None:
    old = fields.integer("max_tokens", 1, _LARGEST)
    new = fields.integer("max_completion_tokens", 1, _LARGEST)
    if old is not None and new is not None and old != new:
        raise invalid("max_tokens and max_completion_tokens contradict each other: give one", "max_tokens")
    return new if old is None else old


def _include_usage(fields: FieldReader, stream: bool) -> bool:
    options = fields.raw("stream_options")
    if options is None:
        return False
    if not stream:
        raise invalid("stream_options are for streams: add stream", "stream_options")
    if not isinstance(options, dict):
        raise fields.wrong("stream_options", "an object")
    neutral = {"include_obfuscation": (False,)}
    return bool(
        FieldReader(options, known=("include_usage",), neutral=neutral, where="stream_options").flag("include_usage")
    )


def _stops(fields: FieldReader) -> tuple[str, ...]:
    found = fields.raw("stop")
    if found is None:
        return ()
    stops = [found] if isinstance(found, str) else found
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise fields.wrong("stop", f"a string or a list of up to {MAX_STOPS}")
    for stop in stops:
        if not 0 < len(fields.checked_text("stop", stop)) <= _MAX_STOP_LETTERS:
            raise fields.wrong("stop", f"made of strings of 1 to {_MAX_STOP_LETTERS} letters")
    return tuple(stops)


def _chat_logprobs(fields: FieldReader) -> int | None:
    wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, _MAX_TOP_LOGPROBS["chat"])
    if top is not None and not wanted:
        raise invalid("top_logprobs are for logprobs: add logprobs", "top_logprobs")
    return (top or 0) if wanted else None


def _prompts(fields: FieldReader, most: int) -> tuple[Prompt, ...]:
    found = fields.raw("prompt")
    if found is None:
        raise fields.wrong("prompt", "given: a string, a list of strings, token ids, or a list of lists of those")
    several = isinstance(found, list) and not _is_ids(found)
    prompts = found if several else [found]
    if not prompts or len(prompts) > most:
        raise fields.wrong("prompt", f"1 to {most} prompts, `n` answers to each counted")
    return tuple(_prompt(fields, prompt) for prompt in prompts)


def _prompt(fields: FieldReader, prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return fields.checked_text("prompt", prompt)
    if not isinstance(prompt, list) or not _is_ids(prompt):
        raise fields.wrong("prompt", "a string, a list of strings, token ids, or a list of lists of those")
    return list(prompt)


def _is_ids(found: list[Any]) -> bool:
    return bool(found) and all(type(token) is int and 0 <= token <= _LARGEST for token in found)


# What fits: a request's tokens against the context and the caps, before it may wait for the model.


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


def _too_long(prompt_tokens: int, wanted: int, caps: Caps, param: str) -> ApiError:
    return invalid(
        f"a prompt of {prompt_tokens} tokens and {wanted} new ones are {prompt_tokens + wanted}, the context is "
        f"{caps.context}: shorten one of them",
        param,
        _CODE,
    )
