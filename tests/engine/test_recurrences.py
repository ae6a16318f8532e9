"""Models whose layers are recurrences and nothing else (Mamba): nothing is streamed or chosen, and all else is as of
hybrids."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from alive_bytes import AliveBytes
from conversation_reference import check_turns
from quantised_reference import round_layers
from reference import dense_generate
from tiny_models import CHAT_TEMPLATE, HYBRIDS, RECURRENT, STATES_AND_EXPERTS, VOCAB, write_checkpoint, write_tokenizer
from transformers import AutoModelForCausalLM, DynamicCache

from griffin_offload import GriffinError, GriffinModel, UsageError
from griffin_offload.engine.convert import convert
from griffin_offload.engine.export import check
from griffin_offload.engine.generation import state_bytes
from griffin_offload.transformers_api import CACHE

CTX = 72
TOKENS, NEW = 40, 5
each = pytest.mark.parametrize("name", RECURRENT)


def _load(path: Path, **options: object) -> GriffinModel:
    defaults = {"device": "cpu", "max_gpu_mem": "1GB", "ctx_size": CTX, "quantize": "none"}
    return GriffinModel.from_pretrained(path, **defaults | options)


def _prompts(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, T], later samples padded on the left."""
    ids = torch.randint(3, VOCAB, (batch, TOKENS), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    for i in range(batch):
        mask[i, : 7 * i] = 0
    return ids * mask, mask


@pytest.mark.parametrize(("name", "density"), [*((name, "auto") for name in RECURRENT), ("mamba2", 1.0)])
def test_answers_are_those_of_transformers(name: str, density: Any, checkpoints):
    path = checkpoints(name)
    model, dense = _load(path, density=density, batch_size=2, always_stream=True), None
    for batch in (1, 2):
        dense = AutoModelForCausalLM.from_pretrained(path)
        ids, mask = _prompts(batch)
        expected, logits = dense_generate(dense, ids, mask, NEW)
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        output = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **options)
        assert torch.equal(output.sequences, expected)
        assert (torch.stack(output.logits) - logits).norm() / logits.norm() < 1e-5
        assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
        assert model.last_report.activation_kept == 1
    assert model.plan.streamed == ()
    assert model.plan.density == 1
    assert model.resident_bytes == model.plan.resident_bytes


@each
def test_beams_and_caches_of_a_caller(name: str, checkpoints):
    path, ids = checkpoints(name), _prompts(1)[0]
    dense, model = AutoModelForCausalLM.from_pretrained(path), _load(path, batch_size=3)
    greedy = {"max_new_tokens": 8, "do_sample": False}
    beams = model.generate(ids, num_beams=3, **greedy)
    assert torch.equal(beams, dense.generate(ids, attention_mask=torch.ones_like(ids), num_beams=3, **greedy))
    output = model.generate(ids, return_dict_in_generate=True, **greedy)
    longer = torch.cat([output.sequences, ids[:, :5]], dim=1)
    found = model.generate(longer, **{CACHE: output[CACHE]}, **greedy)
    assert torch.equal(found, dense_generate(dense, longer, None, 8)[0])
    with pytest.raises(UsageError, match=f"{CACHE} is a DynamicCache of states alone, which counts no tokens"):
        model.generate(ids, **{CACHE: DynamicCache(config=model.model.config)}, **greedy)
    with pytest.raises(UsageError, match=f"keep a state that cannot be rolled back \\({name}\\)$"):
        model.generate(ids, prompt_lookup_num_tokens=3, **greedy)


