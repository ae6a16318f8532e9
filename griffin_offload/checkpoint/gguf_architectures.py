"""The architectures that are read from GGUF files, each with what its header says and transformers needs: one entry
for each, dense ones and mixtures of experts."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from griffin_offload.checkpoint.gguf_config import (
    QKV_ROWS,
    Architecture,
    Described,
    are_integers,
    common_config,
    heads_of_values,
    pairs_apart,
)
from griffin_offload.errors import CheckpointError, UnsupportedModel

# Layers of the models that divide by another size than their heads', as llama.cpp tells them: Gemma's with 27B.
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}
_GEMMA2_WINDOW, _GEMMA3_PATTERN, _GEMMA3_LOCAL_THETA = 4096, 6, 10_000.0
# Every so-manyth layer of Llama 4 sees all tokens and has no positions, the others see chunks; and how many experts
# the model has that does not norm queries and keys.
_LLAMA4_PATTERN, _LLAMA4_CHUNK, _LLAMA4_WITHOUT_NORM = 4, 8192, 128
_MOST_SECTIONS, _NEVER_TURNS, _SIGMOID = 8, 1e20, 2


def config_of(described: Described) -> tuple[Architecture, dict[str, Any]]:
    """The architecture, one of `MIXTURES` where there are experts, and what config.json would say. UnsupportedModel for
    an architecture that is not read, CheckpointError for a header that lacks something."""
    architecture = known(described)
    config = common_config(described, architecture)
    architecture.extend(described, config)
    return architecture, config


def known(described: Described) -> Architecture:
    name, where = described.architecture, described.where
    experts = described.integer("expert_count", 0)
    if experts or any("_exps." in tensor for tensor in described.tensors):
        if name in MIXTURES:
            return MIXTURES[name]
        raise UnsupportedModel(
            f"{where} is a mixture of {experts or 'several'} experts of the architecture {name}, which is not read "
            f"from GGUF files: give the model's Hugging Face directory (read are {', '.join(sorted(MIXTURES))})"
        )
    if name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{where} is of the architecture {name}, which is not read from GGUF files: give the model's Hugging Face "
            f"directory (read are {', '.join(sorted(ARCHITECTURES))})"
        )
    return ARCHITECTURES[name]


# What single architectures add.


def _biases(described: Described, config: dict[str, object]) -> None:
    config["attention_bias"] = described.has("blk.0.attn_q.bias")
    config["mlp_bias"] = described.has("blk.0.ffn_up.bias")


def _qwen3(described: Described, config: dict[str, object]) -> None:
    config["attention_bias"] = described.has("blk.0.attn_q.bias")


def _window(described: Described, config: dict[str, object]) -> None:
    config["sliding_window"] = described.integer("attention.sliding_window", None) or None


def _phi3(described: Described, config: dict[str, Any]) -> None:
    _window(described, config)
    trained = config["rope_parameters"].get("original_max_position_embeddings", config["max_position_embeddings"])
    config["original_max_position_embeddings"] = trained


def _gemma2(described: Described, config: dict[str, object]) -> None:
    config["sliding_window"] = described.positive("attention.sliding_window", _GEMMA2_WINDOW)
    config["attn_logit_softcapping"] = described.number("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = described.number("final_logit_softcapping", 30.0)
    _query_scale(described, config)


def _gemma3(described: Described, config: dict[str, Any]) -> None:
    _window(described, config)
    config["final_logit_softcapping"] = described.number("final_logit_softcapping", None)
    _query_scale(described, config)
    every = described.integer("attention.sliding_window_pattern", _GEMMA3_PATTERN)
    if config["sliding_window"] is None:  # no layer has one, and transformers asks for a number all the same
        every, config["sliding_window"] = 1, config["max_position_embeddings"]
    config["layer_types"] = _every(every, config, "sliding_attention" if every else "full_attention")
    local = described.positive("rope.freq_base_swa", _GEMMA3_LOCAL_THETA)
    config["rope_parameters"] = {
        "full_attention": config["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": float(local)},
    }


def _query_scale(described: Described, config: dict[str, Any]) -> None:
    large = config["num_hidden_layers"] == _GEMMA_27B[described.architecture]
    size = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
    config["query_pre_attn_scalar"] = size


def _stablelm(described: Described, config: dict[str, Any]) -> None:
    config["use_qkv_bias"] = described.has("blk.0.attn_q.bias")
    config["use_parallel_residual"] = not described.has("blk.0.ffn_norm.weight")
    config["qk_layernorm"] = described.has("blk.0.attn_q_norm.weight")
    if config["head_dim"] != config["hidden_size"] // config["num_attention_heads"]:
        raise UnsupportedModel(
            f"{described.where} has heads of {config['head_dim']} numbers, which StableLM's cannot be"
        )
    config["partial_rotary_factor"] = config["rope_parameters"].get("partial_rotary_factor", 1.0)


def _starcoder2(described: Described, config: dict[str, Any]) -> None:
    _window(described, config)
    config["use_bias"] = described.has("blk.0.attn_q.bias")


def _nemotron(described: Described, config: dict[str, Any]) -> None:
    _biases(described, config)
    config["partial_rotary_factor"] = config["rope_parameters"].get("partial_rotary_factor", 1.0)


def _falcon(described: Described, config: dict[str, Any]) -> None:
    groups, _ = config.pop("num_key_value_heads"), config.pop("head_dim")
    two_norms = described.has("blk.0.attn_norm_2.weight")
    config |= {
        "ffn_hidden_size": config.pop("intermediate_size"),
        "num_kv_heads": groups,
        "new_decoder_architecture": groups > 1,
        "multi_query": groups == 1,
        "num_ln_in_parallel_attn": 2 if two_norms else 1 if groups > 1 else None,
        "bias": described.has("blk.0.attn_qkv.bias"),
        "parallel_attn": not described.has("blk.0.ffn_norm.weight"),
    }


def _gpt2(described: Described, config: dict[str, object]) -> None:
    config |= {"n_inner": config.pop("intermediate_size"), "n_positions": config["max_position_embeddings"]}
    for key in ("num_key_value_heads", "head_dim", "max_position_embeddings"):
        del config[key]


def _bloom(described: Described, config: dict[str, Any]) -> None:
    config["num_kv_heads"] = config["num_attention_heads"]
    wanted, found = 4 * config["hidden_size"], config.pop("intermediate_size")
    if found != wanted:
        raise UnsupportedModel(f"{described.where}: a feed-forward of {found} neurons, BLOOM's have {wanted}")
    for key in ("num_key_value_heads", "head_dim", "max_position_embeddings"):
        del config[key]


def _lfm2(described: Described, config: dict[str, Any]) -> None:
    config["norm_eps"] = config.pop("rms_norm_eps")
    config |= {"block_auto_adjust_ff_dim": False, "conv_L_cache": described.integer("shortconv.l_cache")}
    config["conv_bias"] = any(name.endswith("shortconv.in_proj.bias") for name in described.tensors)
    layers = range(min(config["num_hidden_layers"], 2**16))
    attends = [described.has(f"blk.{layer}.attn_q.weight") for layer in layers]
    config["layer_types"] = ["full_attention" if yes else "conv" for yes in attends]


def _qwen3_5(described: Described, config: dict[str, Any]) -> None:
    keys, values = described.integer("ssm.group_count"), described.integer("ssm.time_step_rank")
    if keys < 1 or values < 1:
        raise CheckpointError(f"{described.where} says that its states have {keys} heads of keys, {values} of values")
    config |= {
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
        "linear_key_head_dim": described.integer("ssm.state_size"),
        "linear_value_head_dim": described.integer("ssm.inner_size") // values,
        "linear_conv_kernel_dim": described.integer("ssm.conv_kernel"),
        "layer_types": _every(described.integer("full_attention_interval", 4), config, "linear_attention"),
    }
    sections = described.metadata.get(f"{described.architecture}.rope.dimension_sections")
    rope = {"partial_rotary_factor": 1.0, "mrope_interleaved": True} | config["rope_parameters"]
    if are_integers(sections) and sections.size <= _MOST_SECTIONS:  # of images' positions; a text's are alike
        rope["mrope_section"] = [int(section) for section in sections if section]
    config["rope_parameters"] = rope


def _gemma4(described: Described, config: dict[str, Any]) -> None:
    layers = min(config["num_hidden_layers"], 2**16)
    slides = [bool(slides) for slides in described.each("attention.sliding_window_pattern", layers)]
    groups = described.each("attention.head_count_kv", layers, config["num_attention_heads"])
    neurons, shared = described.each("feed_forward_length", layers), described.integer("attention.shared_kv_layers", 0)
    narrow = neurons[0] if neurons else 0
    doubled = [narrow * (2 if layer >= layers - shared else 1) for layer in range(layers)]
    if neurons not in (doubled, [narrow] * layers):
        raise UnsupportedModel(f"{described.where}: layers of {sorted(set(neurons))} neurons in no known order")
    full = {str(layer): int(groups[layer]) for layer in range(layers) if not slides[layer]}
    size, table = described.integer("attention.key_length"), described.tensors.get("per_layer_token_embd.weight")
    _window(described, config)
    config |= {
        "intermediate_size": narrow,
        "use_double_wide_mlp": neurons != [narrow] * layers,
        "layer_types": ["sliding_attention" if own else "full_attention" for own in slides],
        "head_dim": described.integer("attention.key_length_swa"),
        "num_key_value_heads": next((n for n, own in zip(groups, slides, strict=True) if own), max(groups, default=1)),
        "per_layer_config": {name: {"head_dim": size, "num_key_value_heads": own} for name, own in full.items()},
        "attention_k_eq_v": any(not described.has(f"blk.{name}.attn_v.weight") for name in list(full)[:1]),
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": described.integer("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": config["vocab_size"] if table is None else table.shape[0],
        "final_logit_softcapping": described.number("final_logit_softcapping", None),
        "rope_parameters": _gemma4_rope(described),
    }


def _gemma4_rope(described: Described) -> dict[str, Any]:
    """Pairs of a whole layer's head that do not turn have a factor as good as infinite."""
    kind, factors = described.get("rope.scaling.type", str, "none"), described.factors("rope_freqs.weight", np.inf)
    turning = [factor for factor in factors or [1.0] if factor < _NEVER_TURNS]
    if kind != "none" or any(factor != 1 for factor in turning):
        raise UnsupportedModel(f"{described.where} scales rotary positions, which is not read of Gemma 4")
    return {
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": float(described.positive("rope.freq_base")),
            "partial_rotary_factor": len(turning) / len(factors or [1.0]),
        },
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": float(described.positive("rope.freq_base_swa", _GEMMA3_LOCAL_THETA)),
        },
    }


