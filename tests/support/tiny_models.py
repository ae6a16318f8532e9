"""Tiny random transformers models of every supported architecture, for offline tests.

Independent of the package on purpose: the name of each down projection and its width F are written here by
hand, so that a wrong feed-forward table in the package cannot hide itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HIDDEN = 32
LAYERS = 3
HEADS = 4
VOCAB = 320  # 256 bytes, 3 special tokens, 53 merges, room for 8: any text can be written
MAX_POSITIONS = 512
WINDOW = 16
PAD, BOS, EOS = 0, 1, 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,  # greedy decoding never stops early
}


@dataclass(frozen=True)
class Architecture:
    """One tiny model: `down` names the down projection of layer {i}, `neurons` is F."""

    name: str
    config_class: type[hf.PreTrainedConfig]
    down: str
    neurons: int
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0) -> hf.PreTrainedModel:
        """The float32 model in eval mode; the same seed gives the same weights."""
        return randomised(self.config_class(**{**_COMMON, **self.settings}), seed)

    def down_names(self) -> list[str]:
        return [self.down.format(i=i) for i in range(LAYERS)]


def randomised(config: hf.PreTrainedConfig, seed: int) -> hf.PreTrainedModel:
    """Matrices that matter against the residual, and noise on every bias and norm: none is exactly 0 or 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            else:
                gain = 1 if id(parameter) in tables else 2
                parameter.copy_(gain * noise / math.sqrt(HIDDEN))
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith("bias"):  # by which routers choose
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    model.generation_config.eos_token_id = None
    return model


ARCHITECTURES: dict[str, Architecture] = {}


def _add(
    name: str,
    config_class: type[hf.PreTrainedConfig],
    down: str,
    neurons: int = 128,
    width: str | None = "intermediate_size",
    **settings: Any,
) -> None:
    """Enter one architecture; `width` is the config's own word for F (None: fixed at 4H)."""
    if width is not None:
        settings[width] = neurons
    ARCHITECTURES[name] = Architecture(name, config_class, down, neurons, settings)


_DOWN = "model.layers.{i}.mlp.down_proj"
_DENSE = "transformer.h.{i}.mlp.dense_4h_to_h"
_FC2 = "model.decoder.layers.{i}.fc2"
_GQA: dict[str, Any] = {"num_key_value_heads": 2}
_WIDE: dict[str, Any] = {**_GQA, "head_dim": 16}  # heads * head_dim != H
_MIXED: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_WINDOWS_FIRST: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_ALIBI: dict[str, Any] = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
_FALCON_NEW: dict[str, Any] = {"new_decoder_architecture": True, "num_kv_heads": 2}
# As Gemma 3 from 4B on: long positions squeezed where all tokens are seen.
_GEMMA3_ROPE: dict[str, Any] = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
_OLMO3_ROPE: dict[str, Any] = {
    "full_attention": _YARN,
    "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
}
LONGROPE_BORDER = 256
"""Of "phi3" here: up to so many tokens its positions are turned by other angles than beyond."""
# As Phi-4-mini: three quarters of the 8 numbers of a head are turned.
_PHI4_MINI: dict[str, Any] = {
    "original_max_position_embeddings": LONGROPE_BORDER,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.3],
        "long_factor": [1.0, 2.5, 4.0],
        "original_max_position_embeddings": LONGROPE_BORDER,
    },
}

