"""A server's answers where a checkpoint's generation settings ask for what clients cannot: penalties, stop strings."""

import collections
import json
import shutil
from pathlib import Path

import pytest
import torch
from scripted_model import EOS, byte_tokenizer, write_scripted
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

PENALTIES = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "suppress_tokens": [40, 41]}
TEXT = "the cat and the cat and"


@pytest.mark.filterwarnings("always")
def test_log_probabilities_are_the_models_own(serve_one, chatty: Path, tmp_path: Path):
    directory = Path(shutil.copytree(chatty, tmp_path / "penalised"))
    settings = directory / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | PENALTIES))
    tokenizer, dense = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    body = {"model": "tiny", "prompt": TEXT, "max_tokens": 6, "temperature": 0, "logprobs": 5}
    with (
        pytest.warns(UserWarning, match=r"repetition_penalty 1.5, no_repeat_ngram_size 2: the server leaves out"),
        serve_one(directory, {"density": 1.0, "quantize": "none"}) as server,
    ):
        answers = [server.post(body | {"exact": exact}).json()["choices"][0] for exact in (False, True)]
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    for answer in answers:
        told, sequence = answer["logprobs"], ids
        assert len(told["token_logprobs"]) == 6
        for value, best in zip(told["token_logprobs"], told["top_logprobs"], strict=True):
            with torch.no_grad():
                expected = dense(sequence).logits[0, -1].log_softmax(-1)
            allowed = expected.clone()
            allowed[PENALTIES["suppress_tokens"]] = -torch.inf  # bans are the checkpoint's; penalties are nobody's
            token = int(allowed.argmax())
            assert value == pytest.approx(float(expected[token]), abs=1e-4)
            assert max(best.values()) == pytest.approx(float(expected.max()), abs=1e-4)
            sequence = torch.cat([sequence, torch.tensor([[token]])], dim=1)


@pytest.mark.filterwarnings("ignore:the checkpoint's generation settings")
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 3.0}], ids=["none", "the checkpoint's"])
def test_a_penalty_that_a_request_asks_for(serve_one, chatty: Path, tmp_path: Path, settings: dict[str, float]):
    directory = Path(shutil.copytree(chatty, tmp_path / "copy"))
    file = directory / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    tokenizer, dense = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    texts = []
    for penalty in (1.0, 1.3):
        made = dense.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, repetition_penalty=penalty)
        texts.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    assert texts[0] != texts[1]
    body = {"model": "tiny", "prompt": TEXT, "max_tokens": 12, "temperature": 0}
    with serve_one(directory, {"density": 1.0, "quantize": "none"}) as server:
        for more, text in (({}, texts[0]), ({"repetition_penalty": 1.3}, texts[1])):
            assert server.post(body | more).json()["choices"][0]["text"] == text


@pytest.mark.slow
def test_stop_strings_and_ends_of_a_checkpoint(serve_one, tmp_path: Path):
    """They are cut off like a client's, and the answer is complete."""
    tokenizer = byte_tokenizer(["<|im_end|>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    ids = tokenizer("b one.TWO<|im_end|>xyz")["input_ids"]
    directory = write_scripted(tmp_path, tokenizer, [*ids, EOS])
    ask = {"model": "tiny", "max_tokens": 30, "temperature": 0}
    for strings, text in ((None, " one.TWOxyz"), (["WO", "never"], " one.T"), (["<|im_end|>"], " one.TWO")):
        settings = {"eos_token_id": EOS, "stop_strings": strings}
        (directory / "generation_config.json").write_text(json.dumps(settings))
        with serve_one(directory) as server:
            completion = server.post(ask | {"prompt": "b"}).json()["choices"][0]
            messages = [{"role": "developer", "content": ""}, {"role": "user", "content": "b"}]
            chat = server.post(ask | {"messages": messages}, "/v1/chat/completions").json()["choices"][0]
        assert (completion["text"], completion["finish_reason"]) == (text, "stop")
        assert (chat["message"]["content"], chat["finish_reason"]) == (text, "stop")


@pytest.mark.parametrize("exact", [False, True])
def test_tokens_of_the_answer_are_counted_for_openais_penalties(tiny, model, exact: bool):
    """Against the formula, by hand: what was said loses `presence` once and `frequency` each time; the prompt does not
    count. Drafts of exact mode are counted for their own places."""
    penalties = {"presence_penalty": 0.4, "frequency_penalty": 0.7}
    body = {"model": "tiny", "prompt": TEXT, "max_tokens": 14, "temperature": 0, "exact": exact}
    found = tiny.post(body | penalties | {"logprobs": 0}).json()["choices"][0]
    assert found["text"] != tiny.post(body).json()["choices"][0]["text"]
    ids = model.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "exact": exact}
    answer = model.generate(ids, **settings, logits_processor=LogitsProcessorList([_ByHand(ids.shape[1])]))
    assert found["text"] == model.tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)


class _ByHand(LogitsProcessor):
    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        found = scores.clone()
        for token, count in collections.Counter(input_ids[0, self._prompt_tokens :].tolist()).items():
            found[0, token] -= 0.4 + 0.7 * count
        return found
