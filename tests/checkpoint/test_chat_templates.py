"""Chat templates that go through the parts of a message, as those of models that see do, and templates that do not."""

from typing import Any

import pytest
from scripted_model import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from griffin_offload.checkpoint.tokenizer import encode_messages, template_end
from griffin_offload.errors import CheckpointError

_PARTS = "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
_STRICT = "{% if m['content'] is string %}{{ raise_exception('parts are wanted') }}{% endif %}" + _PARTS
_EITHER = "{% if m['content'] is string %}{{ m['content'] }}{% else %}WRONG{% endif %}"
CONTENTS = {"parts": _PARTS, "parts alone": _STRICT, "either": _EITHER, "text": "{{ m['content'] | trim }}"}
QUESTION = [{"role": "user", "content": "Why?  "}]


def tokenizer_with(content: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(["<end>"])
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]" + content + "<end>{% endfor %}"
    return tokenizer


@pytest.mark.parametrize("name", CONTENTS)
def test_the_question_is_in_the_prompt(name: str):
    tokenizer = tokenizer_with(CONTENTS[name])
    space = "" if name == "text" else "  "
    said: Any = tokenizer.decode(encode_messages(tokenizer, QUESTION))
    assert said == f"[user]Why?{space}<end>"
    system = [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert tokenizer.decode(encode_messages(tokenizer, system)) == f"[system]Be brief.<end>[user]Why?{space}<end>"
    assert tokenizer.convert_ids_to_tokens(template_end(tokenizer)) == ["<end>"]


def test_a_template_that_changes_texts_has_its_way():
    tokenizer = tokenizer_with("{{ m['content'] | upper }}")
    assert tokenizer.decode(encode_messages(tokenizer, QUESTION)) == "[user]WHY?  <end>"


def test_a_template_that_takes_neither_says_why():
    tokenizer = tokenizer_with("{{ raise_exception('no questions') }}")
    with pytest.raises(CheckpointError, match="no questions"):
        encode_messages(tokenizer, QUESTION)
