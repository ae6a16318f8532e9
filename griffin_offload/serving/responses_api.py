"""OpenAI's responses: a body made a chat's, and an answer told in its form.

One turn of text, thoughts and function calls, whole or streamed. Nothing is kept between requests: what asks for that
is refused by name.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from griffin_offload.serving.api_errors import unsupported
from griffin_offload.serving.queue import Figures, Finished, Piece
from griffin_offload.serving.responses import Choice, Response, named_event, usage
from griffin_offload.serving.tools import call_of
from griffin_offload.serving.validation import FieldReader, Values, list_of_objects, texts_of

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
    """The chat's body that a response's body means; ApiError names what cannot be had."""
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
