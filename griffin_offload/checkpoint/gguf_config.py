"""What transformers calls what the header of a GGUF file says: one entry for each architecture.

transformers has a mapping, too, and leaves out much that changes the logits: factors and scaling of rotary positions,
head sizes, the part of a head that turns, soft caps. All of these are taken over here, or the file is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from griffin_offload.checkpoint.gguf_blocks import numbers_of
from griffin_offload.checkpoint.gguf_file import GgufTensor
from griffin_offload.errors import CheckpointError, UnsupportedModel

_MISSING: Any = object()
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_MOST_FACTORS = 4096
# Layers of the models that divide by another size than their heads', as llama.cpp tells them: Gemma's with 27B.
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}
_GEMMA3_PATTERN, _GEMMA3_LOCAL_THETA = 6, 10_000.0


@dataclass(frozen=True)
class Described:
    """A model as its files describe it."""

    where: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        found = self.metadata.get("general.architecture")
        if not isinstance(found, str) or not found.isprintable():
            raise CheckpointError(f"{self.where} does not name its architecture (general.architecture)")
        return found

    def get(self, key: str, kinds: type | tuple[type, ...], default: object = _MISSING) -> Any:
        """The value of `key` behind the architecture's name. CheckpointError where it is of another kind, or absent
        without a default."""
        name = f"{self.architecture}.{key}"
        found = self.metadata.get(name, default)
        if found is _MISSING:
            raise CheckpointError(f"{self.where} does not say {name}: download or convert it again")
        if found is default:
            return default
        if isinstance(found, np.ndarray):
            found = self._of_all_layers(name, found)
        if not isinstance(found, kinds) or (isinstance(found, bool) and kinds is int):
            raise CheckpointError(f"{self.where} says {name} is {str(found)[:60]!r}")
        return found

    def _of_all_layers(self, name: str, values: Any) -> Any:
        distinct = np.unique(values)
        if len(distinct) != 1:
            raise UnsupportedModel(
                f"{self.where}: {name} differs between layers ({', '.join(map(str, distinct[:4]))}), which models of "
                f"{self.architecture} are not loaded with"
            )
        return distinct[0].item()

    def integer(self, key: str, default: object = _MISSING) -> Any:
        return self.get(key, int, default)

    def number(self, key: str, default: object = _MISSING) -> Any:
        return self.get(key, (int, float), default)

    def has(self, name: str) -> bool:
        return name in self.tensors

    def factors(self, name: str) -> list[float] | None:
        """The numbers of a small tensor of rotary factors; None where there is none."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        if len(tensor.shape) != 1 or tensor.shape[0] > _MOST_FACTORS or tensor.type.numbers != 1:
            raise CheckpointError(f"{self.where}: {name} is {tensor.type.name} {list(tensor.shape)}")
        with open(tensor.extent.path, "rb") as file:
            file.seek(tensor.extent.offset)
            content = bytearray(file.read(tensor.extent.nbytes))
        found: list[float] = numbers_of(torch.frombuffer(content, dtype=torch.uint8)[None], tensor.type)[0].tolist()
        if not all(0 < factor < 1e6 for factor in found):
            raise CheckpointError(f"{self.where}: {name} holds factors that are not above 0")
        return found


@dataclass(frozen=True)
class RowOrder:
    """Of a matrix whose rows llama.cpp keeps in another order, by the config."""

    count: Callable[[Mapping[str, Any]], int]
    """Rows that it has to have."""
    index: Callable[[Mapping[str, Any]], Tensor]
    """Which row of the file is each of the model's, int64."""

    def of(self, config: Mapping[str, Any], tensor: GgufTensor, where: Path) -> Tensor:
        """That of `tensor`. CheckpointError where it has other rows: a config may lie, and ask for any number."""
        wanted, there = self.count(config), tensor.shape[0]
        if wanted != there:
            raise CheckpointError(f"{where}: {tensor.name} has {there} rows, by its heads it should have {wanted}")
        return self.index(config)


@dataclass(frozen=True)
class Architecture:
    """How a file of an architecture becomes a model of transformers."""

    model_type: str
    names: str
    """The architecture's name in the package's tables of tensors."""
    extend: Callable[[Described, dict[str, Any]], None] = lambda described, config: None
    """Adds what is its own to a config."""
    norm_eps: str = "rms_norm_eps"
    rows: Mapping[str, RowOrder] = field(default_factory=dict)
    """By the tensor's name behind the layer's number and without .weight or .bias."""
    norms_minus_one: bool = False
    """Its norms are stored with 1 added."""
    transposed: tuple[str, ...] = ()
    """Ends of names in transformers, of matrices that lie there [inputs, outputs]."""
    rotary: bool = True
    attends_in_some: bool = False
    """Other layers have 0 heads of keys and values."""


