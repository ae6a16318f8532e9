"""generate with the KV cache of an earlier call: the tokens of transformers, and at lower densities those by hand."""

from typing import Any

import pytest
import torch
from tiny_models import VOCAB
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from griffin_offload import GriffinModel, UsageError
from griffin_offload.transformers_api import CACHE


def _load(path: Any, **options: Any) -> GriffinModel:
    settings = {"device": "cpu", "max_gpu_mem": "100MB", "density": 1.0, "ctx_size": 128, "quantize": "none"}
    return GriffinModel.from_pretrained(path, **(settings | options))


def _ids(seed: int = 0, tokens: int = 20, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def _generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    mask = {"attention_mask": torch.ones_like(ids)}
    return model.generate(ids, **(mask | {"max_new_tokens": 5, "do_sample": False} | options))


def _in_turns(model: Any, *, alone: bool = False, turns: int = 3, **options: Any) -> list[torch.Tensor]:
    """What is generated in each turn; `alone`: of later turns only the new tokens are given."""
    output = _generate(model, _ids(), return_dict_in_generate=True, **options)
    found = [output.sequences]
    for turn in range(1, turns):
        new = torch.cat([found[-1][:, -1:], _ids(turn, 4 * turn)], 1)
        whole = torch.cat([found[-1][:, :-1], new], 1)
        given = new if alone else whole
        cache = output[CACHE]
        assert cache.get_seq_length() == whole.shape[1] - new.shape[1]
        output = _generate(
            model, given, attention_mask=torch.ones_like(whole), return_dict_in_generate=True, **{CACHE: cache}
        )
        found.append(torch.cat([whole, output.sequences[:, given.shape[1] :]], 1))
    return found


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma3", "gpt2", "opt", "bloom", "falcon_new", "phi3"])
def test_turns_are_those_of_transformers(checkpoints, name: str):
    path = checkpoints(name)
    expected = _in_turns(AutoModelForCausalLM.from_pretrained(path))
    model = _load(path)
    assert all(map(torch.equal, _in_turns(model), expected))
    report = model.last_report
    assert (report.cached_prompt_tokens, report.prompt_tokens, report.generated_tokens) == (33, 9, 5)


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_new_tokens_alone_are_enough_with_a_mask_over_all(checkpoints, name: str):
    path = checkpoints(name)
    expected = _in_turns(AutoModelForCausalLM.from_pretrained(path), alone=True)
    assert all(map(torch.equal, _in_turns(_load(path), alone=True), expected))


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_caches_of_the_caller_go_on_too(checkpoints, kind: Any):
    path = checkpoints("llama3")
    found = []
    for model in (AutoModelForCausalLM.from_pretrained(path), _load(path)):
        more = {"max_cache_len": 120} if kind is StaticCache else {}
        found.append(_in_turns(model, **{CACHE: kind(config=model.config, **more)}))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("kv_bits", [16, 8, 4])
def test_a_pruned_model_goes_on_with_what_was_chosen(checkpoints, kv_bits: int):
    """As by hand with the stock model, also when another prompt has chosen since; nothing is streamed but its rows."""
    model = _load(checkpoints("llama3"), density=0.5, kv_bits=kv_bits)
    first = _generate(model, _ids(), return_dict_in_generate=True)
    selected, kept = model.selected, model.last_report.activation_kept
    longer = torch.cat([first.sequences, _ids(1, 4)], 1)
    expected = _generate(model, longer, past_key_values=first.past_key_values)
    assert model.last_report.prefill_streamed_bytes == 0
    assert model.last_report.activation_kept == kept
    again = _generate(model, _ids(), return_dict_in_generate=True)
    _generate(model, _ids(2))
    assert any(not torch.equal(model.selected[i], selected[i]) for i in selected)
    assert torch.equal(_generate(model, longer, past_key_values=again.past_key_values), expected)
    assert model.last_report.prefill_streamed_bytes > 0
    assert all(torch.equal(model.selected[i], selected[i]) for i in selected)
    assert model.last_report.decode_streamed_bytes == 0


def test_batches_and_beams_go_on(checkpoints):
    path, ids = checkpoints("llama3"), _ids(batch=2)
    found = []
    for model in (AutoModelForCausalLM.from_pretrained(path), _load(path, batch_size=4)):
        first = _generate(model, ids, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, _ids(3, 4, batch=2)], 1)
        found.append(_generate(model, longer, **{CACHE: first[CACHE]}))
    assert torch.equal(*found)
    first = _generate(model, ids, return_dict_in_generate=True)
    with pytest.raises(UsageError, match="holds 2 sequences and 4"):
        _generate(model, torch.cat([first.sequences, ids], 1), past_key_values=first.past_key_values, num_beams=2)


def test_a_past_is_within_the_context(checkpoints):
    model = _load(checkpoints("llama3"), ctx_size=48)
    first = _generate(model, _ids(), return_dict_in_generate=True)
    new = _ids(1, 10)
    mask = torch.ones(1, 34, dtype=torch.long)
    with pytest.raises(UsageError, match="a prompt of 34 tokens and 20 new ones are 54, the context is 48"):
        _generate(model, new, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=20)
    output = model.generate(new, attention_mask=mask, past_key_values=first.past_key_values, do_sample=False)
    assert output.shape[1] == 10 + 48 - 34


@pytest.mark.parametrize(
    ("given", "masked"),
    [(10, 10), (24, 24), (4, 5), (30, 40), (25, 26)],
    ids=["short", "as long", "both", "more", "one"],
)
def test_what_does_not_belong_together_is_refused(checkpoints, given: int, masked: int):
    model = _load(checkpoints("llama3"))
    cache = _generate(model, _ids(), return_dict_in_generate=True).past_key_values
    mask = torch.ones(1, masked, dtype=torch.long)
    with pytest.raises(UsageError, match=f"{CACHE} holds 24 tokens"):
        _generate(model, _ids(0, given), attention_mask=mask, past_key_values=cache)


def test_what_is_no_cache_is_refused_by_name(checkpoints):
    model = _load(checkpoints("llama3"))
    with pytest.raises(UsageError, match=f"{CACHE} is a tuple"):
        _generate(model, _ids(), past_key_values=((torch.zeros(1, 2, 3, 4),) * 2,) * 3)
    if CACHE == "past_key_values":
        with pytest.raises(UsageError, match="the argument is called past_key_values"):
            _generate(model, _ids(), cache=DynamicCache())
    else:
        with pytest.raises(UsageError, match="one argument by two names"):
            _generate(model, _ids(), cache=DynamicCache(), past_key_values=DynamicCache())
