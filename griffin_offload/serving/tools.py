"""Functions that a client lets the model call, and what its chat template is told beside them."""

import json
from dataclasses import dataclass
from typing import Any

from griffin_offload.engine.structure import WHITESPACE, Structure
from griffin_offload.serving.api_errors import invalid, unsupported
from griffin_offload.serving.validation import FieldReader

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
    """The tools, none where they are not to be called; ApiError names what cannot be used."""
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
