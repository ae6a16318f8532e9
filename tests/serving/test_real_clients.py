"""Clients of other makers, where they are installed: what each was seen to need."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import ARCHITECTURES, CHAT_TEMPLATE, write_checkpoint, write_tokenizer

from griffin_offload.transformers_api import response_parser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(response_parser() is None, reason="this release of transformers has no such parser"),
    pytest.mark.filterwarnings("ignore"),  # theirs are not ours
]
KEY = "sk-a-secret"
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Bern"]}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serving) -> Iterator[Any]:
    """A server that wants a key, of a model that calls as Hermes does."""
    directory: Path = tmp_path_factory.mktemp("hermes")
    write_checkpoint("llama2", directory)
    write_tokenizer(directory, "{% if tools %}{# <tool_call> #}{% endif %}" + CHAT_TEMPLATE)
    with serving(directory, {"ctx_size": 400}, api_key=KEY) as started:
        yield started


def test_anthropic(server):
    anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed")
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}]}
    tools: Any = [{"name": "weather", "input_schema": CITY}]
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as client:
        counted = client.messages.count_tokens(**asked)
        with client.messages.stream(**asked, max_tokens=5) as stream:
            text, message = "".join(stream.text_stream), stream.get_final_message()
        assert message.content[0].text == text
        assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == counted.input_tokens
        assert message.stop_reason == "max_tokens"
        called = client.messages.create(**asked, max_tokens=150, tools=tools, tool_choice={"type": "any"})
        assert called.stop_reason == "tool_use"
        assert called.content[0].input["city"] in ("Rome", "Bern")
        with pytest.raises(anthropic.AuthenticationError):
            client.with_options(api_key="sk-another").messages.create(**asked, max_tokens=1)


def test_langchain(server):
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    model = langchain.ChatOpenAI(base_url=f"{server.url}/v1", model="tiny", api_key=KEY, max_retries=0, max_tokens=150)
    assert len("".join(piece.content for piece in model.bind(max_tokens=5).stream("the cat"))) > 0
    schema = {"title": "Where", "description": "a city", **CITY}
    assert model.with_structured_output(schema, method="json_schema").invoke("the cat")["city"] in ("Rome", "Bern")
    (call,) = model.bind_tools([schema], tool_choice="any").invoke("the cat").tool_calls
    assert (call["name"], call["args"]["city"] in ("Rome", "Bern")) == ("Where", True)


def test_litellm(server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the internet when it is imported
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    tool = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
    whole = litellm.completion(
        model="openai/tiny",
        api_base=f"{server.url}/v1",
        api_key=KEY,
        messages=[{"role": "user", "content": "the cat"}],
        tools=[tool],
        tool_choice="required",
        max_tokens=150,
    )
    assert json.loads(whole.choices[0].message.tool_calls[0].function.arguments)["city"] in ("Rome", "Bern")


def test_an_agent_that_calls_three_times(tmp_path: Path, serving):
    """smolagents asks for a call with every step, gives the model what the tool said, and asks for an answer last."""
    smolagents = pytest.importorskip("smolagents", reason="smolagents is not installed")
    llama = ARCHITECTURES["llama2"]
    replace(llama, settings={**llama.settings, "max_position_embeddings": 4096}).build().save_pretrained(tmp_path)
    write_tokenizer(tmp_path, "{% if tools %}{# <tool_call> #}{% endif %}" + CHAT_TEMPLATE)
    asked: list[str] = []

    @smolagents.tool
    def weather(city: str) -> str:
        """Say the weather.

        Args:
            city: where (choices: ["Rome", "Bern"])
        """
        asked.append(city)
        return "rain"

    with serving(tmp_path, {"ctx_size": 4000}, api_key=KEY) as started:
        model = smolagents.OpenAIModel("tiny", api_base=f"{started.url}/v1", api_key=KEY, max_tokens=300)
        texts = smolagents.agents.EMPTY_PROMPT_TEMPLATES | {"system_prompt": "call"}  # its own take thousands of tokens
        agent = smolagents.ToolCallingAgent([weather], model, prompt_templates=texts, max_steps=3, verbosity_level=0)
        del agent.tools["final_answer"]  # a model without a thought might take it first
        answer = agent.run("the cat")
    assert [step.tool_calls[0].name for step in agent.memory.steps if getattr(step, "tool_calls", None)] == [
        "weather"
    ] * 3
    assert len(asked) == 3
    assert isinstance(answer, str)