def config_of(described: Described, mixtures: Mapping[str, Architecture]) -> tuple[Architecture, dict[str, Any]]:
    """The architecture, one of `mixtures` where there are experts, and what config.json would say. UnsupportedModel for
    an architecture that is not read, CheckpointError for a header that lacks something."""
    architecture = known(described, mixtures)
    config = _common(described, architecture)
    if architecture.rotary:
        config["rope_parameters"] = _rope(described, config)
    architecture.extend(described, config)
    return architecture, config


def known(described: Described, mixtures: Mapping[str, Architecture]) -> Architecture:
    name, where = described.architecture, described.where
    experts = described.metadata.get(f"{name}.expert_count", 0)
    if experts or any("_exps." in tensor for tensor in described.tensors):
        if name in mixtures:
            return mixtures[name]
        raise UnsupportedModel(
            f"{where} is a mixture of {experts or 'several'} experts of the architecture {name}, which is not read "
            f"from GGUF files: give the model's Hugging Face directory (read are {', '.join(sorted(mixtures))})"
        )
    if name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{where} is of the architecture {name}, which is not read from GGUF files: give the model's Hugging Face "
            f"directory (read are {', '.join(sorted(ARCHITECTURES))})"
        )
    return ARCHITECTURES[name]


def _common(described: Described, architecture: Architecture) -> dict[str, Any]:
    """What every architecture has, in the words that most configs of transformers understand."""
    embeddings = described.tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise CheckpointError(f"{described.where} has no matrix token_embd.weight: download it again")
    hidden, heads = described.integer("embedding_length"), described.integer("attention.head_count")
    if heads < 1 or hidden < 1:
        raise CheckpointError(f"{described.where} says that it has {heads} heads of a hidden size of {hidden}")
    eps = described.number("attention.layer_norm_rms_epsilon", None)
    config = {
        "model_type": architecture.model_type,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture.model_type]],
        "vocab_size": embeddings.shape[0],
        "hidden_size": hidden,
        "intermediate_size": _neurons(described),
        "num_hidden_layers": described.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(described, architecture, heads),
        "head_dim": described.integer("attention.key_length", hidden // heads),
        "max_position_embeddings": described.integer("context_length"),
        architecture.norm_eps: described.number("attention.layer_norm_epsilon", 1e-5) if eps is None else eps,
        "tie_word_embeddings": not described.has("output.weight"),
    }
    return config | {f"{name}_token_id": _token(described, key) for name, key in _TOKENS.items()}


def _neurons(described: Described) -> Any:
    of_experts = described.integer("expert_feed_forward_length", None)
    return described.integer("feed_forward_length", *([] if of_experts is None else [of_experts]))


def _kv_heads(described: Described, architecture: Architecture, heads: int) -> int:
    found = described.metadata.get(f"{described.architecture}.attention.head_count_kv")
    if architecture.attends_in_some and isinstance(found, np.ndarray) and found.size:
        return int(found.max())
    return int(described.integer("attention.head_count_kv", heads))


_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _token(described: Described, name: str) -> int | None:
    found = described.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return found if isinstance(found, int) and found < 2**31 else None