def _every(interval: int, config: dict[str, Any], others: str) -> list[str]:
    """Types of layers of which every so-manyth attends to all."""
    layers = range(min(config["num_hidden_layers"], 2**16))
    return [others if interval < 1 or (layer + 1) % interval else "full_attention" for layer in layers]


def _llama4(described: Described, config: dict[str, Any]) -> None:
    """What files do not say llama.cpp has as constants, which are those of all that was published."""
    layers = range(min(config["num_hidden_layers"], 2**16))
    every, whole = described.integer("interleave_moe_layer_step"), described.integer("attention.sliding_window", 1) == 0
    kinds = _every(0 if whole else _LLAMA4_PATTERN, config, "full_attention" if whole else "chunked_attention")
    count = described.integer("expert_count", 0)
    config |= {
        "intermediate_size_mlp": config["intermediate_size"],
        "interleave_moe_layer_step": every,
        "moe_layers": [layer for layer in layers if every > 0 and (layer + 1) % every == 0],
        "layer_types": kinds,
        "no_rope_layers": [int(whole or kind == "chunked_attention") for kind in kinds],
        "attention_chunk_size": _LLAMA4_CHUNK,
        "use_qk_norm": count != _LLAMA4_WITHOUT_NORM,
        "attention_bias": described.has("blk.0.attn_q.bias"),
    }
    config["num_local_experts"], config["num_experts_per_tok"] = count, described.integer("expert_used_count", 1)
    _inner(described, config, "intermediate_size")


