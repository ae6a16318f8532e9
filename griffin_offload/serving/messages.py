"""The messages of a chat: roles that a template knows, and texts."""

from typing import Any

from griffin_offload.serving.failure import invalid, unsupported
from griffin_offload.serving.fields import Fields

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


def parse_messages(fields: Fields) -> tuple[Message, ...]:
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
    fields = Fields(value, known=("role", "content"), neutral=_EMPTY, where=where)
    if role not in ROLES:
        raise fields.wrong("role", f"one of {', '.join(ROLES)}")
    return {"role": role, "content": _content(fields)}


def _content(fields: Fields) -> str:
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
        text = Fields(part, known=("type", "text"), where=where).text("text")
        if text is None:
            raise invalid(f"{where}.text has to be given", f"{where}.text")
        texts.append(text)
    if not texts:
        raise fields.wrong("content", "a string, or a list of text parts, of which it has none")
    return "\n".join(texts)
