"""Layers that keep a state of convolutions or recurrences, and other ways to differ from layer to layer."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from alive_bytes import AliveBytes
from conversation_reference import check_turns
from marks import mostly_slow
from quantised_reference import quantised_generate
from reference import collect_z, dense_generate, masked_generate, select_direct, shared_statistic_float64
from tiny_models import CHAT_TEMPLATE, FURTHER, HYBRIDS, VOCAB, write_checkpoint, write_tokenizer
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinModel, UsageError
from griffin_offload.engine.convert import convert
from griffin_offload.engine.generation import cache_bytes, state_bytes

CTX = 72
TOKENS, NEW = 40, 6
NOT_BACK = "layers of kind linear_attention keep a state that cannot be rolled back"

# One of each way to differ: positions, KV entries that are shared, convolutions, two kinds of recurrences, layers
# without a feed-forward.
QUICKLY = ("smollm3", "gemma4", "lfm2", "qwen3_5", "falcon_h1", "nemotron_h")
EACH = mostly_slow([*QUICKLY, *(name for name in FURTHER | HYBRIDS if name not in QUICKLY)], len(QUICKLY))


def _load(path: Path, **options: object) -> GriffinModel:
    defaults = {"device": "cpu", "max_gpu_mem": "1GB", "ctx_size": CTX, "density": 0.5}
    return GriffinModel.from_pretrained(path, **defaults | options)


def _prompts(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, T]: longer than the windows, later samples padded on the left."""
    ids = torch.randint(3, VOCAB, (batch, TOKENS), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    for i in range(batch):
        mask[i, : 7 * i] = 0
    return ids * mask, mask


@pytest.mark.parametrize("name", EACH)
def test_density_one_is_dense_and_half_is_masked(name: str, checkpoints):
    path, down = checkpoints(name), (FURTHER | HYBRIDS)[name].down
    dense = AutoModelForCausalLM.from_pretrained(path)
    ids, mask = _prompts(1)
    whole = _load(path, density=1.0, always_stream=True)
    expected, _ = dense_generate(dense, ids, mask, NEW)
    assert torch.equal(whole.generate(ids, max_new_tokens=NEW, do_sample=False), expected)

    ids, mask = _prompts(2)
    sets = [select_direct("topk", 64, shared_statistic_float64(z, mask)) for z in collect_z(dense, down, ids, mask)]
    expected, logits = masked_generate(dense, down, ids, mask, sets, NEW)
    model = _load(path, batch_size=2)
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **options)
    assert [chosen.tolist() for chosen in model.selected.values()] == [chosen.tolist() for chosen in sets]
    assert torch.equal(output.sequences, expected)
    assert (torch.stack(output.logits) - logits).norm() / logits.norm() < 1e-5
    assert model.last_report.peak_device_bytes <= model.plan.peak_bytes


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"quantize": "int4"}, {"quantize": "tiers", "bits": 3}])
def test_a_norm_of_neurons_counts_those_left_out_as_zeros(options: dict[str, Any], checkpoints):
    """BitNet's, in each format that neurons rest in, and in several: against its formula in float64."""
    model = _load(checkpoints("bitnet"), **options | {"density": "auto" if "bits" in options else 0.5})
    ids, _ = _prompts(1)
    model.generate(ids, max_new_tokens=2, do_sample=False)
    assert model.resident_bytes == model.plan.resident_bytes
    norm, given = model.model.model.layers[1].mlp.ffn_sub_norm, []
    hook = norm.register_forward_hook(lambda _, args, output: given.append((args[0], output)))
    model.generate(ids, max_new_tokens=2, do_sample=False)
    hook.remove()
    z, found = (tensor.double() for tensor in given[-1])
    dense = AutoModelForCausalLM.from_pretrained(checkpoints("bitnet"))
    weight = dense.model.layers[1].mlp.ffn_sub_norm.weight.double()
    own = []
    for chosen in model.selected[1].split(model.plan.counts[1]):
        blocks = 64 if options.get("quantize") in ("int4", "tiers") else 1  # whole ones, filled up with zeros
        own += [weight[chosen], weight.new_zeros(-len(chosen) % blocks)]
    expected = torch.cat(own) * z / (z.square().sum(-1, keepdim=True) / 128 + dense.config.rms_norm_eps).sqrt()
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_layers_without_a_feed_forward_rest_in_their_format(checkpoints, tmp_path: Path, precision: str):
    """Mamba and attention alone, quantised as beside a feed-forward: against dense transformers with rounded matrices;
    and a converted copy."""
    path, architecture = write_checkpoint("nemotron_h", tmp_path / "plain"), HYBRIDS["nemotron_h"]
    convert(path, tmp_path / "copy", precision)
    ids, mask = _prompts(1)
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def answer(model: GriffinModel) -> tuple[torch.Tensor, torch.Tensor]:
        output = model.generate(ids, **options)
        assert model.resident_bytes == model.plan.resident_bytes
        assert model.last_report.peak_device_bytes <= model.plan.peak_bytes
        return output.sequences, torch.stack(output.logits)

    model = _load(path, quantize=precision)
    assert model.plan.streamed == (1, 3)
    sequences, logits = answer(model)
    dense, sets = AutoModelForCausalLM.from_pretrained(path), list(model.selected.values())
    sizes = (architecture.down, architecture.neurons, precision, (ids, mask), sets, NEW)
    tokens, expected = quantised_generate(dense, *sizes, head=precision != "int8")
    assert torch.equal(sequences, tokens)
    assert (logits - expected).norm() / expected.norm() < 2e-3
    whole, copied = (answer(_load(source, quantize=precision, density=1.0)) for source in (path, tmp_path / "copy"))
    assert torch.equal(whole[0], copied[0])
    torch.testing.assert_close(whole[1], copied[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*HYBRIDS, "gemma4"])
