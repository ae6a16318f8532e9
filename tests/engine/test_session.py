"""Conversations: what `ChatSession` feeds the model, keeps, takes back and says. (Pruned ones, against a masked
reference: test_context.py.)"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CHAT_TEMPLATE, write_checkpoint, write_tokenizer
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinModel, UsageError
from griffin_offload.errors import SavedContextError

QUESTIONS = ["the cat sat", "and the dog?", "where is the river", "of boats", "nothing was left"]
CTX = 480


@pytest.fixture(scope="module")
def chatty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A checkpoint with a chat template."""
    name, directory = getattr(request, "param", "llama3"), tmp_path_factory.mktemp("chatty")
    write_checkpoint(name, directory)
    write_tokenizer(directory, CHAT_TEMPLATE)
    return name, directory


with_windows = pytest.mark.parametrize("chatty", ["gemma2"], indirect=True)


def _load(path: Path, **options: object) -> GriffinModel:
    defaults = {"device": "cpu", "max_gpu_mem": "1GB", "density": 0.5, "ctx_size": CTX, "keep_prompts": True}
    return GriffinModel.from_pretrained(path, **{"always_stream": True, **defaults, **options})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GriffinModel]:
    """Of llama3, half of its neurons: conversations are their own, whoever held one before."""
    directory = write_checkpoint("llama3", tmp_path_factory.mktemp("shared"))
    write_tokenizer(directory, CHAT_TEMPLATE)
    with _load(directory) as loaded:
        yield loaded


def _rendered(model: GriffinModel, messages: list[dict[str, str]]) -> torch.Tensor:
    return model.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


@pytest.mark.parametrize(
    ("chatty", "exact"), [("llama3", False), ("gemma2", False), ("gemma2", True)], indirect=["chatty"]
)
def test_five_turns_at_density_one_equal_the_dense_model(chatty: tuple[str, Path], exact: bool):
    """On the whole conversation as the template renders it; in exact mode at density .5, too."""
    _, path = chatty
    dense = AutoModelForCausalLM.from_pretrained(path)
    model = _load(path, density=0.5 if exact else 1.0, exact=exact)
    chat = model.chat_session(system="be brief", max_new_tokens=7, do_sample=False)
    messages = [{"role": "system", "content": "be brief"}]
    # A conversation ends an answer where the tokenizer says so, too.
    ends = [dense.generation_config.eos_token_id, model.tokenizer.eos_token_id]
    options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": [end for end in ends if end is not None]}
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        ids = _rendered(model, messages)
        answer = dense.generate(ids, attention_mask=torch.ones_like(ids), **options)
        reply = chat.send(question)
        assert reply.text == model.tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": reply.text})
    assert chat.messages == messages
    assert chat.turns == len(QUESTIONS)


@with_windows
def test_undo_and_reset(chatty: tuple[str, Path]):
    model = _load(chatty[1])
    chat = model.chat_session(max_new_tokens=6, do_sample=False)
    assert not chat.undo()
    first = chat.send(QUESTIONS[0])
    after_first = list(chat.messages)
    second = chat.send(QUESTIONS[1])
    assert chat.undo()
    assert chat.messages == after_first
    assert chat.send(QUESTIONS[1]).text == second.text
    chat.reset()
    assert (chat.messages, chat.turns, chat.context.tokens) == ([], 0, [])
    assert chat.send(QUESTIONS[0]).text == first.text


@with_windows
def test_a_full_context_is_an_error_or_drops_the_oldest_turns(chatty: tuple[str, Path]):
    model = _load(chatty[1], ctx_size=96)
    chat = model.chat_session(system="be brief", max_new_tokens=8, do_sample=False)
    while len(chat.prompt_ids([*chat.messages, {"role": "user", "content": QUESTIONS[4]}])[0]) < 96:
        reply = chat.send(QUESTIONS[4])
        assert (reply.most_tokens, reply.shortened) == (8, False) or (reply.most_tokens < 8 and reply.shortened)
    before = list(chat.messages)
    with pytest.raises(UsageError, match=r"the conversation is \d+ tokens, the context is 96 and has to hold"):
        chat.send(QUESTIONS[4])
    assert chat.messages == before
    chat.overflow = "drop"
    reply = chat.send(QUESTIONS[4])
    assert reply.dropped_messages >= 2
    assert reply.dropped_messages % 2 == 0
    assert chat.messages[0] == {"role": "system", "content": "be brief"}
    assert len(chat.messages) == len(before) + 2 - reply.dropped_messages
    with pytest.raises(UsageError, match="the message is"):
        chat.send("river " * 200)


