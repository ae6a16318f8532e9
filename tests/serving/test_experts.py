"""A mixture of experts behind the server: requests take turns, and every answer is the full model's."""

from typing import Any

import pytest
import torch
from tiny_models import CHAT_TEMPLATE, write_tokenizer
from transformers import AutoModelForCausalLM

TALKS = ("the cat sat on", "another river", "nothing was left")


def _full(directory: Any, tokenizer: Any, text: str) -> str:
    dense = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = tokenizer(text, return_tensors="pt").input_ids
    answer = dense.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    return str(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.slow
def test_requests_in_turn(checkpoints, serve_one):
    directory = checkpoints("qwen3_moe")
    tokenizer = write_tokenizer(directory, CHAT_TEMPLATE)
    expected = [_full(directory, tokenizer, text) for text in TALKS]
    with serve_one(directory, {"density": 0.5}) as started:
        body = {"model": "tiny", "max_tokens": 6, "temperature": 0}
        for exact in (False, True, False):
            answers = [started.post(body | {"prompt": text, "exact": exact}).json() for text in TALKS]
            assert [answer["choices"][0]["text"] for answer in answers] == expected
        talk: list[dict[str, str]] = []
        for text in TALKS:
            talk.append({"role": "user", "content": text})
            answer = started.post(body | {"messages": talk}, "/v1/chat/completions").json()
            talk.append(answer["choices"][0]["message"])
            assert answer["choices"][0]["finish_reason"] in ("length", "stop")
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_requests_that_are_routed(checkpoints, serve_one):
    with serve_one(checkpoints("qwen3_moe"), {"density": 0.5, "missing_experts": "route"}) as started:
        body = {"model": "tiny", "max_tokens": 6, "temperature": 0}
        first = [started.post(body | {"prompt": text}).json()["choices"][0]["text"] for text in TALKS]
        again = [started.post(body | {"prompt": text}).json()["choices"][0]["text"] for text in reversed(TALKS)]
        assert again[::-1] == first