def test_the_plan_counts_what_layers_keep(name: str, checkpoints):
    """Against a KV cache of transformers' own, filled by the dense model."""
    path = checkpoints(name)
    ids = _prompts(1)[0]
    plan = _load(path, ctx_size=TOKENS, prompt_tokens=TOKENS).plan
    if name == "recurrent_gemma":  # transformers has them in modules: two layers of 48 channels, float32
        assert plan.parts["states"] == 2 * 4 * (48 * 3 + 48)
        return
    filled = AutoModelForCausalLM.from_pretrained(path)(ids, use_cache=True).past_key_values
    assert plan.parts["states"] == state_bytes(filled)
    if name in HYBRIDS:
        assert plan.parts["states"] > 0
        assert plan.decode_parts["kv_cache"] == cache_bytes(filled)


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5"])
def test_drafts_of_transformers_own_are_right_or_refused(name: str, checkpoints):
    model = _load(checkpoints(name))
    ids = _prompts(1)[0][:, :12].repeat(1, 3)
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    if name == "lfm2":  # a convolution's inputs can be kept until it is known which of them count
        drafted = model.generate(ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
        assert torch.equal(drafted, plain)
        return
    for draft in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model.model}):
        with pytest.raises(UsageError, match=f"{next(iter(draft))} takes drafts back: {NOT_BACK}"):
            model.generate(ids, max_new_tokens=8, do_sample=False, **draft)


def test_a_turn_reads_its_own_tokens_alone(checkpoints, tmp_path: Path):
    """Behind an answer the state goes on; where the conversation becomes another one, from the end of a prompt."""
    path = checkpoints("qwen3_5")
    write_tokenizer(path, CHAT_TEMPLATE)
    model = _load(path, ctx_size=256, keep_prompts=True, always_stream=True)
    check_turns(model, tmp_path / "conversation.ctx")