# Of mixtures of experts.


def _experts(described: Described, config: dict[str, object], count: str) -> None:
    config[count] = described.integer("expert_count")
    config["num_experts_per_tok"] = described.integer("expert_used_count")


def _inner(described: Described, config: dict[str, object], key: str) -> None:
    config[key] = described.integer("expert_feed_forward_length", config["intermediate_size"])


def _mixtral(described: Described, config: dict[str, object]) -> None:
    _experts(described, config, "num_local_experts")
    config["sliding_window"] = None


def _qwen2_moe(described: Described, config: dict[str, Any]) -> None:
    _experts(described, config, "num_experts")
    _inner(described, config, "moe_intermediate_size")
    shared = described.integer("expert_shared_feed_forward_length", config["intermediate_size"])
    config |= {"shared_expert_intermediate_size": shared, "norm_topk_prob": False}


def _qwen3_moe(described: Described, config: dict[str, Any]) -> None:
    _experts(described, config, "num_experts")
    _inner(described, config, "moe_intermediate_size")
    # As llama.cpp computes it, whatever the original's config said: files do not tell.
    config |= {"norm_topk_prob": True, "attention_bias": described.has("blk.0.attn_q.bias")}


def _qwen3_5_moe(described: Described, config: dict[str, Any]) -> None:
    _qwen2_moe(described, config)
    _qwen3_5(described, config)


