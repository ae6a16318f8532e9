"""OpenAI's responses by the real `openai` client, and Anthropic's messages by what their client reads."""

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from griffin_offload.config import ServeConfig
from griffin_offload.serving.messages_api import chat_of_messages
from griffin_offload.serving.requests import parse_request
from griffin_offload.serving.responses_api import chat_of_responses

SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "maximum": 99}},
    "required": ["age"],
    "additionalProperties": False,
}


def test_a_response_is_the_chats_answer(client: openai.OpenAI):
    response = client.responses.create(
        model="tiny", input="the cat", instructions="be kind", max_output_tokens=8, temperature=0
    )
    messages: Any = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "the cat"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    assert response.output_text == chat.choices[0].message.content
    assert (response.status, response.incomplete_details and response.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert response.usage is not None
    assert chat.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (chat.usage.prompt_tokens, 8)
    parts: Any = [{"role": "user", "content": [{"type": "input_text", "text": "the cat"}]}]
    again = client.responses.create(
        model="tiny", input=parts, instructions="be kind", max_output_tokens=8, temperature=0
    )
    assert again.output_text == response.output_text


_KIND = {"role": "system", "content": "be kind"}
_ASKED = {"role": "user", "content": "the cat"}


@pytest.mark.parametrize(
    ("made", "given"),
    [
        (chat_of_responses, {"instructions": "be kind", "input": "the cat"}),
        (chat_of_responses, {"input": [_KIND | {"role": "developer"}, _ASKED]}),
        (chat_of_messages, {"system": "be kind", "messages": [_ASKED], "max_tokens": 2}),
    ],
    ids=["instructions", "developer", "system"],
)
def test_instructions_are_the_systems(made: Callable[[dict[str, Any]], dict[str, Any]], given: dict[str, Any]):
    chat = {name: value for name, value in made({"model": "m"} | given).items() if value is not None}
    assert list(parse_request("chat", chat, "m", ServeConfig()).messages) == [_KIND, _ASKED]


def test_a_response_in_events(client: openai.OpenAI):
    options: dict[str, Any] = {"model": "tiny", "input": "the cat", "max_output_tokens": 12, "temperature": 0}
    whole = client.responses.create(**options)
    events = list(client.responses.create(**options, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.incomplete"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    with client.responses.stream(**options) as stream:
        assert stream.until_done() is not None


def test_a_response_by_a_schema(client: openai.OpenAI):
    form: Any = {"format": {"type": "json_schema", "name": "age", "schema": SCHEMA, "strict": True}}
    response = client.responses.create(model="tiny", input="the cat", text=form, max_output_tokens=80, temperature=0)
    assert response.status == "completed"
    assert json.loads(response.output_text)["age"] <= 99


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "x"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"input": 3}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "item_reference"}]}, "input[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"colour": 1}, "colour"),
    ],
    ids=str,
)
def test_what_a_response_cannot_have(tiny, fields: dict[str, Any], param: str):
    refused = tiny.post({"model": "tiny", "input": "x"} | fields, "/v1/responses")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


BODY: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 8,
    "temperature": 0,
    "system": [{"type": "text", "text": "be kind", "cache_control": {"type": "ephemeral"}}],
    "messages": [{"role": "user", "content": [{"type": "text", "text": "the cat"}]}],
}


def test_a_message_is_the_chats_answer(tiny, client: openai.OpenAI):
    found = tiny.post(BODY, "/v1/messages").json()
    messages: Any = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "the cat"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    assert found["content"] == [{"type": "text", "text": chat.choices[0].message.content}]
    assert (found["type"], found["role"], found["stop_reason"]) == ("message", "assistant", "max_tokens")
    assert chat.usage is not None
    counted = found["usage"]
    assert counted["input_tokens"] + counted["cache_read_input_tokens"] == chat.usage.prompt_tokens
    assert counted["output_tokens"] == 8


def test_a_message_in_events(tiny):
    whole = tiny.post(BODY, "/v1/messages").json()
    lines = tiny.post(BODY | {"stream": True}, "/v1/messages").text.split("\n\n")
    events = [json.loads(line.partition("data: ")[2]) for line in lines if line]
    assert [line.partition("\n")[0] for line in lines if line] == [f"event: {event['type']}" for event in events]
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    text = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    assert text == whole["content"][0]["text"]


def test_anthropics_own_client(tiny):
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=tiny.url, api_key="unused", max_retries=0) as client:
        told = {name: BODY[name] for name in ("model", "max_tokens", "system", "messages")}
        told["extra_body"] = {"temperature": 0}
        message = client.messages.create(**told)
        assert message.content[0].type == "text"
        with client.messages.stream(**told) as stream:
            assert "".join(stream.text_stream) == message.content[0].text
            assert stream.get_final_message().stop_reason == "max_tokens"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0][0].type"),
        ({"tool_choice": {"type": "some"}}, "tool_choice"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"mcp_servers": [1]}, "mcp_servers"),
    ],
    ids=str,
)
def test_what_a_message_cannot_have(tiny, fields: dict[str, Any], param: str):
    refused = tiny.post(BODY | fields, "/v1/messages")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_tokens_of_a_message_are_counted(tiny):
    """As coding agents ask before they send; without max_tokens."""
    body = {"model": "tiny", "system": "be kind", "messages": [{"role": "user", "content": "the cat"}]}
    counted = tiny.post(body, "/v1/messages/count_tokens").json()
    answer = tiny.post(body | {"max_tokens": 2}, "/v1/messages").json()
    assert counted == {
        "input_tokens": answer["usage"]["input_tokens"] + answer["usage"].get("cache_read_input_tokens", 0)
    }
