"""What a chat's answer is made of: text, thoughts in front of it, and calls of functions.

transformers' parser of responses takes it apart: by the tokenizer's own description of its answers where it has one,
else by one of those here, told by the chat template. Answers in Llama 3's form, a bare JSON object, are read here.
"""

import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from griffin_offload.checkpoint.tokenizer import template_code
from griffin_offload.serving.logprobs import TokenLogprob
from griffin_offload.serving.text_stream import special_ids
from griffin_offload.transformers_api import Tokenizer, response_parser

Tokens = tuple[TokenLogprob, ...]
# Tokens of a prompt's end that say whether it has begun the answer's thoughts.
_PROMPT_END = 16

Kind = Literal["content", "reasoning"]
_THINK = {"thinking": {"open": "<think>", "close": "</think>"}}
_NEVER = "\0"  # no text has it: what the parser is given as a beginning is all that there is
_CHANNEL, _MESSAGE = r"<\|channel\|>", r"<\|message\|>"
_KIND = r"(?:<\|constrain\|>\w*)?"
_HARMONY: dict[str, Any] = {
    "thinking": {"open_pattern": f"{_CHANNEL}analysis{_MESSAGE}", "close": ["<|end|>", "<|start|>"], "repeats": True},
    "content": {"open_pattern": f"{_CHANNEL}final{_MESSAGE}", "close": ["<|end|>", "<|return|>"]},
    "tool_calls": {
        "open_pattern": rf"{_CHANNEL}commentary to=functions[.](?P<name>[\w.-]+)[^<]*{_KIND}{_MESSAGE}",
        "close": ["<|call|>", "<|end|>"],
        "repeats": True,
        "transform": {"name": "{name}", "arguments": "{content}"},
    },
}


@dataclass(frozen=True)
class Call:
    """One call of a function; `arguments` are JSON, as the model wrote them."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Part:
    """More of an answer: text of a kind, or a call."""

    text: str = ""
    kind: Kind = "content"
    call: Call | None = None


@dataclass(frozen=True)
class AnswerFormat:
    """How a model's answers are written: `opening` and `closing` of a call, and the `markers` that are special tokens
    elsewhere. `fields` are for transformers' parser; None: Llama 3's."""

    name: str
    fields: dict[str, Any] | None
    opening: str = ""
    closing: str = ""
    markers: tuple[str, ...] = ()
    calls: bool = True
    own: bool = False
    """The tokenizer describes its answers itself."""


_HERMES_CALLS = {"tool_calls": {"open": "<tool_call>", "close": "</tool_call>", "repeats": True}}
_MISTRAL_CALLS = {"tool_calls": {"open": "[TOOL_CALLS]"}}
_THOUGHTS = ("<think>", "</think>")
FORMATS = {
    "gpt-oss": AnswerFormat(
        "gpt-oss",
        _HARMONY,
        markers=("<|channel|>", "<|message|>", "<|constrain|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>"),
    ),
    "mistral": AnswerFormat(
        "mistral",
        {"content": {}, **_MISTRAL_CALLS},
        *("[TOOL_CALLS]", "", ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", *_THOUGHTS)),
    ),
    "hermes": AnswerFormat(
        "hermes",
        {"content": {}, **_HERMES_CALLS, **_THINK},
        *("<tool_call>\n", "\n</tool_call>", ("<tool_call>", "</tool_call>", *_THOUGHTS)),
    ),
    "llama3": AnswerFormat("llama3", None, markers=("<|python_tag|>",)),
    "thinking": AnswerFormat("thinking", {"content": {}, **_THINK}, markers=_THOUGHTS, calls=False),
}


def format_of(tokenizer: Tokenizer) -> AnswerFormat | None:
    """How answers are written by a model with this tokenizer; None: as text alone."""
    code = template_code(tokenizer)
    if response_parser() is None:
        return FORMATS["llama3"] if "<|python_tag|>" in code else None
    if getattr(tokenizer, "response_template", None) is not None:
        return AnswerFormat("its own", tokenizer.response_template, own=True)
    if "<|channel|>" in code and "<|message|>" in code:
        return FORMATS["gpt-oss"]
    if "[TOOL_CALLS]" in code:
        return FORMATS["mistral"]
    if "<tool_call>" in code and "<function=" not in code:
        return FORMATS["hermes"]
    if "<|python_tag|>" in code or ("ipython" in code and '"parameters"' in code):
        return FORMATS["llama3"]
    return FORMATS["thinking"] if "</think>" in code else None


class AnswerParser(Protocol):
    """Takes an answer apart as it comes."""

    def feed(self, text: str) -> list[Part]: ...
    def finish(self) -> list[Part]: ...


def parser_for(found: AnswerFormat, prompt: str, tools: list[dict[str, object]] | None) -> AnswerParser:
    """For one answer to `prompt`, which may have begun it."""
    if found.fields is None:
        return BareCalls(tools is not None)
    return FieldParser(found, prompt, tools)


class FieldParser:
    """By transformers' parser."""

    def __init__(self, found: AnswerFormat, prompt: str, tools: list[dict[str, object]] | None) -> None:
        fields = found.fields or {}
        if not found.own:
            fields = {name: field for name, field in fields.items() if tools is not None or name != "tool_calls"}
            thinks = prompt.rstrip().endswith("<think>") and "thinking" in fields
            prompt = "<think>" if thinks else ""
            fields = {"version": 1, "start_anchor": _NEVER, "fields": fields}
        parser = response_parser()
        assert parser is not None, "a format was found"
        self._parser = parser(fields, prefix=prompt, tools=tools if found.own else None)
        self._began = False

    def feed(self, text: str) -> list[Part]:
        return self._parts(self._parser.feed(text))

    def finish(self) -> list[Part]:
        try:
            return self._parts(self._parser.finalize()[1])
        except ValueError:  # of a description that wants more than there is
            return []

    def _parts(self, events: list[dict[str, Any]]) -> list[Part]:
        found: list[Part] = []
        for event in events:
            field, kind = event["field"], event["type"]
            if field == "tool_calls":
                found += _called(event["value"]) if kind == "region_close" else []
            elif kind == "region_open":
                self._began = False
            elif kind == "region_chunk":
                text = event["text"] if self._began else event["text"].lstrip("\n")
                self._began = self._began or bool(text)
                found += [Part(text, "content" if field == "content" else "reasoning")] if text else []
        return found