_add("llama2", hf.LlamaConfig, _DOWN)
_add("llama3", hf.LlamaConfig, _DOWN, rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=True, **_GQA)
_add("llama_bias", hf.LlamaConfig, _DOWN, attention_bias=True, mlp_bias=True)
_add("reglu", hf.LlamaConfig, _DOWN, hidden_act="relu")
_add("mistral", hf.MistralConfig, _DOWN, sliding_window=WINDOW, **_GQA)
_add("gemma", hf.GemmaConfig, _DOWN, num_key_value_heads=1, head_dim=16)
_add("gemma2", hf.Gemma2Config, _DOWN, query_pre_attn_scalar=16, **_WIDE, **_MIXED)
_add(
    "gemma3",
    hf.Gemma3TextConfig,
    _DOWN,
    query_pre_attn_scalar=16,
    rope_parameters=_GEMMA3_ROPE,
    **_WIDE,
    **_WINDOWS_FIRST,
)
_add("qwen2", hf.Qwen2Config, _DOWN, 112, **_GQA, **_TIED)
_add("qwen3", hf.Qwen3Config, _DOWN, **_WIDE, **_TIED)
_add("phi3", hf.Phi3Config, _DOWN, 112, **_GQA, **_PHI4_MINI, **_TIED)
_add("glm4", hf.Glm4Config, _DOWN, **_WIDE)
_add("olmo2", hf.Olmo2Config, _DOWN)
_add("cohere2", hf.Cohere2Config, _DOWN, logit_scale=0.25, **_WIDE, **_WINDOWS_FIRST)
_add("stablelm", hf.StableLmConfig, _DOWN, **_GQA)
_add("starcoder2", hf.Starcoder2Config, "model.layers.{i}.mlp.c_proj", sliding_window=WINDOW, **_GQA)
_add("phi", hf.PhiConfig, "model.layers.{i}.mlp.fc2", 112)
_add("gpt_neox", hf.GPTNeoXConfig, "gpt_neox.layers.{i}.mlp.dense_4h_to_h")
_add("opt", hf.OPTConfig, _FC2, 112, "ffn_dim")
_add("opt_no_bias", hf.OPTConfig, _FC2, 128, "ffn_dim", enable_bias=False)
_add("opt_350m", hf.OPTConfig, _FC2, 128, "ffn_dim", do_layer_norm_before=False, word_embed_proj_dim=24)
_add("falcon_multi_query", hf.FalconConfig, _DENSE, 128, "ffn_hidden_size")
_add("falcon_new", hf.FalconConfig, _DENSE, 112, "ffn_hidden_size", **_FALCON_NEW)
_add("falcon_alibi", hf.FalconConfig, _DENSE, 128, "ffn_hidden_size", **_ALIBI)
_add("gpt2", hf.GPT2Config, "transformer.h.{i}.mlp.c_proj", 112, "n_inner")
_add("gptj", hf.GPTJConfig, "transformer.h.{i}.mlp.fc_out", 112, "n_inner", rotary_dim=4)
_add("bloom", hf.BloomConfig, _DENSE, 4 * HIDDEN, None)


# Tested for what is their own alone: what they share with those above costs the suite no second time.
FURTHER: dict[str, Architecture] = {}
"""Architectures with plain attention: positions left out of some layers, multipliers, heads of two sizes, a KV cache
that layers share."""
HYBRIDS: dict[str, Architecture] = {}
"""Architectures in which layers keep a state of convolutions or recurrences."""


def _further(table: dict[str, Architecture], name: str, config_class: Any, down: str = _DOWN, **settings: Any) -> None:
    settings.setdefault("intermediate_size", 128)
    table[name] = Architecture(name, config_class, down, 128, settings)