def test_one_layer_of_each_kind_is_measured(monkeypatch: pytest.MonkeyPatch):
    """Layers like an earlier one are left out of the pass on the meta device: a plan takes no longer for 80 of them."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from griffin_offload.blocks.layouts import build_on_meta
    from griffin_offload.blocks.model_shape import states_of

    runs = []
    stock = LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda *args, **kwargs: runs.append(1) or stock(*args, **kwargs))
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 64}
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=20, **sizes)
    model = build_on_meta(config, torch.float32)
    states = states_of(model)
    assert [(state.kv_width, state.kv_heads, state.state_bytes) for state in states] == [(2 * 2 * 24, 2, 0)] * 20
    config.name_or_path = "elsewhere"
    assert states_of(build_on_meta(config, torch.float32)) == states
    assert sum(runs) == 1  # once for each config, wherever its checkpoint is
    states_of(build_on_meta(config, torch.bfloat16))
    assert sum(runs) == 2
    assert "forward" not in model.model.layers[3].__dict__
    assert inspect.ismethod(model.model.layers[3].forward)


@pytest.mark.parametrize("name", mostly_slow([*QUICKLY, *(name for name in HYBRIDS if name == "recurrent_gemma")], 2))
def test_exact_mode_and_contexts_where_layers_differ(name: str, checkpoints, tmp_path: Path):
    """With drafts taken back, a prompt cut back, and one that was saved."""
    path = checkpoints(name)
    dense, model, ids = AutoModelForCausalLM.from_pretrained(path), _load(path), _prompts(1)[0]
    context = model.new_context()
    for tokens in (TOKENS, 20, 30):
        expected, _ = dense_generate(dense, ids[:, :tokens], None, NEW)
        options = {"max_new_tokens": NEW, "do_sample": False, "exact": True, "draft_tokens": 4}
        assert torch.equal(model.generate(ids[:, :tokens], context=context, **options), expected)
    model.generate(ids[:, :30], context=context, **options | {"max_new_tokens": 1})
    model.save_context(context, tmp_path / "saved.ctx")
    loaded, _ = model.load_context(tmp_path / "saved.ctx")
    expected, _ = dense_generate(dense, ids, None, NEW)
    assert torch.equal(model.generate(ids, context=loaded, **options), expected)
    assert model.last_report.cached_prompt_tokens == 30


@pytest.mark.parametrize("options", [{"exact": True, "draft_tokens": 4}, {"density": 1.0, "refresh": 3}])
def test_passes_between_tokens_take_the_time_steps_of_single_ones(tmp_path: Path, options: dict[str, Any]):
    """transformers' scan of Nemotron-H makes time steps no shorter than a least one, and decoding does not."""
    architecture = HYBRIDS["nemotron_h"]
    settings = architecture.settings | {"time_step_min": 0.5, "time_step_max": 1.0}
    dataclasses.replace(architecture, settings=settings).build().save_pretrained(tmp_path)
    dense, ids = AutoModelForCausalLM.from_pretrained(tmp_path), _prompts(1)[0]
    expected, logits = dense_generate(dense, ids, None, NEW)
    model = _load(tmp_path, **options, always_stream=True)
    output = model.generate(ids, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert (torch.stack(output.logits) - logits).norm() / logits.norm() < 1e-5


def test_simulation_is_refused_where_rows_share_entries(checkpoints):
    from griffin_offload.evaluation.samples import Sample
    from griffin_offload.evaluation.simulation import simulate
    from griffin_offload.method.variants import Variant

    model = _load(checkpoints("gemma4"))
    with pytest.raises(UsageError, match="gemma4_text has layers that read other layers' KV entries"):
        simulate(model, [Sample(_prompts(1)[0][0], 30, 30)], [Variant(0.5)])


@pytest.mark.parametrize("name", list(HYBRIDS))
def test_what_a_scan_makes_of_a_prompt_is_counted(name: str, checkpoints):
    path, tokens = checkpoints(name), 256
    dense = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad(), AliveBytes() as alive:
        dense(torch.full((1, tokens), 5), use_cache=True, logits_to_keep=1)
    parts = _load(path, ctx_size=tokens, density=1.0, prompt_tokens=tokens).plan.prefill_parts
    assert alive.peak <= sum(parts[part] for part in ("workspace", "kv_cache", "states", "logits"))