def _minimax_m2(described: Described, config: dict[str, Any]) -> None:
    _experts(described, config, "num_local_experts")
    _inner(described, config, "intermediate_size")
    if described.integer("expert_gating_func", _SIGMOID) != _SIGMOID:
        raise UnsupportedModel(f"{described.where} weighs experts in another way than by sigmoids")


def _gpt_oss(described: Described, config: dict[str, Any]) -> None:
    _experts(described, config, "num_local_experts")
    _inner(described, config, "intermediate_size")
    config["sliding_window"] = described.integer("attention.sliding_window")
    config["layer_types"] = _every(2, config, "sliding_attention")
    config["attention_bias"] = described.has("blk.0.attn_q.bias")
    rope = config["rope_parameters"]
    if rope["rope_type"] == "yarn":
        rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}


_VALUES, _EACH_VALUE = heads_of_values("linear_value_head_dim"), heads_of_values(None)
_BEHIND_KEYS = heads_of_values("linear_value_head_dim", behind_keys=True)
_QWEN3_5: dict[str, Any] = {
    "rows": dict.fromkeys(("attn_qkv", "ssm_conv1d"), _BEHIND_KEYS)
    | dict.fromkeys(("ssm_alpha", "ssm_beta", "ssm_dt", "ssm_a"), _EACH_VALUE)
    | {"attn_gate": _VALUES},
    "columns": {"ssm_out": _VALUES},
    "norms_minus_one": True,
    "renamed": {"linear_attn.dt_bias": "linear_attn.dt_proj.bias"},
    "logs": ("ssm_a",),
    "written": False,
    "turns_parts": True,
}
_CORRECTION = {"mlp.e_score_correction_bias": "mlp.e_score_correction.bias"}
_LLAMA_ROWS = {"attn_q": pairs_apart("num_attention_heads"), "attn_k": pairs_apart("num_key_value_heads")}
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


ARCHITECTURES = {
    "llama": Architecture("llama", "llama", _biases, rows=_LLAMA_ROWS),
    "qwen2": Architecture("qwen2", "qwen2"),
    "qwen3": Architecture("qwen3", "qwen3", _qwen3),
    "phi3": Architecture("phi3", "phi3", _phi3, turns_parts=True),
    "gemma": Architecture("gemma", "gemma", norms_minus_one=True),
    "gemma2": Architecture("gemma2", "gemma2", _gemma2, norms_minus_one=True),
    "gemma3": Architecture("gemma3_text", "gemma3", _gemma3, norms_minus_one=True),
    "stablelm": Architecture("stablelm", "stablelm", _stablelm, "layer_norm_eps", turns_parts=True),
    "starcoder2": Architecture("starcoder2", "starcoder2", _starcoder2, "norm_epsilon"),
    "nemotron": Architecture("nemotron", "nemotron", _nemotron, "norm_eps", norms_minus_one=True, turns_parts=True),
    "falcon": Architecture("falcon", "falcon", _falcon, "layer_norm_epsilon", {"attn_qkv": QKV_ROWS}),
    "gpt2": Architecture("gpt2", "gpt2", _gpt2, "layer_norm_epsilon", transposed=_CONV1D, rotary=False),
    "bloom": Architecture("bloom", "bloom", _bloom, "layer_norm_epsilon", {"attn_qkv": QKV_ROWS}, rotary=False),
    "lfm2": Architecture("lfm2", "lfm2", _lfm2, layers_differ=True),
    "gemma4": Architecture("gemma4_text", "gemma4", _gemma4, rotary=False, layers_differ=True, written=False),
    "qwen35": Architecture("qwen3_5_text", "qwen35", _qwen3_5, **_QWEN3_5),
    "llama4": Architecture("llama4_text", "llama4", _llama4, written=False),
}
"""By the name in general.architecture."""

MIXTURES: Mapping[str, Architecture] = {
    "llama": Architecture("mixtral", "llama", _mixtral, rows=_LLAMA_ROWS),
    "qwen2moe": Architecture("qwen2_moe", "qwen2moe", _qwen2_moe),
    "qwen3moe": Architecture("qwen3_moe", "qwen3moe", _qwen3_moe),
    "qwen35moe": Architecture("qwen3_5_moe_text", "qwen35moe", _qwen3_5_moe, **_QWEN3_5),
    "minimax-m2": Architecture(
        "minimax_m2", "minimax-m2", _minimax_m2, renamed=_CORRECTION, written=False, turns_parts=True
    ),
    "gpt-oss": Architecture("gpt_oss", "gpt-oss", _gpt_oss),
    "llama4": Architecture("llama4_text", "llama4", _llama4, written=False),
}
"""By the name in general.architecture, of files that have experts."""