_GEMMA4: dict[str, Any] = {
    "global_head_dim": 32,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 1,
    "final_logit_softcapping": 30.0,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
_GRANITE: dict[str, Any] = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.15,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
_GRANITE_H: dict[str, Any] = {
    "num_local_experts": 0,
    "shared_intermediate_size": 128,
    "layer_types": ["mamba", "attention", "mamba"],
    "mamba_n_groups": 1,
    "position_embedding_type": "nope",
}
_LFM2: dict[str, Any] = {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention", "conv"]}

_further(FURTHER, "smollm3", hf.SmolLM3Config, no_rope_layers=[1, 1, 0], **_GQA, **_TIED)
_further(FURTHER, "olmo3", hf.Olmo3Config, rope_parameters=_OLMO3_ROPE, **_WINDOWS_FIRST)
_further(FURTHER, "exaone4", hf.Exaone4Config, rope_parameters=_LLAMA3_ROPE, **_GQA, **_WINDOWS_FIRST)
_further(FURTHER, "granite", hf.GraniteConfig, **_GQA, **_GRANITE, **_TIED)
_further(FURTHER, "gemma4", hf.Gemma4TextConfig, **_WIDE, **_GEMMA4)
_further(
    FURTHER,
    "modernbert_decoder",
    hf.ModernBertDecoderConfig,
    "model.layers.{i}.mlp.Wo",
    layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    local_attention=WINDOW,
)
_further(FURTHER, "ctrl", hf.CTRLConfig, "transformer.h.{i}.ffn.2", dff=128)
_further(FURTHER, "bert", hf.BertConfig, "bert.encoder.layer.{i}.output.dense", is_decoder=True)
_further(HYBRIDS, "lfm2", hf.Lfm2Config, "model.layers.{i}.feed_forward.w2", **_GQA, **_LFM2)
_further(HYBRIDS, "qwen3_5", hf.Qwen3_5TextConfig, **_WIDE, **_DELTA)
_further(HYBRIDS, "olmo_hybrid", hf.OlmoHybridConfig, **_GQA, **_DELTA)
_further(
    HYBRIDS, "falcon_h1", hf.FalconH1Config, "model.layers.{i}.feed_forward.down_proj", mamba_d_ssm=64, **_GQA, **_MAMBA
)
_further(
    HYBRIDS,
    "granite_h",
    hf.GraniteMoeHybridConfig,
    "model.layers.{i}.shared_mlp.output_linear",
    **_GQA,
    **_MAMBA,
    **_GRANITE_H,
)
# A layer is Mamba, attention or a feed-forward alone, as Nemotron-H and Nemotron 3 are published.
_NEMOTRON_H: dict[str, Any] = {
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "chunk_size": 16,
}
_further(
    HYBRIDS,
    "nemotron_h",
    hf.NemotronHConfig,
    "model.layers.{i}.mixer.down_proj",
    num_hidden_layers=4,
    layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"],
    **_GQA,
    **_NEMOTRON_H,
)


# Before transformers 5.23 its cache knows of attention alone.
if "layer_types" in hf.RecurrentGemmaConfig.attribute_map:
    _further(
        HYBRIDS,
        "recurrent_gemma",
        hf.RecurrentGemmaConfig,
        "model.layers.{i}.mlp_block.down_proj",
        intermediate_size=256,  # of gate and up together
        block_types=["recurrent", "attention", "recurrent"],
        lru_width=48,
        attention_window_size=64,
        **_GQA,
    )


RECURRENT: dict[str, Architecture] = {}
"""Layers are recurrences and nothing else: no feed-forward, so that `down` names nothing."""
_MAMBA2: dict[str, Any] = {"num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 16}
for _name, _kind, _more in (
    ("mamba", hf.MambaConfig, {}),
    ("falcon_mamba", hf.FalconMambaConfig, {}),
    ("mamba2", hf.Mamba2Config, _MAMBA2),
):
    RECURRENT[_name] = Architecture(_name, _kind, "", 0, {"state_size": 16, **_more})


MIXTURES: dict[str, Architecture] = {}
"""Mixtures of 8 experts, of which a token is sent to 2; `down` is the module of experts."""
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "intermediate_size": 96, **_GQA}
_MANY: dict[str, Any] = {"num_experts": 8, "moe_intermediate_size": 48}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": HEADS,
}
_ROUTED: dict[str, Any] = {"n_routed_experts": 8, "moe_intermediate_size": 64, "n_shared_experts": 1}
_GROUPS: dict[str, Any] = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}


def _mixture(name: str, config_class: Any, down: str = "model.layers.{i}.mlp.experts", **settings: Any) -> None:
    MIXTURES[name] = Architecture(name, config_class, down, 8, {**_EXPERTS, **settings})


