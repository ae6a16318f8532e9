"""OpenAI's JSON forms of an answer, whole and in chunks."""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from griffin_offload.engine.report import RunReport
from griffin_offload.serving.answer_parts import Call
from griffin_offload.serving.logprobs import TokenLogprob
from griffin_offload.serving.queue import Event, Figures, Finished, Piece, Progress
from griffin_offload.serving.requests import Request

_OBJECTS = {
    ("chat", False): "chat.completion",
    ("chat", True): "chat.completion.chunk",
    ("completions", False): "text_completion",
    ("completions", True): "text_completion",
}


# JSON may hold them as they are, but many clients of streams take each for a line's end, as str.splitlines does.
_LINE_ENDS = {ord(letter): f"\\u{ord(letter):04x}" for letter in "\x85\u2028\u2029"}


@dataclass
class Choice:
    """One answer as far as it came."""

    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    finish: str | None = None


class Response:
    """The answers to one request, gathered or passed on event by event."""

    def __init__(self, request: Request, model: str, choices: int) -> None:
        self._request, self._model = request, model
        self._id = ("chatcmpl-" if request.endpoint == "chat" else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())
        self._choices = [Choice() for _ in range(choices)]
        self._begin()

    def _begin(self) -> None:
        """What other forms begin with."""

    def sent_opening(self) -> bytes:
        """What a stream begins with."""
        return b"".join(map(server_sent, self.opening()))

    def sent_progress(self, event: Progress) -> bytes:
        """How far a pass has come, in a stream that was to say so."""
        done = {"layers_done": event.layers_done, "layers": event.layers}
        return server_sent(self._object([], stream=True) | {"griffin": done})

    def sent(self, event: Piece | Finished) -> bytes:
        """`event` in a stream."""
        found = self.chunk(event)
        if self._request.return_progress and isinstance(event, Piece):
            found["griffin"] = {"tokens": event.generated}
        return server_sent(found)

    def sent_end(self, figures: Figures) -> bytes:
        """The end of a stream."""
        closing = server_sent(self.closing(figures)) if self._request.include_usage else b""
        return closing + LAST_EVENT

    def take(self, event: Event) -> None:
        """Gather `event`."""
        if isinstance(event, Piece):
            choice = self._choices[event.choice]
            if event.kind == "reasoning":
                choice.reasoning += event.text
            else:
                choice.text += event.text
            choice.tokens += event.tokens
            choice.calls += [event.call] if event.call is not None else []
        elif isinstance(event, Finished):
            self._choices[event.choice].finish = event.reason

    def whole(self, figures: Figures) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [self._whole_choice(index, choice) for index, choice in enumerate(self._choices)]
        return self._object(choices, stream=False) | {"usage": usage(figures), "griffin": summary(figures)}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks in front of all text: whose turn it is, in each answer of a chat."""
        if self._request.endpoint != "chat":
            return []
        start = {"role": "assistant", "content": ""}
        return [self._chunk(index, start, None, ()) for index in range(len(self._choices))]

    def chunk(self, event: Piece | Finished) -> dict[str, Any]:
        """`event` as a chunk of a stream."""
        if isinstance(event, Finished):
            return self._chunk(event.choice, {}, event.reason, ())
        if event.call is not None:
            index = len(self._choices[event.choice].calls)
            self._choices[event.choice].calls.append(event.call)
            return self._chunk(
                event.choice, {"tool_calls": [{"index": index, **_called(event.call)}]}, None, event.tokens
            )
        name = "content" if event.kind == "content" else "reasoning_content"
        return self._chunk(event.choice, {name: event.text}, None, event.tokens)

    def closing(self, figures: Figures) -> dict[str, Any]:
        """The chunk with the figures."""
        return self._object([], stream=True) | {"usage": usage(figures), "griffin": summary(figures)}

    def _object(self, choices: list[dict[str, object]], *, stream: bool) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": _OBJECTS[self._request.endpoint, stream],
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        logprobs = self._logprobs(choice.tokens)
        if self._request.endpoint == "chat":
            text = None if choice.calls and not choice.text.strip() else choice.text
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            message |= {"reasoning_content": choice.reasoning} if choice.reasoning else {}
            message |= {"tool_calls": [_called(call) for call in choice.calls]} if choice.calls else {}
            return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish}
        return {"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish}

    def _chunk(
        self, index: int, delta: dict[str, Any], finish: str | None, tokens: tuple[TokenLogprob, ...]
    ) -> dict[str, Any]:
        logprobs = self._logprobs(tokens) if tokens else None
        content = {"delta": delta} if self._request.endpoint == "chat" else {"text": delta.get("content", "")}
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
        usage_field = {"usage": None} if self._request.include_usage else {}
        return self._object([choice], stream=True) | usage_field

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._request.top_logprobs is None:
            return None
        if self._request.endpoint == "chat":
            return {"content": [_chat_token(token) for token in tokens], "refusal": None}
        return {
            "tokens": [label(token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [by_label(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


def _called(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return _plain(token) | {"top_logprobs": [_plain(other) for other in token.alternatives]}


def by_label(token: TokenLogprob) -> dict[str, float]:
    """Of `token` and its alternatives; of several with one name the likeliest is told."""
    found: dict[str, float] = {}
    for other in (*token.alternatives, token):
        found.setdefault(label(other), other.logprob)
    return found


def label(token: TokenLogprob) -> str:
    """A name by which tokens differ that decode to the same text by themselves: parts of letters, and words with and
    without the space in front of them. A list of these names makes the text."""
    if not token.bytes:
        return token.text
    try:
        return bytes(token.bytes).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)


def _plain(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.text,
        "logprob": token.logprob,
        "bytes": list(token.bytes) if token.bytes is not None else None,
    }


def usage(figures: Figures) -> dict[str, Any]:
    """OpenAI's count of tokens."""
    return {
        "prompt_tokens": figures.prompt_tokens,
        "completion_tokens": figures.completion_tokens,
        "total_tokens": figures.prompt_tokens + figures.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": figures.cached_tokens},
    }