def test_an_interrupted_answer_stays_as_far_as_it_came(model: GriffinModel):
    asked: list[int] = []
    chat = model.chat_session(max_new_tokens=20, do_sample=False)
    reply = chat.send(QUESTIONS[0], interrupted=lambda: bool(asked.append(1)) or len(asked) == 5)
    assert (reply.finish, reply.report.generated_tokens) == ("interrupted", 5)
    assert chat.messages[-1]["content"] == reply.text
    assert chat.send(QUESTIONS[1]).finish == "length"


def test_an_error_leaves_the_conversation_as_it_was(model: GriffinModel):
    chat = model.chat_session(max_new_tokens=6, do_sample=False)
    chat.send(QUESTIONS[0])
    messages, tokens = list(chat.messages), list(chat.context.tokens)
    for bad in ("", "  \n"):
        with pytest.raises(UsageError, match="empty"):
            chat.send(bad)
    model.progress = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        chat.send(QUESTIONS[1])
    model.progress = None
    assert chat.messages == messages
    assert chat.context.tokens == tokens[: len(chat.context.tokens)]


def test_a_system_message_needs_a_template(checkpoints):
    with pytest.raises(UsageError, match="chat template"):
        _load(checkpoints("llama2")).chat_session(system="be brief")


@pytest.mark.parametrize("raw", [False, True])
def test_without_a_template_texts_are_continued(checkpoints, chatty: tuple[str, Path], raw: bool):
    """At density 1 as the dense model continues all texts, a space between two of them."""
    path = chatty[1] if raw else checkpoints("llama3")
    dense, model = AutoModelForCausalLM.from_pretrained(path), _load(path, density=1.0)
    chat = model.chat_session(raw=raw, max_new_tokens=7, do_sample=False)
    assert not chat.templated
    text = ""
    for question in ["the cat sat", " and the dog?", "of boats\n", "nothing"]:
        apart = not text or text[-1].isspace() or question[0].isspace()
        text += question if apart else f" {question}"
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
        answer = dense.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False)
        reply = chat.send(question)
        assert reply.text == model.tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
        apart = not reply.text or text[-1].isspace() or reply.text[0].isspace()
        text += reply.text if apart else f" {reply.text}"


@pytest.mark.parametrize("place", ["model", "session", "send"])
def test_how_an_answer_ends_is_said(chatty: tuple[str, Path], place: str):
    """At an end of sequence also when that is the last token there was room for."""
    model = _load(chatty[1])
    free = model.chat_session(max_new_tokens=8, do_sample=False)
    free.send(QUESTIONS[0])
    prompt_tokens = _rendered(model, [{"role": "user", "content": QUESTIONS[0]}]).shape[1]
    answer = free.context.tokens[prompt_tokens:]
    end = next(i for i in range(2, len(answer)) if answer[i] not in answer[:i])
    eos = {"eos_token_id": [answer[end], 2]}
    if place == "model":
        model.model.generation_config.eos_token_id = [answer[end], 2]
    for room, finish, tokens in ((end, "length", end), (end + 1, "stop", end + 1), (end + 3, "stop", end + 1)):
        chat = model.chat_session(do_sample=False, max_new_tokens=room, **(eos if place == "session" else {}))
        reply = chat.send(QUESTIONS[0], **(eos if place == "send" else {}))
        assert (reply.finish, reply.report.generated_tokens) == (finish, tokens)


