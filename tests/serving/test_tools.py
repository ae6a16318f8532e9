"""Calls of functions and thoughts, by the real `openai` client against a model that is forced to call."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tiny_models import CHAT_TEMPLATE, write_checkpoint, write_tokenizer

from griffin_offload import GriffinModel
from griffin_offload.serving.tools import Tools
from griffin_offload.transformers_api import response_parser

pytestmark = pytest.mark.skipif(response_parser() is None, reason="this release of transformers has no such parser")
# As Hermes and Qwen write calls; what was called and given back is shown, and a switch for thinking.
TEMPLATE = (
    "{% if tools %}tools {% for tool in tools %}{{ tool.function.name }} {% endfor %}<tool_call>{% endif %}"
    "{% for m in messages %}{% for call in m.tool_calls or [] %}called {{ call.function.name }} "
    "{{ call.function.arguments.city }} {% endfor %}{% endfor %}"
    + CHAT_TEMPLATE
    + "{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}{# </think> #}"
)
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Bern"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "of a city", "parameters": CITY, "strict": True},
    },
    {"type": "function", "function": {"name": "clock"}},
]
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "the cat"}],
    "max_tokens": 150,
    "seed": 1,
}


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hermes")
    write_checkpoint("llama2", directory)
    write_tokenizer(directory, TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def client(hermes: Path, serving) -> Iterator[openai.OpenAI]:
    with serving(hermes, {"ctx_size": 400}) as started, started.client() as found:
        yield found


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_call_that_is_forced(client: openai.OpenAI, choice: Any):
    answer = client.chat.completions.create(**CHAT, tools=TOOLS, tool_choice=choice).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "weather" or (choice == "required" and call.function.name == "clock")
    arguments = json.loads(call.function.arguments)
    assert arguments == {} if call.function.name == "clock" else arguments["city"] in ("Rome", "Bern")


def test_a_loop_of_three_calls(client: openai.OpenAI):
    """Each call goes back with what it gave; the last question is answered by text."""
    messages: list[Any] = list(CHAT["messages"])
    rest = {name: value for name, value in CHAT.items() if name != "messages"}
    for _ in range(3):
        answer = client.chat.completions.create(messages=messages, tools=TOOLS, tool_choice="required", **rest)
        message = answer.choices[0].message
        messages.append(message)
        for call in message.tool_calls or []:
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "warm"})
    last = client.chat.completions.create(
        messages=messages, tools=TOOLS, tool_choice="none", **(rest | {"max_tokens": 5})
    )
    assert last.choices[0].finish_reason == "length"
    assert last.choices[0].message.content
    assert len(messages) == 7


def test_calls_are_streamed_as_deltas(client: openai.OpenAI):
    whole = client.chat.completions.create(**CHAT, tools=TOOLS, tool_choice="required").choices[0]
    chunks = list(client.chat.completions.create(**CHAT, tools=TOOLS, tool_choice="required", stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [(call.index, call.type) for call in deltas] == [(0, "function")]
    assert deltas[0].id is not None
    function = deltas[0].function
    assert function is not None
    assert function.model_dump() == (whole.message.tool_calls or [])[0].function.model_dump()
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def _prompt_of(client: openai.OpenAI, **more: Any) -> int:
    answer = client.chat.completions.create(**(CHAT | {"max_tokens": 1} | more))
    assert answer.usage is not None
    return answer.usage.prompt_tokens


def test_the_template_is_told(client: openai.OpenAI, hermes: Path):
    with GriffinModel.from_pretrained(hermes, device="cpu", max_gpu_mem="1GB", density=0.5) as model:
        render = model.tokenizer.apply_chat_template
        shared = {"add_generation_prompt": True, "return_dict": True}
        plain = _prompt_of(client)
        assert plain == len(render(CHAT["messages"], **shared)["input_ids"])
        assert _prompt_of(client, tools=TOOLS) == len(render(CHAT["messages"], tools=TOOLS, **shared)["input_ids"])
        assert _prompt_of(client, tools=TOOLS, tool_choice="none") == plain
        thinking = len(render(CHAT["messages"], enable_thinking=True, **shared)["input_ids"])
        assert thinking > plain
        switch: Any = {"chat_template_kwargs": {"enable_thinking": True}}
        assert _prompt_of(client, extra_body=switch) == thinking
        assert _prompt_of(client, reasoning_effort="high") == thinking
        assert _prompt_of(client, reasoning_effort="none") == plain


def test_thoughts_are_apart(client: openai.OpenAI):
    """The template has begun them; a grammar ends them."""
    more: Any = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}, "regex": "ab+</think>(yes|no)"}}
    whole = client.chat.completions.create(**CHAT, **more).choices[0]
    assert whole.message.content in ("yes", "no")
    thoughts = (whole.message.model_extra or {})["reasoning_content"]
    assert set(thoughts) == {"a", "b"}
    chunks = [chunk.choices[0].delta for chunk in client.chat.completions.create(**CHAT, **more, stream=True)]
    assert "".join(delta.content or "" for delta in chunks) == whole.message.content
    assert "".join((delta.model_extra or {}).get("reasoning_content", "") for delta in chunks) == thoughts


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "x": 3}}]}, "tools[0].function.x"),
        ({"tools": TOOLS, "tool_choice": "required", "regex": "a"}, "tool_choice"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
        ({"chat_template_kwargs": {"colour": 1}}, "chat_template_kwargs.colour"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ],
    ids=str,
)
def test_what_cannot_be_used(client: openai.OpenAI, fields: dict[str, Any], param: str):
    with pytest.raises(openai.BadRequestError) as error:
        client.post("/chat/completions", body=CHAT | fields, cast_to=object)
    assert error.value.param == param


def test_a_template_without_tools(tiny):
    for fields, param in (({"tools": TOOLS}, "tools"), ({"reasoning_effort": "low"}, "reasoning_effort")):
        response = tiny.post(CHAT | fields, "/v1/chat/completions")
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        assert response.json()["error"]["code"] == "unsupported_parameter"


def test_tokens_that_are_favoured_and_few(client: openai.OpenAI):
    favoured = client.chat.completions.create(**(CHAT | {"max_tokens": 4}), temperature=0, logit_bias={"70": 100})
    assert favoured.choices[0].message.content
    letters = set(favoured.choices[0].message.content)
    assert len(letters) == 1
    one = [
        client.chat.completions.create(**(CHAT | {"max_tokens": 6, "seed": seed}), extra_body={"top_k": 1}).choices[0]
        for seed in (1, 2)
    ]
    assert one[0].message.content == one[1].message.content


def test_an_echo(client: openai.OpenAI):
    options: dict[str, Any] = {"model": "tiny", "prompt": "the cat", "max_tokens": 4, "temperature": 0}
    text = client.completions.create(**options).choices[0].text
    assert client.completions.create(**options, echo=True).choices[0].text == "the cat" + text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**options, echo=True, stream=True)]
    assert "".join(pieces) == "the cat" + text
    with pytest.raises(openai.BadRequestError, match="echo is not supported here"):
        client.completions.create(**options, echo=True, logprobs=1)


def test_a_prompt_as_tokens(tiny, model: GriffinModel):
    ids = model.tokenizer("the cat")["input_ids"]
    found = tiny.post({"prompt": "the cat"}, "/tokenize").json()
    assert found == {"tokens": ids, "count": len(ids), "max_model_len": 200}
    chat = tiny.post({"model": "tiny", "messages": CHAT["messages"]}, "/tokenize").json()
    rendered = model.tokenizer.apply_chat_template(CHAT["messages"], add_generation_prompt=True, return_dict=True)
    assert chat["tokens"] == rendered["input_ids"]
    assert tiny.post({"prompt": ["a", "b"]}, "/tokenize").status_code == 400
    assert tiny.http.get("/tokenize").status_code == 405


def test_embeddings_are_refused_by_name(tiny):
    with tiny.client() as found, pytest.raises(openai.NotFoundError, match="/v1/embeddings is not served"):
        found.embeddings.create(model="tiny", input="x")


@pytest.mark.parametrize(("space", "fits"), [("", True), ("\n    ", True), ("\n\n", False), ("\r\t", False)], ids=repr)
def test_a_forced_call_does_not_run_away_in_spaces(space: str, fits: bool):
    llguidance = pytest.importorskip("llguidance", reason="llguidance is not installed")
    structure = Tools(tuple(TOOLS[1:]), ("clock",)).forced_structure('"<"', '">"')
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), llguidance.grammar_from("lark", structure.grammar))
    text = f'<{{{space}"name": "clock", "arguments": {{}}}}>'.encode()
    assert (matcher.validate_tokens(list(text)) == len(text)) is fits