def _rope(described: Described, config: dict[str, object]) -> dict[str, Any]:
    """transformers' rope_parameters: base, scaling, and factors of single frequencies."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(described.number("rope.freq_base", 10_000.0))}
    turned = described.integer("rope.dimension_count", config["head_dim"])
    if turned < config["head_dim"]:
        rope["partial_rotary_factor"] = turned / config["head_dim"]
    return rope | _scaling(described, config)


def _scaling(described: Described, config: dict[str, Any]) -> dict[str, Any]:
    kind = described.get("rope.scaling.type", str, "none")
    factor = described.number("rope.scaling.factor", described.number("rope.scale_linear", 1.0))
    trained = described.integer("rope.scaling.original_context_length", None)
    attention = described.number("rope.scaling.attn_factor", None)
    single, long, short = (described.factors(name) for name in ROPE_TENSORS)
    found: dict[str, Any] = {} if attention is None else {"attention_factor": attention}
    if trained is not None:
        found["original_max_position_embeddings"] = trained
    if long is not None and short is not None:
        return found | {"rope_type": "longrope", "long_factor": long, "short_factor": short}
    if single is not None:  # Llama 3.1 and its like; no other kind of transformers' takes factors as they are
        if kind not in ("none", "linear") or factor != 1:
            raise UnsupportedModel(f"{described.where} scales rotary positions by {kind} and by single factors")
        most = config["max_position_embeddings"]
        alike = {"long_factor": single, "short_factor": single, "original_max_position_embeddings": most}
        return alike | {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0}
    if kind == "yarn":
        return found | {"rope_type": "yarn", "factor": factor}
    if kind in ("none", "linear"):
        return {"rope_type": "linear", "factor": factor} if factor != 1 and kind != "none" else {}
    raise UnsupportedModel(f"{described.where} scales rotary positions by {kind!r}, which is not read")


# Rows of matrices that llama.cpp keeps in another order.


def _pairs_apart(heads: str) -> RowOrder:
    """Of q and k: llama.cpp turns neighbours, transformers the halves of a head."""

    def count(config: Mapping[str, Any]) -> int:
        return int(config[heads] * 2 * (config["head_dim"] // 2))

    def index(config: Mapping[str, Any]) -> Tensor:
        rows = torch.arange(count(config), dtype=torch.int64, device="cpu")
        return rows.view(-1, config["head_dim"] // 2, 2).transpose(1, 2).reshape(-1)

    return RowOrder(count, index)


def _rows_of_qkv(config: Mapping[str, Any]) -> int:
    heads, groups = config["num_attention_heads"], config["num_kv_heads"]
    return int((heads + 2 * groups) * (config["hidden_size"] // heads))


def _grouped_qkv(config: Mapping[str, Any]) -> Tensor:
    """Queries, keys and values, each of all heads, back to heads in groups with the keys and values they share."""
    heads, groups = config["num_attention_heads"], config["num_kv_heads"]
    size = config["hidden_size"] // heads
    q = torch.arange(heads * size, dtype=torch.int64, device="cpu")
    kv = torch.arange(groups * size, dtype=torch.int64, device="cpu").view(groups, -1)
    keys, values = kv + heads * size, kv + (heads + groups) * size
    return torch.cat([q.view(groups, -1), keys, values], dim=1).reshape(-1)


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
    _window(described, config)
    config["attn_logit_softcapping"] = described.number("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = described.number("final_logit_softcapping", 30.0)
    _query_scale(described, config)


def _gemma3(described: Described, config: dict[str, Any]) -> None:
    _window(described, config)
    config["final_logit_softcapping"] = described.number("final_logit_softcapping", None)
    _query_scale(described, config)
    every = described.integer("attention.sliding_window_pattern", _GEMMA3_PATTERN)
    layers = range(min(config["num_hidden_layers"], 2**16))
    config["layer_types"] = [
        "sliding_attention" if every and (layer + 1) % every else "full_attention" for layer in layers
    ]
    local = described.number("rope.freq_base_swa", _GEMMA3_LOCAL_THETA)
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


_QKV_ROWS = RowOrder(_rows_of_qkv, _grouped_qkv)
LLAMA_ROWS = {"attn_q": _pairs_apart("num_attention_heads"), "attn_k": _pairs_apart("num_key_value_heads")}
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


ARCHITECTURES = {
    "llama": Architecture("llama", "llama", _biases, rows=LLAMA_ROWS),
    "qwen2": Architecture("qwen2", "qwen2"),
    "qwen3": Architecture("qwen3", "qwen3", _qwen3),
    "phi3": Architecture("phi3", "phi3", _phi3),
    "gemma": Architecture("gemma", "gemma", norms_minus_one=True),
    "gemma2": Architecture("gemma2", "gemma2", _gemma2, norms_minus_one=True),
    "gemma3": Architecture("gemma3_text", "gemma3", _gemma3, norms_minus_one=True),
    "stablelm": Architecture("stablelm", "stablelm", _stablelm, "layer_norm_eps"),
    "starcoder2": Architecture("starcoder2", "starcoder2", _starcoder2, "norm_epsilon"),
    "nemotron": Architecture("nemotron", "nemotron", _nemotron, "norm_eps", norms_minus_one=True),
    "falcon": Architecture("falcon", "falcon", _falcon, "layer_norm_epsilon", {"attn_qkv": _QKV_ROWS}),
    "gpt2": Architecture("gpt2", "gpt2", _gpt2, "layer_norm_epsilon", transposed=_CONV1D, rotary=False),
    "bloom": Architecture("bloom", "bloom", _bloom, "layer_norm_epsilon", {"attn_qkv": _QKV_ROWS}, rotary=False),
    "lfm2": Architecture("lfm2", "lfm2", _lfm2, attends_in_some=True),
}
"""By the name in general.architecture."""
