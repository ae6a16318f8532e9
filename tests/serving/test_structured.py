"""Structured answers over HTTP, by the real `openai` client: they validate, and what cannot be kept to is refused."""

import json
import re
from typing import Any

import jsonschema
import openai
import pytest
from marks import mostly_slow

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}]}


@pytest.mark.parametrize("extra", mostly_slow([{}, {"exact": True}], 1), ids=str)
def test_a_schema_is_kept_to(client: openai.OpenAI, extra: dict[str, Any]):
    for seed in range(2):
        answer = client.chat.completions.create(
            **CHAT, response_format=FORMAT, max_tokens=120, seed=seed, temperature=0.3, n=2, extra_body=extra
        )
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
        assert answer.model_extra is not None
        assert answer.model_extra["griffin"]["structure"] == {"complete": True}


def test_streams_and_completions(client: openai.OpenAI):
    stream = client.chat.completions.create(**CHAT, response_format=FORMAT, max_tokens=120, seed=1, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    jsonschema.validate(json.loads(text), SCHEMA)
    for extra, pattern in (({"regex": "(yes|no){2}"}, "(yes|no){2}"), ({"grammar": 'start: "a" /b+c/'}, "ab+c")):
        answer = client.completions.create(
            model="tiny", prompt="the cat", max_tokens=60, seed=1, extra_body=extra, stop=["zz"]
        ).choices[0]
        assert answer.finish_reason == "length" or re.fullmatch(pattern, answer.text)


def test_any_object(client: openai.OpenAI):
    answer = client.chat.completions.create(
        **CHAT, response_format={"type": "json_object"}, max_tokens=150, seed=1, temperature=0.2
    )
    text, finish = answer.choices[0].message.content or "", answer.choices[0].finish_reason
    assert text.startswith("{")
    assert finish == "length" or isinstance(json.loads(text), dict)
    assert answer.model_extra is not None
    assert answer.model_extra["griffin"]["structure"]["complete"] == (finish == "stop")


def test_an_answer_that_is_cut_says_so(client: openai.OpenAI):
    answer = client.chat.completions.create(**CHAT, response_format=FORMAT, max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.model_extra is not None
    assert answer.model_extra["griffin"]["structure"] == {"complete": False}


def test_text_asks_for_nothing(client: openai.OpenAI):
    answer = client.chat.completions.create(**CHAT, response_format={"type": "text"}, max_tokens=3)
    assert answer.model_extra is not None
    assert "structure" not in answer.model_extra["griffin"]


def _json(schema: Any, **more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}}


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        (_json({"not": {}}), "response_format", 'cannot be enforced: Unimplemented keys: \\["not"\\]'),
        (_json({"type": "array", "uniqueItems": True}), "response_format", "uniqueItems"),
        (_json(3), "response_format.json_schema.schema", "an object"),
        (_json({}, strict=1), "response_format.json_schema.strict", "true or false"),
        (_json({}, other=1), "response_format.json_schema.other", "unknown field"),
        ({"response_format": {"type": "json"}}, "response_format.type", "text, json_object or json_schema"),
        ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x", "unknown field"),
        ({"response_format": "json"}, "response_format", "an object"),
        ({"regex": "(a"}, "regex", "unclosed group"),
        ({"grammar": "start: foo"}, "grammar", "unknown name"),
        ({"regex": 3}, "regex", "a string"),
        ({"regex": "a", "grammar": "start: b"}, "response_format", "give one"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "response_format", "give one"),
    ],
    ids=str,
)
def test_what_cannot_be_kept_to_is_refused(tiny, fields: dict[str, Any], param: str, reason: str):
    response = tiny.post({**CHAT, **fields}, "/v1/chat/completions")
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert re.search(reason, error["message"])