class BareCalls:
    """Llama 3's: an answer that begins with an object, or with the token for one, is calls, one behind the other."""

    def __init__(self, calls: bool) -> None:
        self._calls, self._held, self._decided = calls, "", not calls

    def feed(self, text: str) -> list[Part]:
        if self._decided:
            return [Part(text)] if text else []
        self._held += text
        start = self._held.lstrip()
        if not start or start.startswith("{") or "<|python_tag|>".startswith(start[: len("<|python_tag|>")]):
            return []
        if start.startswith("<|python_tag|>"):
            return []
        self._decided = True
        return [Part(self._held)]

    def finish(self) -> list[Part]:
        held, self._held = self._held, ""
        if self._decided or not held:
            return []
        return _called(held.strip().removeprefix("<|python_tag|>").removesuffix("<|python_tag|>"))


_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(\{.*)", re.DOTALL)


def _called(value: object) -> list[Part]:
    """Calls in what a model wrote for some; as text where it is none."""
    calls = _calls(value)
    if calls is None:
        return [Part(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]
    return [Part(call=Call(one.name, one.arguments, f"call_{secrets.token_hex(12)}")) for one in calls]


def _calls(value: object) -> list[Call] | None:
    if isinstance(value, str):
        return _calls_in(value)
    if isinstance(value, list):
        parts = [_calls(one) for one in value]
        return None if not parts or None in parts else [call for part in parts for call in part or ()]
    if not isinstance(value, dict):
        return None
    function = value.get("function", value)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        return None
    arguments = function.get("arguments", function.get("parameters", {}))
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return [Call(name, text.strip())]


def _calls_in(text: str) -> list[Call] | None:
    with_names = [_NAMED.fullmatch(part) for part in text.split("[TOOL_CALLS]")]
    if all(with_names):
        return [Call(one[1], one[2].strip()) for one in with_names if one is not None]
    decoder, found, rest = json.JSONDecoder(), [], text.strip()
    try:
        while rest:
            value, end = decoder.raw_decode(rest)
            found.append(value)
            rest = rest[end:].lstrip(" \n;,")
    except (ValueError, RecursionError):
        return None
    return _calls(found)


class PartsShown:
    """Delivers an answer by its parts: text, thoughts, calls. `kept` are the special tokens by which they are told."""

    def __init__(self, parser: AnswerParser, kept: frozenset[int], deliver: Callable[[Part, Tokens], None]) -> None:
        self._parser, self.kept, self._deliver = parser, kept, deliver
        self._called = False

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


def parts_shown(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    functions: Sequence[dict[str, object]],
    deliver: Callable[[Part, Tokens], None],
) -> PartsShown | None:
    """What takes an answer to `prompt` apart; None where the model writes text alone."""
    found = format_of(tokenizer)
    if found is None:
        return None
    special = special_ids(tokenizer)
    kept = special & {tokenizer.convert_tokens_to_ids(marker) for marker in found.markers}
    text: str = tokenizer.decode(list(prompt) if found.own else list(prompt[-_PROMPT_END:]))
    return PartsShown(parser_for(found, text, list(functions) or None), special if found.own else kept, deliver)