def test_an_empty_conversation_is_not_saved(model: GriffinModel, tmp_path: Path):
    chat = model.chat_session(max_new_tokens=4, do_sample=False)
    with pytest.raises(UsageError, match="the conversation is empty"):
        chat.save(tmp_path / "a.ctx")
    chat.send(QUESTIONS[0])
    chat.context.clear()
    with pytest.raises(UsageError, match="the last turn was interrupted"):
        chat.save(tmp_path / "a.ctx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("notes", "words"),
    [
        ({}, "saved prompt and no conversation"),
        ({"messages": [], "templated": 1}, "saved prompt and no conversation"),
        ({"messages": "hello", "templated": True}, "saved prompt and no conversation"),
        ({"messages": ["hello"], "templated": True}, "damaged: its messages"),
        ({"messages": [{"role": "user"}], "templated": True}, "damaged: its messages"),
        ({"messages": [{"role": "user", "content": 1}], "templated": True}, "damaged: its messages"),
    ],
    ids=str,
)
def test_what_is_no_conversation_changes_nothing(model: GriffinModel, tmp_path: Path, notes: Any, words: str):
    chat = model.chat_session(max_new_tokens=4, do_sample=False)
    chat.send(QUESTIONS[0])
    model.save_context(chat.context, tmp_path / "a.ctx", notes)
    messages, tokens = list(chat.messages), list(chat.context.tokens)
    with pytest.raises(SavedContextError, match=words):
        chat.load(tmp_path / "a.ctx")
    assert (chat.messages, chat.context.tokens) == (messages, tokens)


def test_a_loaded_conversation_has_its_own_beginning(model: GriffinModel, tmp_path: Path):
    """System message and template are those it was held with, also after a reset."""
    first = model.chat_session(system="be brief", max_new_tokens=4, do_sample=False)
    first.send(QUESTIONS[0])
    first.save(tmp_path / "a.ctx")
    second = model.chat_session(raw=True, max_new_tokens=4, do_sample=False)
    second.send(QUESTIONS[2])
    second.load(tmp_path / "a.ctx")
    assert (second.messages, second.templated) == (first.messages, True)
    assert second.send(QUESTIONS[1]).text == first.send(QUESTIONS[1]).text
    second.reset()
    assert second.messages == [{"role": "system", "content": "be brief"}]


_GREEDY, _SAMPLED = {"do_sample": False}, {"do_sample": True, "seed": 5}
_CONTINUE = """
import json, sys
from griffin_offload import GriffinModel
path, saved, question, options, generation = sys.argv[1], sys.argv[2], sys.argv[3], *map(json.loads, sys.argv[4:])
model = GriffinModel.from_pretrained(path, **options)
chat = model.chat_session(**generation)
before = model.engine.loaded.layers.fetched_bytes
chat.load(saved)
loaded = model.engine.loaded.layers.fetched_bytes - before
reply = chat.send(question)
print(json.dumps([loaded, reply.report.prefill_streamed_bytes, reply.report.prompt_tokens, reply.text, chat.messages]))
"""


@pytest.mark.parametrize(
    ("chatty", "kv_bits", "generation"),
    [
        pytest.param("llama3", 16, _SAMPLED, id="llama3-16-sampled"),
        pytest.param("gemma2", 8, _GREEDY, id="gemma2-8-greedy", marks=pytest.mark.slow),
        pytest.param("llama3", 4, _GREEDY, id="llama3-4-greedy", marks=pytest.mark.slow),
    ],
    indirect=["chatty"],
)
def test_a_new_process_goes_on_as_this_one(forks, chatty, tmp_path: Path, generation: Any, kv_bits: int):
    _, path = chatty
    options = {"device": "cpu", "max_gpu_mem": "1GB", "density": 0.5, "ctx_size": CTX, "always_stream": True}
    options |= {"keep_prompts": True, "kv_bits": kv_bits, "quantize": "none", "threads": 1}
    generation = {"max_new_tokens": 8, **generation}
    model = GriffinModel.from_pretrained(path, **options)
    chat = model.chat_session(**generation)
    for question in QUESTIONS[:2]:
        chat.send(question)
    chat.save(tmp_path / "chat.ctx")
    arguments = [str(path), str(tmp_path / "chat.ctx"), QUESTIONS[3], json.dumps(options), json.dumps(generation)]
    done = forks.run("-c", _CONTINUE, *arguments)
    assert done.returncode == 0, done.err
    loaded, streamed, prompt_tokens, text, messages = json.loads(done.out)
    reply = chat.send(QUESTIONS[3])
    assert text == reply.text
    assert messages == chat.messages
    assert prompt_tokens == reply.report.prompt_tokens
    assert (loaded, streamed) == (0, model.plan.streamed_bytes)  # no weight to load, every layer once to go on
