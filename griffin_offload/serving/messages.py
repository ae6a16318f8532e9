"""The messages of a chat: roles that a template knows, texts, calls of functions and what they gave. And the functions
that a client lets the model call, with what its chat template is told beside them.
"""

import json
from dataclasses import dataclass
from typing import Any

from griffin_offload.engine.structure import WHITESPACE, Structure
from griffin_offload.serving.validation import FieldReader, invalid, unsupported

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
    """Role and text of each message; Failure names the one that cannot be used."""
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
    return (
        message
        | {name: text for name, text in more.items() if text is not None}
        | ({"tool_calls": calls} if calls else {})
    )


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


# Functions.


_MOST_TOOLS = 128
# Arguments of transformers' rendering, which are no variables of a template.
_TAKEN = {
    *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "return_dict", "return_tensors", "padding", "truncation", "max_length"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}


@dataclass(frozen=True)
class Tools:
    """`functions` as OpenAI's API has them; a `forced` one has to be called."""

    functions: tuple[dict[str, Any], ...] = ()
    forced: tuple[str, ...] = ()
    """Names, of which one is called; empty: the model may."""

    def __bool__(self) -> bool:
        return bool(self.functions)

    @property
    def call_schema(self) -> dict[str, Any]:
        """Of an object with a name and the arguments of one of the forced functions."""
        return {
            "anyOf": [
                self._schema_of(one["function"]) for one in self.functions if one["function"]["name"] in self.forced
            ]
        }

    @staticmethod
    def _schema_of(function: dict[str, object]) -> dict[str, Any]:
        parameters = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
        return {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": parameters},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }

    def forced_structure(self, opening: str, closing: str) -> Structure:
        """A call between what opens and closes it, as grammars write tokens and texts."""
        schema = json.dumps({"x-guidance": {"whitespace_pattern": WHITESPACE}, **self.call_schema})
        return Structure(grammar=f"start: {opening} call {closing}\ncall: %json {schema}\n")


NO_TOOLS = Tools()


def parse_tools(fields: FieldReader) -> Tools:
    """The tools, none where they are not to be called; Failure names what cannot be used."""
    found, choice = fields.raw("tools") or [], fields.raw("tool_choice")
    fields.flag("parallel_tool_calls")
    if not isinstance(found, list) or len(found) > _MOST_TOOLS:
        raise fields.wrong("tools", f"a list of up to {_MOST_TOOLS} functions")
    functions = tuple(_function(value, f"tools[{index}]") for index, value in enumerate(found))
    names = tuple(one["function"]["name"] for one in functions)
    forced = _forced(fields, choice, names)
    return NO_TOOLS if choice == "none" else Tools(functions, forced)


def _function(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid(f"{where} has to be an object", where)
    if value.get("type") != "function":
        raise unsupported(f"{where}.type", "functions alone are called")
    inner = FieldReader(value, known=("type", "function"), where=where).raw("function")
    if not isinstance(inner, dict):
        raise invalid(f"{where}.function has to be an object", f"{where}.function")
    fields = FieldReader(inner, known=("name", "description", "parameters", "strict"), where=f"{where}.function")
    name, parameters = fields.text("name"), fields.raw("parameters")
    if not name:
        raise fields.wrong("name", "given")
    fields.text("description")
    fields.flag("strict")
    if parameters is not None and not isinstance(parameters, dict):
        raise fields.wrong("parameters", "a JSON schema, an object")
    kept = {key: item for key, item in inner.items() if key != "strict" and item is not None}
    return {"type": "function", "function": kept}


def _forced(fields: FieldReader, choice: object, names: tuple[str, ...]) -> tuple[str, ...]:
    if choice in (None, "none", "auto"):
        return ()
    if choice == "required":
        if not names:
            raise invalid("tool_choice asks for a call: give tools", "tool_choice")
        return names
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if name not in names:
        raise fields.wrong("tool_choice", "none, auto, required, or a function that is among the tools")
    return (name,)


def template_variables(fields: FieldReader) -> tuple[tuple[str, Any], ...]:
    """What a client sets in the chat template."""
    found = fields.raw("chat_template_kwargs") or {}
    if not isinstance(found, dict):
        raise fields.wrong("chat_template_kwargs", "an object")
    taken = [name for name in found if name in _TAKEN or not name.isidentifier()]
    if taken:
        where = f"chat_template_kwargs.{taken[0][:40]}"
        raise invalid(f"{where} is no variable of a template", where)
    return tuple(found.items())


def call_of(call_id: object, name: object, arguments: object) -> dict[str, Any]:
    """A call as OpenAI's chat messages have it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
