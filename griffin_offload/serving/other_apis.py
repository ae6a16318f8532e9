"""The other two APIs, OpenAI's responses and Anthropic's messages: a body made a chat's, and an answer in their form.

One turn of text, thoughts and function calls, whole or streamed. Nothing is kept between requests: what asks for that
is refused by name.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from griffin_offload.serving.messages import call_of
from griffin_offload.serving.queue import Figures, Finished, Piece
from griffin_offload.serving.responses import Choice, Response, named_event, usage
from griffin_offload.serving.validation import FieldReader, Values, list_of_objects, texts_of, unsupported

# Responses.


_RESPONSES_SAME = (
    *("model", "stream", "temperature", "top_p", "tool_choice", "parallel_tool_calls", "density", "exact"),
    *("top_k", "min_p", "repetition_penalty", "seed", "stop"),
)
_RESPONSES_KNOWN = (*_RESPONSES_SAME, "input", "instructions", "max_output_tokens", "tools", "text", "reasoning")
_RESPONSES_IGNORED = ("user", "safety_identifier", "prompt_cache_key", "metadata", "include", "service_tier")
_RESPONSES_NEUTRAL: Mapping[str, Any] = {
    "background": (False,),
    "conversation": (),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "prompt_cache_retention": (),
    "store": (False,),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}


def chat_of_responses(values: Values) -> Values:
    """The chat's body that a response's body means; Failure names what cannot be had."""
    fields = FieldReader(values, known=_RESPONSES_KNOWN, neutral=_RESPONSES_NEUTRAL, ignored=_RESPONSES_IGNORED)
    chat = {name: values[name] for name in _RESPONSES_SAME if values.get(name) is not None}
    instructions, given = fields.text("instructions"), fields.raw("input")
    messages = [{"role": "system", "content": instructions}] if instructions else []
    items = [{"role": "user", "content": given}] if isinstance(given, str) else list_of_objects(given, "input")
    for index, item in enumerate(items):
        _add_item(messages, item, f"input[{index}]")
    chat |= {"messages": messages, "max_tokens": values.get("max_output_tokens")}
    tools = [_responses_tool(one) for one in list_of_objects(values.get("tools") or [], "tools")]
    choice = values.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "function":
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    effort = (values.get("reasoning") or {}).get("effort") if isinstance(values.get("reasoning") or {}, dict) else None
    form = (values.get("text") or {}).get("format") if isinstance(values.get("text") or {}, dict) else None
    return chat | {"tools": tools, "reasoning_effort": effort, "response_format": _form(form)}


def _form(form: object) -> Any:
    """As the chat's: a schema's parts lie deeper there."""
    if isinstance(form, dict) and form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}
    return form


def _responses_tool(tool: Values) -> Values:
    if tool.get("type") != "function":
        return tool  # refused as the chat's
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _add_item(messages: list[Values], item: Values, where: str) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        text = texts_of(item.get("content"), f"{where}.content", ("input_text", "output_text", "text"))
        messages.append({"role": item.get("role"), "content": text})
    elif kind == "function_call":
        call = call_of(item.get("call_id"), item.get("name"), item.get("arguments"))
        if not messages or messages[-1].get("role") != "assistant":
            messages.append({"role": "assistant", "content": None, "tool_calls": []})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        output = texts_of(item.get("output"), f"{where}.output", ("input_text", "output_text", "text"))
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
    elif kind != "reasoning":  # of answers that are sent back: the model does not read them again
        raise unsupported(f"{where}.type", "messages, function calls and their outputs are read")


@dataclass
class _Block:
    """A part of an answer as it is told: its place, and what of it was sent."""

    index: int
    kind: str
    id: str
    text: str = ""


class ResponsesForm(Response):
    """An answer as OpenAI's response: items of output, and in a stream an event for each step."""

    def _begin(self) -> None:
        self._id, self._sequence = f"resp_{secrets.token_hex(12)}", 0
        self._block: _Block | None = None
        self._items: list[Values] = []

    def whole(self, figures: Figures) -> Values:
        choice = self._choices[0]
        return self._response(self._output(choice), choice.finish, figures)

    def _output(self, choice: Choice) -> list[Values]:
        found = [_reasoning(choice.reasoning)] if choice.reasoning else []
        if choice.text.strip() or not choice.calls:
            found.append(_message(choice.text))
        return found + [_function_call(call.id, call.name, call.arguments) for call in choice.calls]

    def _response(self, output: list[Values], finish: str | None, figures: Figures | None) -> Values:
        cut = finish == "length"
        status = "in_progress" if figures is None else "incomplete" if cut else "completed"
        return {
            **{"id": self._id, "object": "response", "created_at": self._created, "status": status, "error": None},
            **{"incomplete_details": {"reason": "max_output_tokens"} if cut else None, "model": self._model},
            **{"output": output, "usage": None if figures is None else _responses_usage(figures)},
            **{"instructions": None, "metadata": {}, "parallel_tool_calls": True, "tool_choice": "auto", "tools": []},
            **{"temperature": self._request.temperature, "top_p": self._request.top_p},
        }

    def _event(self, kind: str, **more: Any) -> bytes:
        self._sequence += 1
        return named_event({"type": kind, "sequence_number": self._sequence - 1, **more})

    def sent_opening(self) -> bytes:
        response = self._response([], None, None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def sent(self, event: Piece | Finished) -> bytes:
        self.take(event)
        if isinstance(event, Finished):
            return self._closed()
        if event.call is not None:
            item = _function_call(event.call.id, event.call.name, event.call.arguments)
            where = {"output_index": len(self._items) + (self._block is not None)}
            sent = self._closed() + self._event("response.output_item.added", item=item | {"arguments": ""}, **where)
            self._items.append(item)
            named = {"item_id": item["id"], **where}
            sent += self._event("response.function_call_arguments.delta", delta=item["arguments"], **named)
            sent += self._event(
                "response.function_call_arguments.done", arguments=item["arguments"], name=item["name"], **named
            )
            return sent + self._event("response.output_item.done", item=item, **where)
        if event.kind == "reasoning":
            return b""  # it is told in the last event
        return self._opened() + self._delta(event.text) if event.text else b""

    def _opened(self) -> bytes:
        if self._block is not None:
            return b""
        self._block = block = _Block(len(self._items), "message", f"msg_{secrets.token_hex(12)}")
        where = {"output_index": block.index}
        item = _message("") | {"id": block.id, "status": "in_progress", "content": []}
        part = {"type": "output_text", "text": "", "annotations": []}
        sent = self._event("response.output_item.added", item=item, **where)
        return sent + self._event("response.content_part.added", item_id=block.id, content_index=0, part=part, **where)

    def _delta(self, text: str) -> bytes:
        assert self._block is not None, "opened"
        self._block.text += text
        where = {"item_id": self._block.id, "output_index": self._block.index, "content_index": 0}
        return self._event("response.output_text.delta", delta=text, logprobs=[], **where)

    def _closed(self) -> bytes:
        block, self._block = self._block, None
        if block is None:
            return b""
        item = _message(block.text) | {"id": block.id}
        self._items.append(item)
        where = {"item_id": block.id, "output_index": block.index, "content_index": 0}
        sent = self._event("response.output_text.done", text=block.text, logprobs=[], **where)
        sent += self._event("response.content_part.done", part=item["content"][0], **where)
        return sent + self._event("response.output_item.done", item=item, output_index=block.index)

    def sent_end(self, figures: Figures) -> bytes:
        choice = self._choices[0]
        kind = "response.incomplete" if choice.finish == "length" else "response.completed"
        return self._event(kind, response=self._response(self._items, choice.finish, figures))


def _reasoning(text: str) -> Values:
    content = [{"type": "reasoning_text", "text": text}]
    return {"id": f"rs_{secrets.token_hex(12)}", "type": "reasoning", "summary": [], "content": content}


def _message(text: str) -> Values:
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    identity = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "status": "completed", "role": "assistant"}
    return identity | {"content": content}


def _function_call(call_id: str, name: str, arguments: str) -> Values:
    identity = {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call", "status": "completed"}
    return identity | {"call_id": call_id, "name": name, "arguments": arguments}


def _responses_usage(figures: Figures) -> Values:
    counted = usage(figures)
    return {
        "input_tokens": counted["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": figures.cached_tokens},
        "output_tokens": counted["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counted["total_tokens"],
    }


# Messages.


_MESSAGES_SAME = ("model", "stream", "temperature", "top_p", "top_k", "density", "exact", "min_p")
_MESSAGES_KNOWN = (
    *(*_MESSAGES_SAME, "max_tokens", "messages", "system", "stop_sequences", "tools", "tool_choice"),
    "thinking",
)
_MESSAGES_NEUTRAL: Mapping[str, Any] = {"container": (), "mcp_servers": ([],)}
_MESSAGES_IGNORED = ("metadata", "service_tier")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_of_messages(values: Values) -> Values:
    """The chat's body that a body of Anthropic's means; Failure names what cannot be had."""
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
