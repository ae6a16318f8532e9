"""States of convolutions and recurrences: what goes back to earlier tokens, and what goes on from them."""

import gc
from pathlib import Path

import pytest
import torch
from conversation_reference import MaskedConversation
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded_model import answer, load
from loaded_model import ids as prompt_of
from marks import every_pair, mostly_slow
from tiny_models import HYBRIDS, VOCAB
from transformers import AutoModelForCausalLM, DynamicCache

from griffin_offload import GriffinModel, UsageError
from griffin_offload.engine.generation import state_bytes
from griffin_offload.errors import GriffinError, SavedContextError
from griffin_offload.kv_cache.kv_cache import KVCache
from griffin_offload.serving.model_manager import PrefixCache
from griffin_offload.transformers_api import CACHE

CTX = 96
QUICK = ["lfm2", "qwen3_5", "falcon_h1"]
# And what has layers without attention and FF, or states that are in no cache: the others' kinds are among these.
KINDS = [*QUICK, "nemotron_h", *(name for name in HYBRIDS if name == "recurrent_gemma")]


def _load(path: Path, **options: object) -> GriffinModel:
    return load(path, **{"ctx_size": CTX, "always_stream": True} | options)


def _dense(model: object, ids: torch.Tensor, new_tokens: int = 8) -> torch.Tensor:
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    # What RecurrentGemma keeps in its modules is that of the answer before, for a prompt of one token.
    cached = model.config.model_type != "recurrent_gemma"
    return model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=cached, **options)


@pytest.fixture(scope="module")
def whole(checkpoints) -> dict[str, tuple[object, GriffinModel]]:
    """Dense and, of all neurons, ours: with every neuron the drafts are the answer, so exact mode is half of them."""
    return {
        name: (AutoModelForCausalLM.from_pretrained(checkpoints(name)), _load(checkpoints(name), density=1.0))
        for name in KINDS
    }


@pytest.fixture(scope="module")
def half(checkpoints) -> dict[str, GriffinModel]:
    return {name: _load(checkpoints(name)) for name in KINDS}


@pytest.mark.slow
@settings(max_examples=10)
@given(
    name=st.sampled_from(KINDS),
    turns=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 20), st.integers(1, 6)), min_size=1, max_size=5),
    drafts=st.integers(1, 8),
    exact=st.booleans(),
)
def test_any_prompt_after_any_other_equals_dense(whole, half, name, turns, drafts, exact):
    """Each turn keeps some share of the sequence so far, in its prompt or in its answer, and goes on otherwise."""
    dense, model = whole[name]
    model = half[name] if exact else model
    context, sequence = model.new_context(), prompt_of(0, 1)
    options = {"exact": True, "draft_tokens": drafts} if exact else {}
    for number, (share, tokens, new_tokens) in enumerate(turns):
        kept = min(int(share * sequence.shape[1]), CTX - tokens - new_tokens)
        ids = torch.cat([sequence[:, :kept], prompt_of(number, tokens)], dim=1)
        sequence = answer(model, ids, new_tokens, context=context, **options)
        assert torch.equal(sequence, _dense(dense, ids, new_tokens))
        assert model.last_report.peak_device_bytes <= model.plan.peak_bytes