_mixture("mixtral", hf.MixtralConfig, num_local_experts=8)
_mixture("gpt_oss", hf.GptOssConfig, num_local_experts=8, head_dim=16, layer_types=["full_attention"] * LAYERS)
_mixture("deepseek_v3", hf.DeepseekV3Config, **{**_LATENT, **_ROUTED, **_GROUPS})
_mixture("qwen3_moe", hf.Qwen3MoeConfig, **_MANY, norm_topk_prob=True, head_dim=16)
_mixture("qwen2_moe", hf.Qwen2MoeConfig, **_MANY, shared_expert_intermediate_size=96)
_mixture("olmoe", hf.OlmoeConfig, num_experts=8)
_mixture("deepseek_v2", hf.DeepseekV2Config, **{**_LATENT, **_ROUTED}, first_k_dense_replace=1)
_mixture("glm4_moe", hf.Glm4MoeConfig, **{**_ROUTED, **_GROUPS}, head_dim=16)
_mixture("granitemoe", hf.GraniteMoeConfig, "model.layers.{i}.block_sparse_moe.experts", num_local_experts=8)
_mixture("ernie4_5_moe", hf.Ernie4_5_MoeConfig, moe_num_experts=8, moe_k=2, moe_intermediate_size=48)
_mixture("phimoe", hf.PhimoeConfig, num_local_experts=8)
_mixture("minimax_m2", hf.MiniMaxM2Config, num_local_experts=8, head_dim=16)
_mixture("flex_olmo", hf.FlexOlmoConfig, num_experts=8)
_mixture("hunyuan_v1_moe", hf.HunYuanMoEV1Config, num_experts=8, moe_topk=2, head_dim=16)
_mixture(
    "lfm2_moe",
    hf.Lfm2MoeConfig,
    "model.layers.{i}.feed_forward.experts",
    **_MANY,
    num_dense_layers=1,
    layer_types=["conv", "full_attention", "conv"],
)
_mixture(
    "qwen3_next",
    hf.Qwen3NextConfig,
    **_MANY,
    shared_expert_intermediate_size=96,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
)
_mixture(
    "nemotron_3",
    hf.NemotronHConfig,
    "model.layers.{i}.mixer.experts",
    num_hidden_layers=5,
    layers_block_type=["linear_attention", "moe", "full_attention", "moe", "mlp"],
    moe_shared_expert_intermediate_size=96,
    routed_scaling_factor=2.5,
    time_step_min=1e-9,  # what is longer than the least is the same in a scan and token by token
    **_ROUTED,
    **_NEMOTRON_H,
)
_LLAMA4: dict[str, Any] = {
    "intermediate_size_mlp": 64,
    "head_dim": 16,
    "moe_layers": [1, 2],
    "no_rope_layers": [1, 0, 1],
    "attention_chunk_size": WINDOW,
    "floor_scale": 8,  # each so many tokens another temperature
}
_mixture(
    "llama4", hf.Llama4TextConfig, "model.layers.{i}.feed_forward.experts", num_local_experts=8, **_LLAMA4
)  # published: one expert to a token
_mixture("jetmoe", hf.JetMoeConfig, "model.layers.{i}.mlp.output_linear", num_local_experts=8, kv_channels=16)
STATES_AND_EXPERTS = {
    "jamba": Architecture(
        "jamba",
        hf.JambaConfig,
        "model.layers.{i}.feed_forward.experts",
        4,
        {**_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "mamba_d_state": 16},
    )
}
_REFUSED: dict[str, Architecture] = {
    "openai-gpt": Architecture("openai-gpt", hf.OpenAIGPTConfig, "", 128, {}),
}
_further(FURTHER, "bitnet", hf.BitNetConfig, "model.layers.{i}.mlp.ffn_sub_norm", **_GQA)


