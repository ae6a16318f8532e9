"""The messages of a chat: roles that a template knows, texts, calls of functions and what they gave."""

import json
from typing import Any

from griffin_offload.serving.api_errors import invalid, unsupported
from griffin_offload.serving.validation import FieldReader

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
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
    "reasoning_content": (),
}
_OWN = {"assistant": ("tool_calls", "reasoning_content"), "tool": ("tool_call_id", "name")}


def parse_messages(fields: FieldReader) -> tuple[Message, ...]:
    """Role and text of each message; ApiError names the one that cannot be used."""
    found = fields.raw("messages")
    if not isinstance(found, list) or not 0 < len(found) <= _MAX_MESSAGES:
        raise fields.wrong("messages", f"a list of 1 to {_MAX_MESSAGES} messages")
    return tuple(_message(value, f"messages[{index}]") for index, value in enumerate(found))


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise invalid(f"{where} has to be an object", where)
    role = "system" if value.get("role") == _INSTRUCTIONS else value.get("role")
    if role == "function":
        raise unsupported(f"{where}.role", f"{role}: the roles are {', '.join(ROLES)}")
    own = _OWN.get(role, ()) if isinstance(role, str) else ()
    neutral = {name: values for name, values in _EMPTY.items() if name not in own}
    fields = FieldReader(value, known=("role", "content", *own), neutral=neutral, where=where)
    if role not in ROLES:
        raise fields.wrong("role", f"one of {', '.join(ROLES)}")
    calls = _calls(fields) if role == "assistant" else []
    message = {"role": role, "content": "" if calls and fields.raw("content") is None else _content(fields)}
    more = {name: fields.text(name) for name in own if name != "tool_calls"}
    return message | {name: text for name, text in more.items() if text is not None} | _if_any("tool_calls", calls)


def _if_any(name: str, found: list[Any]) -> dict[str, Any]:
    return {name: found} if found else {}


def _calls(fields: FieldReader) -> list[dict[str, Any]]:
    """Of functions, as templates take them: their arguments are objects."""
    found = fields.raw("tool_calls") or []
    if not isinstance(found, list):
        raise fields.wrong("tool_calls", "a list")
    return [_call(one, f"{fields.path('tool_calls')}[{index}]") for index, one in enumerate(found)]


def _call(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("function"), dict):
        raise invalid(f"{where} has to be an object with a function", where)
    fields = FieldReader(value, known=("id", "type", "function", "index"), where=where)
    inner = FieldReader(value["function"], known=("name", "arguments"), where=f"{where}.function")
    name, text = inner.text("name"), inner.text("arguments") or "{}"
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if name is None or not isinstance(arguments, dict):
        raise inner.wrong("arguments", "the text of a JSON object, and name be given")
    return {"id": fields.text("id") or "", "type": "function", "function": {"name": name, "arguments": arguments}}


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
