"""What a client asks for: OpenAI's bodies, checked and in one form."""

from dataclasses import dataclass
from typing import Any, Literal

from griffin_offload.config import ServeConfig
from griffin_offload.engine.structure import Structure
from griffin_offload.errors import UsageError
from griffin_offload.serving.api_errors import ApiError, invalid, unsupported
from griffin_offload.serving.messages import Message, parse_messages
from griffin_offload.serving.tools import NO_TOOLS, Tools, parse_tools, template_variables
from griffin_offload.serving.validation import FieldReader

NO_PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
}
"""Arguments of `generate`: clients get no penalty that they did not ask for; they can ask for the first one, and
for OpenAI's two."""
# Scores are divided by the temperature in float32: below this that would be a division by nothing.
_COLDEST = 1e-4


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
_MOST_BIASES = 1024
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
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
    "top_k",
    "logit_bias",
    "response_format",
    "regex",
    "grammar",
    "presence_penalty",
    "frequency_penalty",
    "return_progress",
}
_KNOWN = {
    "chat": {
        *_COMMON,
        *("messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"),
        *("reasoning_effort", "chat_template_kwargs"),
    },
    "completions": {*_COMMON, "prompt", "echo"},
}
# They say who asks and how others may bill or store it; no answer depends on them.
_IGNORED = ("user", "safety_identifier", "prompt_cache_key", "metadata")
# Names of OpenAI's API, and the values with which they ask for nothing.
_NEUTRAL: dict[str, dict[str, tuple[Any, ...]]] = {
    "chat": {
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": (),
        "web_search_options": (),
    },
    "completions": {
        "best_of": (1,),
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
    return_progress: bool = False
    """The stream tells of layers and tokens, too."""
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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    structure: Structure | None = None
    """What the answer has to be."""
    top_k: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, and what is added to their scores."""
    echo: bool = False
    """The answer begins with the prompt."""
    tools: Tools = NO_TOOLS
    variables: tuple[tuple[str, Any], ...] = ()
    """Of the chat template."""
    effort: str | None = None
    """How much a model is to think, by OpenAI's word."""


def parse_request(endpoint: Endpoint, values: dict[str, object], served: str, config: ServeConfig) -> Request:
    """The request that `values` make; ApiError names the first field that cannot be used."""
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
        return_progress=_return_progress(fields, stream),
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
        presence_penalty=fields.number("presence_penalty", -2, 2) or 0.0,
        frequency_penalty=fields.number("frequency_penalty", -2, 2) or 0.0,
        structure=_structure(fields),
        top_k=fields.integer("top_k", 0, _LARGEST),
        logit_bias=_logit_bias(fields),
        **(_of_chats(fields) if chat else {"echo": _echo(fields)}),
    )


def _of_chats(fields: FieldReader) -> dict[str, Any]:
    tools = parse_tools(fields)
    if tools.forced and (_structure(fields) is not None):
        raise invalid("tool_choice asks for a call, and another field for another structure: give one", "tool_choice")
    effort = fields.text("reasoning_effort")
    if effort not in (None, *EFFORTS):
        raise fields.wrong("reasoning_effort", f"one of {', '.join(EFFORTS)}")
    return {"tools": tools, "variables": template_variables(fields), "effort": effort}


def _echo(fields: FieldReader) -> bool:
    echo = bool(fields.flag("echo"))
    if echo and fields.raw("logprobs") is not None:
        raise unsupported("echo", "log probabilities of prompts are not computed: leave logprobs out")
    return echo


def _logit_bias(fields: FieldReader) -> tuple[tuple[int, float], ...]:
    found = fields.raw("logit_bias")
    if found is None:
        return ()
    if not isinstance(found, dict) or len(found) > _MOST_BIASES:
        raise fields.wrong("logit_bias", f"an object of up to {_MOST_BIASES} token ids")
    reader = FieldReader(found, known=found, where="logit_bias")
    for token in found:
        if not token.isdecimal() or not token.isascii() or int(token) > _LARGEST:
            raise invalid("logit_bias has to name token ids", f"logit_bias.{token[:20]}")
    return tuple((int(token), reader.number(token, -100, 100) or 0.0) for token in found)


def _check_model(fields: FieldReader, served: str) -> None:
    model = fields.text("model")
    if model is None:
        raise fields.wrong("model", f"given: {served!r} is served here")
    check_served(model, served)


def check_served(model: str, served: str) -> None:
    """ApiError 404 unless `model` is the one that is served."""
    if model != served:
        raise ApiError(
            404, f"no model {model[:100]!r}: {served!r} is served here", param="model", code="model_not_found"
        )


_JSON_OBJECT = Structure(json_schema={"type": "object"})


def _structure(fields: FieldReader) -> Structure | None:
    """By one of three fields; ApiError for several of them."""
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


def _return_progress(fields: FieldReader, stream: bool) -> bool:
    wanted = bool(fields.flag("return_progress"))
    if wanted and not stream:
        raise invalid("return_progress is for streams: add stream", "return_progress")
    return wanted


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


def _prompt(fields: FieldReader, prompt: object) -> Prompt:
    if isinstance(prompt, str):
        return fields.checked_text("prompt", prompt)
    if not isinstance(prompt, list) or not _is_ids(prompt):
        raise fields.wrong("prompt", "a string, a list of strings, token ids, or a list of lists of those")
    return list(prompt)


def _is_ids(found: list[object]) -> bool:
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
    """Tokens the answer to `prompt` may have; ApiError 400 with the numbers if they do not fit."""
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


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
