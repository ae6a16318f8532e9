"""Anthropic's messages: a body made a chat's, and an answer told in its form.

One turn of text, thoughts and function calls, whole or streamed. Nothing is kept between requests: what asks for that
is refused by name.
"""

import json
import secrets
from collections.abc import Mapping
from typing import Any

from griffin_offload.serving.api_errors import unsupported
from griffin_offload.serving.queue import Figures, Finished, Piece
from griffin_offload.serving.responses import Response, named_event
from griffin_offload.serving.tools import call_of
from griffin_offload.serving.validation import FieldReader, Values, list_of_objects, texts_of

_MESSAGES_SAME = ("model", "stream", "temperature", "top_p", "top_k", "density", "exact", "min_p")
_MESSAGES_KNOWN = (
    *(*_MESSAGES_SAME, "max_tokens", "messages", "system", "stop_sequences", "tools", "tool_choice"),
    "thinking",
)
_MESSAGES_NEUTRAL: Mapping[str, Any] = {"container": (), "mcp_servers": ([],)}
_MESSAGES_IGNORED = ("metadata", "service_tier")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_of_messages(values: Values) -> Values:
    """The chat's body that a body of Anthropic's means; ApiError names what cannot be had."""
    fields = FieldReader(values, known=_MESSAGES_KNOWN, neutral=_MESSAGES_NEUTRAL, ignored=_MESSAGES_IGNORED)
    chat = {name: values[name] for name in _MESSAGES_SAME if values.get(name) is not None}
    if fields.raw("max_tokens") is None:
        raise fields.wrong("max_tokens", "given")
    messages: list[Values] = []
    if fields.raw("system") is not None:
        messages.append({"role": "system", "content": texts_of(values["system"], "system", ("text",))})
    for index, message in enumerate(list_of_objects(fields.raw("messages"), "messages")):
        _add_blocks(messages, message, f"messages[{index}]")
    chat |= {"messages": messages, "max_tokens": values["max_tokens"], "stop": values.get("stop_sequences")}
    tools = list_of_objects(values.get("tools") or [], "tools")
    chat["tools"] = [_messages_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    return chat | _choice(fields) | _thinking(fields)


def _messages_tool(tool: Values, where: str) -> Values:
    if tool.get("type", "custom") != "custom":
        raise unsupported(f"{where}.type", "functions of the client's own are called")
    names = {"name": "name", "description": "description", "input_schema": "parameters"}
    FieldReader(tool, known=(*names, "type"), ignored=("cache_control",), where=where)
    return {"type": "function", "function": {ours: tool[theirs] for theirs, ours in names.items() if theirs in tool}}


def _choice(fields: FieldReader) -> Values:
    choice = fields.raw("tool_choice")
    if choice is None:
        return {}
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "tool":
        return {"tool_choice": {"type": "function", "function": {"name": choice.get("name")}}}
    if kind not in _CHOICES:
        raise fields.wrong("tool_choice", "of type auto, any, tool or none")
    return {"tool_choice": _CHOICES[kind]}


def _thinking(fields: FieldReader) -> Values:
    thinking = fields.raw("thinking")
    if thinking is None:
        return {}
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    if kind not in ("enabled", "disabled", "adaptive"):
        raise fields.wrong("thinking", "of type enabled, disabled or adaptive")
    return {} if kind == "adaptive" else {"reasoning_effort": "medium" if kind == "enabled" else "none"}


def _add_blocks(messages: list[Values], message: Values, where: str) -> None:
    """One message's blocks: texts together, calls with them, and each result of a tool by itself."""
    role, content = message.get("role"), message.get("content")
    if isinstance(content, str):
        messages.append({"role": role, "content": content})
        return
    texts, calls = [], []
    for index, block in enumerate(list_of_objects(content, f"{where}.content")):
        kind, at = block.get("type"), f"{where}.content[{index}]"
        if kind == "tool_use":
            calls.append(call_of(block.get("id"), block.get("name"), json.dumps(block.get("input") or {})))
        elif kind == "tool_result":
            text = texts_of(block.get("content") or "", f"{at}.content", ("text",))
            messages.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        elif kind not in ("thinking", "redacted_thinking"):
            texts.append(texts_of([block], at, ("text",)))
    if texts or calls:
        messages.append({"role": role, "content": "\n".join(texts), **({"tool_calls": calls} if calls else {})})


class MessagesForm(Response):
    """An answer as Anthropic's message: blocks of content, and in a stream an event for each step."""

    def _begin(self) -> None:
        self._id = f"msg_{secrets.token_hex(12)}"
        self._index, self._open = 0, ""

    def whole(self, figures: Figures) -> Values:
        choice = self._choices[0]
        blocks: list[Values] = []
        if choice.reasoning:
            blocks.append({"type": "thinking", "thinking": choice.reasoning, "signature": ""})
        if choice.text.strip() or not choice.calls:
            blocks.append({"type": "text", "text": choice.text})
        for call in choice.calls:
            blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": _object(call.arguments)})
        return self._told(blocks) | {"stop_reason": _reason(choice.finish), "usage": _messages_usage(figures)}

    def _told(self, blocks: list[Values]) -> Values:
        empty = {"input_tokens": 0, "output_tokens": 0}
        identity = {"id": self._id, "type": "message", "role": "assistant", "model": self._model}
        return identity | {"content": blocks, "stop_reason": None, "stop_sequence": None, "usage": empty}

    def sent_opening(self) -> bytes:
        return named_event({"type": "message_start", "message": self._told([])})

    def sent(self, event: Piece | Finished) -> bytes:
        self.take(event)
        if isinstance(event, Finished):
            return self._closed()
        if event.call is not None:
            block = {"type": "tool_use", "id": event.call.id, "name": event.call.name, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": event.call.arguments}
            return self._closed() + self._started("tool_use", block) + self._delta(delta) + self._closed()
        if not event.text:
            return b""
        if event.kind == "reasoning":
            empty: Values = {"type": "thinking", "thinking": "", "signature": ""}
            delta = {"type": "thinking_delta", "thinking": event.text}
        else:
            empty, delta = {"type": "text", "text": ""}, {"type": "text_delta", "text": event.text}
        return self._started(empty["type"], empty) + self._delta(delta)

    def _started(self, kind: str, block: Values) -> bytes:
        if self._open == kind:
            return b""
        closed, self._open = self._closed(), kind
        return closed + named_event({"type": "content_block_start", "index": self._index, "content_block": block})

    def _delta(self, delta: Values) -> bytes:
        return named_event({"type": "content_block_delta", "index": self._index, "delta": delta})

    def _closed(self) -> bytes:
        if not self._open:
            return b""
        self._open, index = "", self._index
        self._index += 1
        return named_event({"type": "content_block_stop", "index": index})

    def sent_end(self, figures: Figures) -> bytes:
        delta = {"stop_reason": _reason(self._choices[0].finish), "stop_sequence": None}
        told = {"type": "message_delta", "delta": delta, "usage": _messages_usage(figures)}
        return named_event(told) + named_event({"type": "message_stop"})


def _object(text: str) -> Any:
    """Arguments as an object; a model may have written none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"arguments": text}


def _reason(finish: str | None) -> str:
    return {"length": "max_tokens", "tool_calls": "tool_use"}.get(finish or "", "end_turn")


def _messages_usage(figures: Figures) -> Values:
    return {
        "input_tokens": figures.prompt_tokens - figures.cached_tokens,
        "cache_read_input_tokens": figures.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": figures.completion_tokens,
    }