# transformers' own RecurrentGemma begins its convolutions anew with a turn: engine/test_recurrences.py has another
# reference.
@pytest.mark.parametrize("name", mostly_slow((name for name in HYBRIDS if name != "recurrent_gemma"), 3))
def test_turns_equal_a_masked_reference(checkpoints, name: str):
    path, architecture = checkpoints(name), HYBRIDS[name]
    dense = AutoModelForCausalLM.from_pretrained(path)
    reference = MaskedConversation(dense, architecture.down, architecture.neurons // 2)
    model, ids = _load(path), prompt_of(1, 20)
    context = model.new_context()
    for turn in range(3):
        expected, known = reference.turn(ids, 8), len(context.tokens)
        assert torch.equal(answer(model, ids, context=context), expected)
        report = model.last_report
        assert (report.cached_prompt_tokens, report.prompt_tokens) == (known, ids.shape[1] - known)
        ids = torch.cat([expected, prompt_of(turn + 2, 6)], dim=1)


@pytest.mark.parametrize("name", QUICK)
def test_a_prompt_that_differs_goes_on_from_the_end_of_an_earlier_one(half, name: str):
    model, context, ids = half[name], half[name].new_context(), prompt_of(0, 30)
    answered = answer(model, ids, context=context)
    for tokens, known in ((3, 30), (-2, 22), (-10, 0)):  # behind the prompt, in front of its end, further back
        other = torch.cat([answered[:, : 30 + tokens], prompt_of(5, 4)], dim=1)
        answer(model, other, context=context)
        assert model.last_report.cached_prompt_tokens == known
        answer(model, ids, context=context)  # and back again
    fetched = model.engine.loaded.layers.fetched_bytes
    assert torch.equal(answer(model, ids, context=context), answered)
    assert model.engine.loaded.layers.fetched_bytes == fetched


@pytest.mark.parametrize("refresh", [2, 5])
def test_passes_between_tokens_read_over_what_residents_left(checkpoints, refresh: int):
    """At density 1 both agree, so that the answer is the dense model's if and only if states went back."""
    dense = AutoModelForCausalLM.from_pretrained(checkpoints("qwen3_5"))
    model = _load(checkpoints("qwen3_5"), density=1.0, refresh=refresh)
    assert torch.equal(answer(model, prompt_of(0, 20), 16), _dense(dense, prompt_of(0, 20), 16))


@pytest.mark.parametrize("name", mostly_slow(KINDS, 2))
def test_a_saved_context_goes_on_as_the_one_that_was_saved(checkpoints, half, tmp_path: Path, name: str):
    model, path = half[name], tmp_path / "saved.ctx"
    context, ids = model.new_context(), prompt_of(0, 30)
    first = answer(model, ids, context=context)
    model.save_context(context, path)
    others = [torch.cat([first[:, :kept], prompt_of(9, 5)], dim=1) for kept in (38, 31, 24)]  # the end, a mark, a seam
    again = _load(checkpoints(name))
    for other, known in zip(others, (37, 30, 22), strict=True):
        expected = answer(model, other, context=model.load_context(path)[0])
        loaded, _ = again.load_context(path)
        assert torch.equal(answer(again, other, context=loaded), expected)
        assert again.last_report.cached_prompt_tokens == known


def test_a_file_whose_states_are_others_is_damaged(half, tmp_path: Path):
    from safetensors.torch import load_file

    from griffin_offload.kv_cache import sequence_file

    model, path = half["qwen3_5"], tmp_path / "saved.ctx"
    context = model.new_context()
    answer(model, prompt_of(0, 20), context=context)
    model.save_context(context, path)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with sequence_file.readable(path) as file:
        metadata = file.metadata()
    for change in ({"states.now.0.conv.0": None}, {"states.now.1.recurrent.0": torch.zeros(1, 2, 3)}):
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        sequence_file.write_tensors(path, changed, {k: v for k, v in metadata.items() if k != "digest"})
        with pytest.raises(SavedContextError, match="its parts contradict each other"):
            model.load_context(path)


@pytest.mark.parametrize(
    ("name", "exact", "where"),
    every_pair({name: name for name in QUICK}, {"pruned": False, "exact": True}, {"pass": "pass", "answer": "answer"}),
)
def test_a_failure_leaves_a_context_that_can_go_on(whole, half, name: str, exact: bool, where: str):
    dense, model = whole[name][0], (half if exact else {n: m for n, (_, m) in whole.items()})[name]
    context, calls = model.new_context(), []
    first = answer(model, prompt_of(0, 24), context=context, exact=exact)
    ids = torch.cat([first, prompt_of(1, 6)], dim=1)

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) > (1 if where == "pass" else 4):
            raise RuntimeError("enough")

    if where == "pass":
        model.progress = fail
    else:
        fail.put, fail.end = fail, fail
    with pytest.raises(RuntimeError, match="enough"):
        answer(model, ids, context=context, exact=exact, **({"streamer": fail} if where == "answer" else {}))
    model.progress = None
    assert torch.equal(answer(model, ids, context=context, exact=exact), _dense(dense, ids))