@each
def test_forwards_go_on_from_what_the_last_one_returned(name: str, checkpoints):
    """Of the model itself and of any number of tokens, where transformers' own Mamba 1 begins anew."""
    path, ids = checkpoints(name), _prompts(1)[0]
    expected = AutoModelForCausalLM.from_pretrained(path)(ids).logits[0]
    stock = _load(path).model
    cache, found = None, []
    for part in ids.split([20, 1, 9, 10], dim=1):
        output = stock(input_ids=part, **{CACHE: cache}, use_cache=True)
        cache = output[CACHE]
        found.append(output.logits[0])
    assert cache.get_seq_length() == TOKENS
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*RECURRENT, "jamba", *({"recurrent_gemma"} & set(HYBRIDS))])
def test_contexts_go_on_and_back(name: str, checkpoints, tmp_path: Path):
    """Longer prompts, prompts cut back, and one that was saved."""
    path = checkpoints(name)
    options = {} if name in RECURRENT else {"density": 1.0}
    dense, model, ids = AutoModelForCausalLM.from_pretrained(path), _load(path, **options), _prompts(1)[0]
    context = model.new_context()
    for tokens in (30, TOKENS, 20, 30):
        expected, _ = dense_generate(dense, ids[:, :tokens], None, NEW)
        found = model.generate(ids[:, :tokens], context=context, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(found, expected), tokens
    model.generate(ids[:, :30], context=context, max_new_tokens=1, do_sample=False)
    assert context.tokens == ids[0, :30].tolist()
    model.save_context(context, tmp_path / "saved.ctx")
    loaded, _ = model.load_context(tmp_path / "saved.ctx")
    expected, _ = dense_generate(dense, ids, None, NEW)
    assert torch.equal(model.generate(ids, context=loaded, max_new_tokens=NEW, do_sample=False), expected)
    assert model.last_report.cached_prompt_tokens == 30
    assert loaded.tokens == expected[0, :-1].tolist()
    longer = torch.cat([expected, ids[:, :5]], dim=1)
    expected, _ = dense_generate(dense, longer, None, 4)
    assert torch.equal(model.generate(longer, context=loaded, max_new_tokens=4, do_sample=False), expected)
    assert model.last_report.cached_prompt_tokens == longer.shape[1] - 6
    assert model.last_report.peak_device_bytes <= model.plan.peak_bytes


@each
def test_a_turn_reads_its_own_tokens_alone(name: str, checkpoints, tmp_path: Path):
    path = checkpoints(name)
    write_tokenizer(path, CHAT_TEMPLATE)
    model = _load(path, ctx_size=256, keep_prompts=True)
    check_turns(model, tmp_path / "conversation.ctx")


def test_attention_beside_mamba_needs_no_feed_forward_either(tmp_path: Path):
    hybrid = HYBRIDS["nemotron_h"]
    settings = hybrid.settings | {"layers_block_type": ["linear_attention", "full_attention"] * 2}
    dataclasses.replace(hybrid, settings=settings).build().save_pretrained(tmp_path)
    dense, model, ids = AutoModelForCausalLM.from_pretrained(tmp_path), _load(tmp_path), _prompts(1)[0]
    context = model.new_context()
    for tokens in (30, TOKENS, 20):
        expected, _ = dense_generate(dense, ids[:, :tokens], None, NEW)
        found = model.generate(ids[:, :tokens], context=context, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(found, expected), tokens
    assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
    assert model.plan.density == 1


@pytest.mark.parametrize(
    ("name", "precision"),
    [("mamba", "int8"), ("mamba", "int4"), ("falcon_mamba", "int4"), ("mamba2", "int8"), ("jamba", "int4")],
)
def test_projections_rest_in_their_format(name: str, precision: str, tmp_path: Path):
    """Against dense transformers with rounded matrices; and a converted copy."""
    path = write_checkpoint(name, tmp_path / "plain")
    convert(path, tmp_path / "copy", precision)
    ids, mask = _prompts(1)
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = []
    for source in (path, tmp_path / "copy"):
        model = _load(source, quantize=precision, density=1.0)
        output = model.generate(ids, **options)
        assert model.resident_bytes == model.plan.resident_bytes
        assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
        found.append((output.sequences, torch.stack(output.logits)))
    if name in STATES_AND_EXPERTS:
        return
    dense = AutoModelForCausalLM.from_pretrained(path)
    round_layers(dense, "none", 0, precision, feed_forward=False)
    expected, logits = dense_generate(dense, ids, mask, NEW)
    assert torch.equal(found[0][0], expected)
    assert (found[0][1] - logits).norm() / logits.norm() < 2e-3
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-4)


@each
def test_the_plan_counts_states_and_scans(name: str, checkpoints):
    path, tokens = checkpoints(name), 256
    dense = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad(), AliveBytes() as alive:
        filled = dense(torch.full((1, tokens), 5), use_cache=True, logits_to_keep=1)
    filled = filled["cache_params" if "cache_params" in filled else CACHE]
    plan = _load(path, ctx_size=tokens, prompt_tokens=tokens).plan
    assert plan.parts["states"] == state_bytes(filled) > 0
    assert plan.parts["kv_cache"] == 0
    assert alive.peak <= sum(plan.prefill_parts[part] for part in ("workspace", "kv_cache", "states", "logits"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density": 0.5}, "mamba has no feed-forward: there are no neurons to leave out, and no density below 1"),
        ({"density": [1.0, 0.5, 1.0]}, "no neurons to leave out, and no density below 1"),
        ({"exact": True}, "no neurons to draft with: leave exact mode out, every answer is the full model's"),
        ({"quantize": "tiers"}, "tiers are of FF neurons, and mamba has none: take int4"),
        ({"kv_bits": 8}, "kv_bits=8 needs layers of mamba that keep keys and values"),
        ({"max_gpu_mem": "1kB"}, "needs"),
    ],
    ids=str,
)
def test_what_chooses_neurons_is_refused(options: dict[str, Any], words: str, checkpoints):
    with pytest.raises(GriffinError, match=words):
        _load(checkpoints("mamba"), **{"quantize": "auto"} | options)


def test_nothing_smaller_can_be_exported(checkpoints, tmp_path: Path):
    with pytest.raises(GriffinError, match="mamba has no feed-forward: there are no neurons to leave out"):
        check(checkpoints("mamba"), tmp_path / "out", 0.5)