# One of each way to lay a feed-forward out, to norm and to attend: what runs without --run-slow.
QUICK = ("llama3", "gemma2", "phi3", "gpt_neox", "opt_350m", "falcon_new", "gpt2")
# What most tests run: these, one that sees windows alone, one without positions of its own, and one with biases beside
# a gate. Every architecture is in tests/engine/test_against_dense.py, and converted in tests/cli/test_convert.py.
KINDS = (*QUICK, "mistral", "falcon_alibi", "llama_bias")
# And of mixtures, of which every one is in tests/engine/test_experts.py: experts one by one; transposed and with
# biases; chosen in groups behind a dense layer; beside a shared one; in one tensor of a layer; beside states; ungated;
# given all tokens.
MIXTURE_KINDS = (
    *("mixtral", "gpt_oss", "deepseek_v3", "qwen2_moe", "granitemoe", "qwen3_next", "nemotron_3", "llama4"),
)


def quick_first(names: Iterable[str]) -> list[Any]:
    """Those names as parameters; quick are the ones in QUICK."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


def every_architecture() -> list[Any]:
    """The names of ARCHITECTURES as parameters; most are slow."""
    return quick_first(ARCHITECTURES)


def refused_models() -> dict[str, Callable[[], hf.PreTrainedModel]]:
    """Builders of models with 3-D experts that are called in a way of their own, as transformers makes them."""
    return {"jetmoe": MIXTURES["jetmoe"].build}


def write_checkpoint(name: str, directory: Path, dtype: torch.dtype = torch.float32, shards: int = 2) -> Path:
    """Save a model of either table in at least `shards` safetensors files; returns the directory."""
    model = (
        (ARCHITECTURES | FURTHER | HYBRIDS | RECURRENT | MIXTURES | STATES_AND_EXPERTS | _REFUSED)[name]
        .build()
        .to(dtype)
    )
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(directory, max_shard_size=n_bytes // shards if shards > 1 else n_bytes + 1)
    assert len(list(Path(directory).glob("*.safetensors"))) >= shards
    return Path(directory)


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(directory: Path, chat_template: str | None = None) -> hf.PreTrainedTokenizerFast:
    """Save a byte-level BPE tokenizer that fits VOCAB; PAD, BOS and EOS are its special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8,  # some tokenizer classes (Qwen2) add tokens of their own on loading
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = "the cat sat on the mat and thought of another river while nothing was left in their boats "
    bpe.train_from_iterator([corpus * 4], trainer)
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        chat_template=chat_template,
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


SUPER_WEIGHT = 30.0
"""Of an early down projection, in root mean squares of its other weights."""
OUTLIER_CHANNELS = (5, 77, 200)


@torch.no_grad()
def with_outliers(seed: int = 0, gain: float = 20.0) -> hf.PreTrainedModel:
    """A Llama that is as hard to quantise as trained ones: a few channels of the residual that norms make `gain` times
    larger, read by columns that are as much smaller; and one weight that makes a channel large by itself."""
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
    model = randomised(hf.LlamaConfig(**{**_COMMON, **sizes, **_GQA}), seed)
    for layer in model.model.layers:
        for linear in (module for module in layer.modules() if isinstance(module, torch.nn.Linear)):
            linear.weight *= 0.5 * math.sqrt(HIDDEN / linear.in_features)  # errors add up, and do not explode
        readers = {
            layer.input_layernorm: (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            layer.post_attention_layernorm: (layer.mlp.gate_proj, layer.mlp.up_proj),
        }
        for norm, linears in readers.items():
            norm.weight[list(OUTLIER_CHANNELS)] *= gain
            for linear in linears:
                linear.weight[:, list(OUTLIER_CHANNELS)] /= gain
    down = model.model.layers[0].mlp.down_proj.weight
    down[OUTLIER_CHANNELS[0], 100] = SUPER_WEIGHT * float(down.square().mean().sqrt())
    return model
