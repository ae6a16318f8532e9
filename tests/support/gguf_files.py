"""GGUF files of tiny models, as llama.cpp's converter writes them: by the package gguf's writer, from what transformers
holds. Independent of the package: every rearrangement is written here again, in the other direction."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

_NAMES = {"gemma3_text": "gemma3", "mixtral": "llama", "gpt_oss": "gpt-oss"}
_NAMES |= {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "llama4_text": "llama4"}
_NAMES |= {"gemma4_text": "gemma4", "minimax_m2": "minimax-m2"}
_NAMES |= {"qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe"}
_NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3", "nemotron", "qwen35", "qwen35moe")
_WIDTHS = ("intermediate_size", "ffn_hidden_size", "n_inner", "moe_intermediate_size")
Q = gguf.GGMLQuantizationType


def write_gguf(
    model: Any,
    path: Path,
    kind: str = "F32",
    *,
    tokenizer: Path | None = None,
    more: Mapping[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    shard: int = 0,
    architecture: str | None = None,
    others: Mapping[str, str] | None = None,
) -> Path:
    """Write `model`, its matrices in blocks of `kind` but for `others`, by their names in the file, the rest in F32.
    `tokenizer` is a directory with a byte-level tokenizer.json; `more` are further keys, `drop` keys that are left
    out."""
    config, name = model.config, _NAMES.get(model.config.model_type, model.config.model_type)
    writer = gguf.GGUFWriter(path, architecture or name, split_max_tensors=shard, use_temp_file=False)
    for key, value in ({**_metadata(config, name), **_tokens(tokenizer), **(more or {})}).items():
        if key not in drop:
            _add(writer, key, value)
    table = gguf.get_tensor_name_map(_arch(name), config.num_hidden_layers)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for hf_name, tensor in _split(model):
        stem, _, suffix = hf_name.rpartition(".")
        found = table.get_name(stem) or table.get_name(stem.removeprefix("transformer."))
        if hf_name.endswith(".A_log"):
            found, suffix = table.get_name(hf_name), ""
        if found is None or suffix not in ("weight", "bias", "") or (tied and found == "output"):
            continue
        there = f"{found}.{suffix}".rstrip(".")
        numbers = _stored(name, config, there, hf_name, tensor.float()).contiguous().numpy()
        blocks = Q[(others or {}).get(found, kind)]
        plain = numbers.ndim == 1 or suffix == "bias" or numbers.shape[-1] % gguf.GGML_QUANT_SIZES[blocks][0]
        stored = Q.F32 if plain or "conv1d" in there else blocks
        writer.add_tensor(there, gguf.quants.quantize(numbers, stored), raw_dtype=stored)
    _add_rope_tensors(writer, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _split(model: Any) -> list[tuple[str, Tensor]]:
    """The state of a model, experts as llama.cpp has them: gate, up and down of all, [E, outputs, inputs] each."""
    found: list[tuple[str, Tensor]] = []
    oss = model.config.model_type == "gpt_oss"
    turns = oss or model.config.model_type == "llama4_text"
    for name, tensor in model.state_dict().items():
        name = name.replace(".dt_bias", ".dt_proj.bias").replace("_correction_bias", "_correction.bias")
        name = name.replace(".layer_scalar", ".layer_scalar.weight")
        path, _, own = name.rpartition(".experts.")
        bias = own.endswith("_bias")
        suffix = "bias" if bias else "weight"
        if not path:
            found.append((f"{name}.weight" if name.endswith(".sinks") else name, tensor))
            continue
        turned = tensor.transpose(1, 2) if turns and not bias else tensor
        if own.startswith("down"):
            found.append((f"{path}.experts.down_proj.{suffix}", turned))
            continue
        gate, up = (turned[:, 0::2], turned[:, 1::2]) if oss else turned.chunk(2, dim=1)
        found += [(f"{path}.experts.gate_proj.{suffix}", gate), (f"{path}.experts.up_proj.{suffix}", up)]
    return found


def _arch(name: str) -> Any:
    return next(arch for arch, words in gguf.MODEL_ARCH_NAMES.items() if words == name)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if value < 2**32 else writer.add_uint64)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _metadata(config: Any, name: str) -> dict[str, Any]:
    if name == "gemma4":
        config = copy.deepcopy(config)
        config.allow_global_per_layer_attribute_access = True
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    full = rope.get("full_attention", rope)
    eps = {key: getattr(config, key, None) for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")}
    eps |= {key: getattr(config, key, None) for key in ("norm_epsilon", "norm_eps")}
    width = (
        next(w for key in _WIDTHS if (w := getattr(config, key, None))) if name != "bloom" else 4 * config.hidden_size
    )
    said: dict[str, Any] = {
        "context_length": getattr(config, "max_position_embeddings", None) or 512,
        "embedding_length": config.hidden_size,
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": width,
        "attention.head_count": heads,
        "attention.head_count_kv": _groups(config, name),
        "rope.freq_base": float(full.get("rope_theta", 10000.0)),
        "attention.layer_norm_rms_epsilon" if eps["rms_norm_eps"] else "attention.layer_norm_epsilon": next(
            float(value) for value in eps.values() if value
        ),
        "rope.dimension_count": int(size * full.get("partial_rotary_factor", 1.0)),
    }
    if name not in ("falcon", "bloom", "gpt2"):
        said |= {"attention.key_length": size, "attention.value_length": size}
    if getattr(config, "sliding_window", None):
        said["attention.sliding_window"] = config.sliding_window
    if full.get("rope_type") in ("linear", "yarn"):
        said |= {"rope.scaling.type": full["rope_type"], "rope.scaling.factor": float(full["factor"])}
    if "original_max_position_embeddings" in full and full["rope_type"] != "llama3":
        said["rope.scaling.original_context_length"] = full["original_max_position_embeddings"]
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, key, None):
            said[key] = float(getattr(config, key))
    if name == "gemma3":
        said["attention.sliding_window_pattern"] = config.layer_types.index("full_attention") + 1
    if name == "lfm2":
        said["shortconv.l_cache"] = config.conv_L_cache
        kinds = config.layer_types
        said["attention.head_count_kv"] = [config.num_key_value_heads * (k == "full_attention") for k in kinds]
    if name == "gemma4":
        said |= _of_gemma4(config)
    if name == "llama4":
        said["interleave_moe_layer_step"] = config.interleave_moe_layer_step
    if name in ("qwen35", "qwen35moe"):
        said |= _of_states(config)
    said |= _of_experts(config, name)
    return {"general.name": "tiny"} | {f"{name}.{key}": value for key, value in said.items()}


def _of_gemma4(config: Any) -> dict[str, Any]:
    layers = [config.per_layer_config[i] for i in range(config.num_hidden_layers)]
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    whole, other = layers[slides.index(False)], layers[slides.index(True)]
    shared = [i >= len(layers) - config.num_kv_shared_layers for i in range(len(layers))]
    said = {
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "attention.sliding_window_pattern": slides,
        **{f"attention.{kind}_length": whole.head_dim for kind in ("key", "value")},
        **{f"attention.{kind}_length_swa": other.head_dim for kind in ("key", "value")},
        "attention.head_count_kv": [layer.num_key_value_heads for layer in layers],
        "rope.dimension_count": whole.head_dim,
        "rope.dimension_count_swa": other.head_dim,
        "rope.freq_base_swa": float(config.rope_parameters["sliding_attention"]["rope_theta"]),
    }
    if config.use_double_wide_mlp:
        said["feed_forward_length"] = [config.intermediate_size * (1 + own) for own in shared]
    return said


def _of_states(config: Any) -> dict[str, Any]:
    return {
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
        "full_attention_interval": config.layer_types.index("full_attention") + 1,
        "rope.dimension_sections": [2, 1, 1, 0],
    }


def _of_experts(config: Any, name: str) -> dict[str, Any]:
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if not count:
        return {}
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    said = {"expert_count": count, "expert_used_count": config.num_experts_per_tok, "expert_feed_forward_length": inner}
    if name == "llama4":
        said |= {"feed_forward_length": config.intermediate_size_mlp}
    if name in ("qwen2moe", "qwen35moe"):
        said["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    return said


def _groups(config: Any, name: str) -> int:
    if name == "falcon":
        return 1 if config.multi_query and not config.new_decoder_architecture else config.num_kv_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _stored(name: str, config: Any, found: str, hf_name: str, tensor: Tensor) -> Tensor:
    if name == "llama" and (".attn_q." in found or ".attn_k." in found):
        heads = config.num_attention_heads if ".attn_q." in found else config.num_key_value_heads
        return tensor.view(heads, 2, tensor.shape[0] // heads // 2, -1).transpose(1, 2).reshape(tensor.shape)
    if name.startswith("qwen35") and any(part in found for part in ("ssm_", "attn_gate", "attn_qkv")):
        return _of_linear_attention(config, found, tensor)
    if name in _NORMS_PLUS_ONE and found.endswith("norm.weight"):
        return tensor + 1
    if name == "gpt2" and hf_name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.t()
    if name in ("falcon", "bloom") and ".attn_qkv." in found:
        return _three(tensor, config.num_attention_heads, _groups(config, name))
    if "ffn_gate_inp_shexp" in found:
        return tensor.squeeze(0)
    return tensor.squeeze(1) if "shortconv.conv" in found else tensor


def _of_linear_attention(config: Any, found: str, tensor: Tensor) -> Tensor:
    """Heads of values by turns of the heads of keys; what is decayed by, as it is computed with."""
    keys, each = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads

    def by_turns(rows: Tensor) -> Tensor:
        heads = rows.reshape(keys, each, -1, *rows.shape[1:])
        return torch.stack([heads[k, e] for e in range(each) for k in range(keys)]).reshape(rows.shape)

    if "ssm_norm" in found:
        return tensor
    if "ssm_out" in found:
        return by_turns(tensor.t()).t()
    if "ssm_conv1d" in found or "attn_qkv" in found:
        before = 2 * keys * config.linear_key_head_dim
        tensor = tensor.flatten(1)
        return torch.cat([tensor[:before], by_turns(tensor[before:])])
    found_rows = by_turns(tensor)
    return -found_rows.exp() if found.endswith("ssm_a") else found_rows


def _three(tensor: Tensor, heads: int, groups: int) -> Tensor:
    """Queries of all heads, then keys, then values."""
    each = heads // groups
    size = tensor.shape[0] // (heads + 2 * groups)
    parts = tensor.view(groups, each + 2, size, -1)
    pieces = [parts[:, :each], parts[:, each], parts[:, each + 1]]
    return torch.cat([piece.reshape(-1, *tensor.shape[1:]) for piece in pieces])


def _add_rope_tensors(writer: Any, model: Any) -> None:
    rope = getattr(model.config, "rope_parameters", None) or {}
    if model.config.model_type == "gemma4_text":
        size = max(model.config.per_layer_config[i].head_dim for i in range(model.config.num_hidden_layers))
        turning = int(size * rope["full_attention"]["partial_rotary_factor"] / 2)
        factors = np.array([1.0] * turning + [1e30] * (size // 2 - turning), dtype=np.float32)
        writer.add_tensor("rope_freqs.weight", factors)
    if rope.get("rope_type") == "llama3":
        plain = rope["rope_theta"] ** (-torch.arange(0, model.config.head_dim, 2) / model.config.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32))
    for name in ("long", "short"):
        if f"{name}_factor" in rope:
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], dtype=np.float32))


def _tokens(directory: Path | None) -> dict[str, Any]:
    if directory is None:
        return {}
    said = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = said["model"]["vocab"]
    special = {token["content"]: token["id"] for token in said["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in said["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": special["<s>"],
        "tokenizer.ggml.eos_token_id": special["</s>"],
        "tokenizer.ggml.padding_token_id": special["<pad>"],
    }
