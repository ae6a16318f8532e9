"""A GriffinModel where a transformers model is expected: pipelines, assistants, helpers that read and call it."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import by_turns
from tiny_models import VOCAB
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

from griffin_offload import GriffinModel, UsageError
from griffin_offload.engine.model_interface import DELEGATED
from griffin_offload.errors import ModelNotFound


@pytest.fixture(scope="module")
def model(checkpoints) -> GriffinModel:
    return _load(checkpoints("llama3"), batch_size=4)


def _load(path: Any, **options: Any) -> GriffinModel:
    settings = {"device": "cpu", "max_gpu_mem": "100MB", "density": 0.5, "ctx_size": 128, "quantize": "none"}
    return GriffinModel.from_pretrained(path, **(settings | options))


def _ids(seed: int = 0, tokens: int = 24) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu"), -1])
def test_a_pipeline_takes_it_for_what_it_is(model: GriffinModel, device: Any, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    pipe = pipeline("text-generation", model=model, tokenizer=model.tokenizer, device=device)
    stock = pipeline("text-generation", model=model.model, tokenizer=model.tokenizer)
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    assert pipe("the cat sat on the mat", **options) == stock("the cat sat on the mat", **options)
    assert "not supported" not in caplog.text
    assert model.last_report.decode_streamed_bytes == 0
    assert "LlamaForCausalLM" in repr(pipe)


def test_a_pipeline_takes_batches_beams_and_an_assistant(checkpoints, model: GriffinModel):
    tokenizer = model.tokenizer
    tokenizer.padding_side = "left"
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["the cat sat", "the dog sat on the mat and"]
    assert len(pipe(texts, batch_size=2, max_new_tokens=4, do_sample=False)) == 2
    assert len(pipe(texts[0], num_beams=3, num_return_sequences=2, max_new_tokens=4)) == 2
    drafted = pipeline(
        "text-generation", model=AutoModelForCausalLM.from_pretrained(checkpoints("llama3")), tokenizer=tokenizer,
        assistant_model=model,
    )  # fmt: skip
    plain = pipeline("text-generation", model=drafted.model, tokenizer=tokenizer)
    for text in texts:
        assert drafted(text, max_new_tokens=12, do_sample=False) == plain(text, max_new_tokens=12, do_sample=False)


@pytest.mark.parametrize(("name", "density"), by_turns(("llama3", "gemma3", "opt"), (0.5, 1.0), whole=()))
def test_it_assists_with_the_tokens_of_the_other(checkpoints, name: str, density: float):
    """Drafts are the pruned model's, the tokens the assisted model's; it may be asked for as a whole or by `.model`."""
    other, ids = AutoModelForCausalLM.from_pretrained(checkpoints(name)), _ids()
    expected = other.generate(ids, max_new_tokens=12, do_sample=False)
    assistant = _load(checkpoints(name), density=density)
    for drafts in (assistant, assistant.model):
        assert torch.equal(other.generate(ids, assistant_model=drafts, max_new_tokens=12, do_sample=False), expected)
    whole = _load(checkpoints(name), density=1.0)
    assert torch.equal(whole.generate(ids, assistant_model=assistant, max_new_tokens=12, do_sample=False), expected)
    for itself in (assistant, assistant.model):
        with pytest.raises(UsageError, match="cannot assist itself: exact=True"):
            assistant.generate(ids, assistant_model=itself)


def test_it_is_called_like_a_model(model: GriffinModel):
    ids = _ids()
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    assert torch.equal(output.logits, model.model(ids).logits)
    assert torch.equal(model.forward(ids).logits, output.logits)
    hidden = model(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == model.config.num_hidden_layers + 1


def test_it_answers_what_programs_ask_of_a_model(model: GriffinModel):
    assert model.eval() is model.train(False) is model.requires_grad_(False) is model.to(model.device) is model
    assert (model.dtype, model.device, model.config.model_type) == (torch.float32, torch.device("cpu"), "llama")
    assert model.can_generate()
    assert not model.training
    assert model.get_input_embeddings() is model.model.get_input_embeddings()
    assert next(model.parameters()).device == model.device
    assert dict(model.named_parameters()).keys() == dict(model.model.named_parameters()).keys()
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert "GriffinModel(LlamaForCausalLM" in repr(model)
    assert isinstance(model, GriffinModel)
    for name in DELEGATED:
        if hasattr(model.model, name) and name not in ("state_dict",):
            assert getattr(model, name) == getattr(model.model, name)


def test_its_defaults_can_be_changed(checkpoints):
    model = _load(checkpoints("llama3"))
    model.generation_config.max_new_tokens = 3
    assert model.generate(_ids()).shape[1] == 27
    model.generation_config = GenerationConfig(max_new_tokens=2, pad_token_id=0)
    assert model.model.generation_config.max_new_tokens == 2
    assert model.generate(_ids()).shape[1] == 26


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (lambda m: m.train(), "train it in transformers"),
        (lambda m: m.requires_grad_(), "train it in transformers"),
        (lambda m: m.half(), "dtype="),
        (lambda m: m.to("meta"), "device="),
        (lambda m: m.to("xpu:3"), "device="),
        (lambda m: m.model.to("xla"), "device="),
        (lambda m: setattr(m, "generation_config", None), "give a transformers.GenerationConfig"),
        (lambda m: torch.jit.trace(m.model, _ids(), strict=False), "cannot be traced"),
        (lambda m: torch.export.export(m.model, (_ids(),)), "cannot be traced or exported"),
        (lambda m: list(torch.nn.Module.named_children(m)), r"use \.model\._modules"),
        (lambda m: m.nothing, "a GriffinModel has no attribute 'nothing'"),
        (lambda m: GriffinModel.from_pretrained(), "the name is empty: give a checkpoint"),
        (lambda m: m.model.train(), "train it in transformers"),
        (lambda m: m.model.resize_token_embeddings(400), "save it, and load that"),
        (lambda m: m.model.set_input_embeddings(torch.nn.Embedding(9, 32)), "save it, and load that"),
        (lambda m: m.model.set_output_embeddings(torch.nn.Linear(32, 9)), "save it, and load that"),
        (lambda m: m.model.set_attn_implementation("eager"), "leave it out"),
        (lambda m: m.model.load_adapter("adapter"), "adapter=DIR"),
        (lambda m: m.model.add_adapter(None), "adapter=DIR"),
        (lambda m: m.resize_token_embeddings, r"\.model\.resize_token_embeddings"),
        (lambda m: m.generate("Once upon a time"), "batch, tokens"),
        (lambda m: m.generate(["Once", "upon"]), "batch, tokens"),
        (lambda m: m.generate(_ids()[0]), "batch, tokens"),
        (lambda m: m.generate(_ids().tolist()), "batch, tokens"),
        (lambda m: m.generate(_ids().numpy()), "batch, tokens"),
        (lambda m: m.generate(m.tokenizer("the cat", return_tensors="pt")), r"generate\(\*\*tokens\)"),
        (lambda m: m.generate(_ids().float()), "whole numbers"),
        (lambda m: m.generate(_ids().short()), r"ids\.long\(\)"),
        (lambda m: m(_ids().bool()), r"ids\.long\(\)"),
        (lambda m: m(), "prompt is empty"),
        (lambda m: m(_ids()[:, :0]), "prompt is empty"),
        (lambda m: m.model(_ids()[0]), r"ids\[None\]"),
        (lambda m: m(_ids() + m.vocab_size), "the vocabulary ends"),
        (lambda m: m(m.model(_ids()).logits[:, -1:].argmax(-1) - m.vocab_size), "the vocabulary ends"),
        (lambda m: m.generate(_ids()[:0]), "prompt is empty"),
        (lambda m: m.generate(_ids()[None]), "batch, tokens"),
        (lambda m: m.generate(_ids(), attention_mask=_ids()[None]), "batch, tokens"),
        (lambda m: m.generate(_ids(), exact=True, custom_generate=lambda model, ids, **_: ids), "custom_generate"),
        (lambda m: next(m.generate_many([_ids()], num_beams=0)), "at least 1"),
    ],
)
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning", "ignore:.is_gradient_check:FutureWarning")
def test_what_cannot_be_is_refused_with_what_can(model: GriffinModel, asked: Any, answer: str):
    with pytest.raises((UsageError, AttributeError, ModelNotFound), match=answer):
        asked(model)


def test_the_model_by_the_name_that_transformers_has_for_it(checkpoints):
    with GriffinModel.from_pretrained(pretrained_model_name_or_path=checkpoints("llama3"), device="cpu") as model:
        assert model.config.model_type == "llama"


@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["gate_proj", "down_proj"]], ids="-".join)
def test_an_adapter_that_peft_puts_on_it(checkpoints, tmp_path: Path, density: float, targets: list[str]):
    """As if it was merged while weights passed; or refused, where it would be of neurons that come and go."""
    peft, directory = pytest.importorskip("peft"), checkpoints("llama3")
    settings = {"target_modules": targets, "task_type": "CAUSAL_LM", "init_lora_weights": False, "r": 2}
    with _load(directory, density=density) as model:
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model.model, peft.LoraConfig(**settings)).eval()
        if density < 1 and "down_proj" in targets:
            with pytest.raises(UsageError, match=r"in the place of gate_proj.*adapter=DIR"):
                adapted(input_ids=_ids())
            return
        found = adapted(input_ids=_ids()).logits
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_pretrained(directory)
    peft.get_peft_model(stock, peft.LoraConfig(**settings)).save_pretrained(tmp_path)
    with _load(directory, density=density, adapter=tmp_path) as merged:
        torch.testing.assert_close(found, merged(_ids()).logits, rtol=1e-3, atol=1e-4)


def test_it_says_where_it_is_from(checkpoints):
    model, stock = _load(checkpoints("llama3")), AutoModelForCausalLM.from_pretrained(checkpoints("llama3"))
    assert model.name_or_path == model.model.name_or_path == stock.name_or_path
    assert model.config.name_or_path == stock.config.name_or_path


def test_what_nobody_knows_is_an_attribute_error(model: GriffinModel):
    with pytest.raises(AttributeError, match="no attribute 'no_such_thing'"):
        _ = model.no_such_thing
    assert not hasattr(model, "hf_device_map")
