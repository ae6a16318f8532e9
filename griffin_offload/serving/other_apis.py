"""What bodies of other interfaces than OpenAI's chat share: reading blocks of text, and events with names."""

from typing import Any

from griffin_offload.serving.api_errors import invalid, unsupported
from griffin_offload.serving.responses import encode

Values = dict[str, Any]


def list_of_objects(value: Any, where: str) -> list[Values]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise invalid(f"{where} has to be a list of objects", where)
    return value


def texts_of(value: Any, where: str, kinds: tuple[str, ...]) -> str:
    """One text, or those of all blocks, which are of these `kinds`."""
    if isinstance(value, str):
        return value
    found = []
    for index, block in enumerate(list_of_objects(value, where)):
        if block.get("type") not in kinds:
            raise unsupported(f"{where}[{index}].type", "the model reads text alone")
        text = block.get("text")
        if not isinstance(text, str):
            raise invalid(f"{where}[{index}].text has to be a string", f"{where}[{index}].text")
        found.append(text)
    return "\n".join(found)


def call_of(call_id: Any, name: Any, arguments: Any) -> Values:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def named_event(value: Values) -> bytes:
    """One event of a stream, named as its type."""
    return f"event: {value['type']}\n".encode() + b"data: " + encode(value) + b"\n\n"