@pytest.mark.parametrize("name", mostly_slow(KINDS, 2))
def test_batches_and_beams_are_the_dense_models(whole, name: str):
    dense, model = whole[name]
    model.engine.kept_cache.release()
    ids = torch.cat([prompt_of(seed, 20) for seed in (1, 2)])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids * mask, **options), dense.generate(ids * mask, **options))
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    ones, reorders = torch.ones(1, 20, dtype=torch.long), name != "recurrent_gemma"  # its states are in no cache
    expected = dense.generate(prompt_of(1, 20), attention_mask=ones, use_cache=reorders, **options)
    assert torch.equal(model.generate(prompt_of(1, 20), **options), expected)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.05), (4, 0.5)])
def test_keys_and_values_in_fewer_bits_leave_states_alone(checkpoints, bits: int, most: float):
    plain, model = (_load(checkpoints("falcon_h1"), kv_bits=kept) for kept in (16, bits))
    assert model.plan.decode_parts["states"] == plain.plan.decode_parts["states"]
    assert model.plan.decode_parts["kv_cache"] < plain.plan.decode_parts["kv_cache"] / 2
    logits = [
        torch.stack(answer(m, prompt_of(0, 20), output_logits=True, return_dict_in_generate=True).logits)
        for m in (plain, model)
    ]
    assert 0 < (logits[0][:2] - logits[1][:2]).norm() / logits[0][:2].norm() < most


@pytest.mark.parametrize("name", mostly_slow(QUICK, 1))
def test_copies_are_in_the_plan(checkpoints, name: str):
    """Of a conversation all marks, of exact mode the start of a round and what the layers were given."""
    path = checkpoints(name)
    alone, kept = (_load(path, keep_prompts=keeps) for keeps in (False, True))
    states = alone.plan.parts["states"]
    filled = DynamicCache(config=alone.model.config)
    AutoModelForCausalLM.from_pretrained(path)(prompt_of(0, 20), use_cache=True, **{CACHE: filled})
    assert states == state_bytes(filled) > 0
    marks = 4 * states
    neurons, chosen = sum(layer.neurons for layer in kept.engine.shape.layers), sum(kept.plan.kept)
    tables = 5 * 4 * neurons + 4 * 8 * chosen + 4 * 4 * VOCAB
    assert kept.plan.parts["statistic"] == tables + marks
    context = kept.new_context()
    for turn in range(6):
        answer(kept, prompt_of(turn, 12 + turn), context=context)
        assert len(context.marks) <= 4
    assert context.nbytes <= sum(kept.plan.decode_parts[part] for part in ("kv_cache", "states", "statistic"))
    exact = _load(path, exact=True, draft_tokens=5)
    gc.collect()
    layers = sum(bool(layer.states) for layer in exact.engine.shape.layers)
    assert exact.plan.parts["states"] == 2 * states + 6 * layers * exact.model.config.hidden_size * 4


def test_the_server_reuses_the_prefix_of_an_earlier_request(half):
    model = half["qwen3_5"]
    sessions, ids = PrefixCache(model.new_context, 10**8, 4), prompt_of(0, 30)
    context = sessions.take(ids[0], exact=False)
    answered = answer(model, ids, context=context)
    sessions.keep(context)
    following = torch.cat([answered, prompt_of(1, 6)], dim=1)
    context = sessions.take(following[0], exact=False)
    answer(model, following, context=context)
    assert model.last_report.cached_prompt_tokens == answered.shape[1] - 1


def test_states_go_back_to_where_they_were_copied_and_no_further(whole):
    dense, _ = whole["qwen3_5"]
    cache = KVCache(dense.config, ctx_tokens=64)
    with torch.no_grad():
        dense(prompt_of(0, 10), use_cache=True, **{CACHE: cache})
        before = cache.copied_states()
        cache.keep_start()
        dense(prompt_of(1, 3), use_cache=True, **{CACHE: cache})
    with pytest.raises(GriffinError, match="no states were kept that go back to token 12"):
        cache.crop(-1)
    assert cache.get_seq_length() == 13
    cache.crop(-3)
    for held, expected in zip(cache.copied_states(), before, strict=True):
        assert all(torch.equal(held[name], expected[name]) for name in expected)
    with pytest.raises(GriffinError, match="no states were kept that go back to token 9"):
        cache.crop(-1)


def test_drafts_of_others_are_still_refused(half):
    with pytest.raises(UsageError, match=r"prompt_lookup_num_tokens takes drafts back: .*; exact=True can"):
        answer(half["qwen3_5"], prompt_of(0, 20), prompt_lookup_num_tokens=3)
