"""Answers are taken apart the same way however they come: text, thoughts and calls, in each known form."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from griffin_offload.serving.answer_parts import FORMATS, AnswerFormat, Part, format_of, parser_for
from griffin_offload.transformers_api import response_parser

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
ARGUMENTS = {"city": "Zürich", "days": [1, 2], "note": 'a "b" } </x>'}
WRITTEN = json.dumps(ARGUMENTS, ensure_ascii=False)
CALL = json.dumps({"name": "weather", "arguments": ARGUMENTS}, ensure_ascii=False)
LLAMA = json.dumps({"name": "weather", "parameters": ARGUMENTS}, ensure_ascii=False)
needs_parser = pytest.mark.skipif(response_parser() is None, reason="this release of transformers has no such parser")

CASES: list[tuple[str, str, str, str, str, int]] = [
    # form, end of the prompt, answer, text, thoughts, calls
    ("hermes", "", "just text < and <b>", "just text < and <b>", "", 0),
    ("hermes", "", f"I look.\n<tool_call>\n{CALL}\n</tool_call>", "I look.\n", "", 1),
    ("hermes", "", f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>", "", "", 2),
    ("hermes", "", f"<think>\nlet me see\n</think>\n\nyes<tool_call>{CALL}</tool_call>", "yes", "let me see\n", 1),
    ("hermes", "<|assistant|>\n<think>\n", "hm\n</think>\n\nyes", "yes", "hm\n", 0),
    ("hermes", "", "<tool_call>\nnothing\n</tool_call>", "nothing", "", 0),
    ("hermes", "", f"<tool_call>\n{CALL}\n", "", "", 1),
    ("thinking", "<think>", "hm</think>yes", "yes", "hm", 0),
    ("mistral", "", f"[TOOL_CALLS][{CALL}, {CALL}]", "", "", 2),
    ("mistral", "", f"text[TOOL_CALLS]weather[ARGS]{WRITTEN}[TOOL_CALLS]weather[ARGS]{WRITTEN}", "text", "", 2),
    ("llama3", "", LLAMA, "", "", 1),
    ("llama3", "", f"<|python_tag|>{LLAMA}; {LLAMA}", "", "", 2),
    ("llama3", "", "It is warm.", "It is warm.", "", 0),
    ("llama3", "", '{"name": ', '{"name":', "", 0),
    ("gpt-oss", "", "<|channel|>final<|message|>yes<|return|>", "yes", "", 0),
    (
        "gpt-oss",
        "",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes",
        "yes",
        "hm",
        0,
    ),
    (
        "gpt-oss",
        "",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        f"<|constrain|>json<|message|>{WRITTEN}<|call|>",
        "",
        "hm",
        1,
    ),
]


def _parts(form: AnswerFormat, prompt: str, pieces: list[str]) -> list[Part]:
    parser = parser_for(form, prompt, TOOLS)
    return [part for piece in pieces for part in parser.feed(piece)] + parser.finish()


@needs_parser
@pytest.mark.parametrize(("form", "prompt", "answer", "text", "thoughts", "calls"), CASES)
@given(data=st.data())
def test_in_any_pieces(form: str, prompt: str, answer: str, text: str, thoughts: str, calls: int, data: st.DataObject):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=8)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    parts = _parts(FORMATS[form], prompt, pieces)
    found = [part.call for part in parts if part.call is not None]
    assert "".join(part.text for part in parts if part.kind == "content").strip() == text.strip()
    assert "".join(part.text for part in parts if part.kind == "reasoning") == thoughts
    assert [(call.name, json.loads(call.arguments)) for call in found] == [("weather", ARGUMENTS)] * calls
    assert len({call.id for call in found}) == calls


class _Tokenizer:
    def __init__(self, template: Any, response_template: Any = None) -> None:
        self.chat_template, self.response_template = template, response_template


@needs_parser
@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ messages }}", None),
        (None, None),
        ("<tool_call> {{ tools }}", "hermes"),
        ({"default": "x", "tool_use": "<tool_call>"}, "hermes"),
        ("<tool_call><function=f>", None),
        ("[TOOL_CALLS]", "mistral"),
        ("<|python_tag|>", "llama3"),
        ("<|channel|>x<|message|>", "gpt-oss"),
        ("{{ x.split('</think>') }}", "thinking"),
    ],
)
def test_the_template_tells_the_form(template: Any, name: str | None):
    found = format_of(_Tokenizer(template))
    assert (found.name if found else None) == name


@needs_parser
def test_a_tokenizer_that_says_itself():
    own = {
        "start_anchor": "<bot>",
        "fields": {"content": {}, "tool_calls": {"open": "<<", "close": ">>", "content": "json", "repeats": True}},
    }
    found = format_of(_Tokenizer("<tool_call>", own))
    assert found is not None
    parts = _parts(found, "<user>x<bot>", ["so <<", CALL, ">>"])
    assert [part.text for part in parts if part.text] == ["so "]
    assert [json.loads(part.call.arguments) for part in parts if part.call] == [ARGUMENTS]