def summary(figures: Figures) -> dict[str, Any]:
    """What this server alone has to say: how much of the model the answer came from."""
    last, kept = figures.reports[-1], figures.kept_by_layer
    structure = {} if last.structure is None else {"complete": all(_complete(r) for r in figures.reports)}
    return {
        "density": last.density,
        "precision": last.precision,
        "activation_kept": last.activation_kept,
        "activation_kept_heldout": last.activation_kept_heldout,
        "activation_kept_by_layer": None if kept is None else [round(share, 4) for share in kept],
        "streamed_bytes": figures.streamed_bytes,
        "decode_streamed_bytes": sum(report.decode_streamed_bytes for report in figures.reports),
        "prefill_s": last.prefill_s,
        "prefill_tokens_per_s": last.prefill_tokens_per_s,
        "decode_tokens_per_s": last.decode_tokens_per_s,
        "peak_device_bytes": last.peak_device_bytes,
        "exact": last.drafting is not None and last.drafting.verified,
    } | ({"structure": structure} if structure else {})


def _complete(report: RunReport) -> bool:
    return report.structure is not None and report.structure.complete


def encode(value: dict[str, object]) -> bytes:
    """Strict JSON, in UTF-8 and on one line for all who count lines; a lone surrogate cannot occur in decoded text."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_LINE_ENDS).encode()


def server_sent(value: dict[str, object]) -> bytes:
    """One event of a stream."""
    return b"data: " + encode(value) + b"\n\n"


LAST_EVENT = b"data: [DONE]\n\n"


def named_event(value: dict[str, Any]) -> bytes:
    """One event of a stream, named as its type."""
    return f"event: {value['type']}\n".encode() + b"data: " + encode(value) + b"\n\n"
