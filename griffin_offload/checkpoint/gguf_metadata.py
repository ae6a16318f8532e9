"""What the header of a GGUF file says of a model and its tokenizer, in llama.cpp's words: `gguf_config.py` and
`gguf_tokenizer.py` the other way round."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from griffin_offload.checkpoint.base import Checkpoint
from griffin_offload.checkpoint.gguf import GgufCheckpoint
from griffin_offload.checkpoint.gguf_architectures import ARCHITECTURES, MIXTURES
from griffin_offload.checkpoint.gguf_blocks import block_types, gguf_package
from griffin_offload.checkpoint.gguf_config import Architecture
from griffin_offload.checkpoint.gguf_file import read_gguf
from griffin_offload.checkpoint.gguf_tokenizer import CUTS, merges_whole_words, tokenizer_from
from griffin_offload.errors import UnsupportedModel
from griffin_offload.transformers_api import StockModel, Tokenizer

Metadata = dict[str, Any]
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# What a config has beside what is computed.
_OF_NO_MATTER = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "initializer_range", "use_cache"),
    *("_name_or_path", "model_type", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp"),
    *("chunk_size_feed_forward", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    *("embedding_dropout", "residual_dropout", "classifier_dropout", "id2label", "label2id", "is_encoder_decoder"),
    *("return_dict", "output_attentions", "output_hidden_states", "problem_type", "num_labels", "tokenizer_class"),
    "rope_parameters",
}
_PROBE = (
    "The quick brown fox's 12345 jumps, they'LL say: \"it's 3.14159!\"\n\n  def f(x):\n\treturn x**2 != 10000\r\n"
    "Gr\u00fc\u00dfe aus K\u00f6ln, \u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439 \u4f60\u597d "
    "\u3053\u3093\u306b\u3061\u306f \U0001f600\U0001f680   three   spaces 1 22 333 4444 HTTPServer camelCase #hash/"
)  # fmt: skip


def add_key(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


# What a config says, in llama.cpp's words.


def architecture_of(config: PretrainedConfig, where: Path) -> tuple[str, Architecture]:
    kind = config.model_type
    if kind == "mistral" and config.sliding_window is None:
        kind = "llama"  # the same model, and how llama.cpp has it
    written = [own for own in (*ARCHITECTURES.items(), *MIXTURES.items()) if own[1].written]
    for name, architecture in written:
        if architecture.model_type == kind:
            return name, architecture
    known = ", ".join(sorted(architecture.model_type for _, architecture in written))
    raise UnsupportedModel(f"{where}: {kind} is not written as GGUF (written are {known}): leave --to out")


def metadata_of(config: PretrainedConfig, arch: str, neurons: int) -> Metadata:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    full = rope.get("full_attention", rope)
    eps = next((key for key in _EPS if getattr(config, key, None) is not None), None)
    rms = "attention.layer_norm_rms_epsilon" if eps in ("rms_norm_eps", "norm_eps") else "attention.layer_norm_epsilon"
    rms = "attention.layer_norm_epsilon" if arch == "nemotron" else rms
    said: Metadata = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": neurons,
        "attention.head_count": heads,
        "attention.head_count_kv": _kv_heads(config, heads),
        "attention.key_length": size,
        "attention.value_length": size,
        rms: float(getattr(config, eps or "rms_norm_eps")),
    }
    if full:
        turned = full.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
        said |= {"rope.freq_base": float(full["rope_theta"]), "rope.dimension_count": int(size * turned)}
        said |= _scaling(full)
    if getattr(config, "sliding_window", None):
        said["attention.sliding_window"] = config.sliding_window
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, key, None):
            said[key] = float(getattr(config, key))
    if arch == "gemma3":
        kinds = config.layer_types
        every = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
        said["attention.sliding_window_pattern"] = every
        said["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
    if arch == "lfm2":
        said["shortconv.l_cache"] = config.conv_L_cache
        said["attention.head_count_kv"] = [
            config.num_key_value_heads * (kind == "full_attention") for kind in config.layer_types
        ]
    return said | _of_experts(config)


def _of_experts(config: PretrainedConfig) -> Metadata:
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if not count:
        return {}
    shared = getattr(config, "shared_expert_intermediate_size", None)
    return {
        "feed_forward_length": config.intermediate_size,
        "expert_count": count,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
    } | ({} if shared is None else {"expert_shared_feed_forward_length": shared})


_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")


def _kv_heads(config: PretrainedConfig, heads: int) -> int:
    if config.model_type == "falcon":
        return 1 if config.multi_query and not config.new_decoder_architecture else int(config.num_kv_heads)
    return int(getattr(config, "num_key_value_heads", None) or heads)


def _scaling(rope: Mapping[str, Any]) -> Metadata:
    kind, said = rope.get("rope_type", "default"), Metadata()
    if kind in ("linear", "yarn"):
        said = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind in ("yarn", "longrope") and rope.get("original_max_position_embeddings"):
        said["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if kind == "longrope" and rope.get("attention_factor") is not None:
        said["rope.scaling.attn_factor"] = float(rope["attention_factor"])
    return said


def rope_tensors(model: StockModel) -> dict[str, Tensor]:
    """Factors of single frequencies."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, config)}
    names = {name: f"rope_factors_{name}.weight" for name in ("long", "short")}
    given = {there: rope[f"{name}_factor"] for name, there in names.items() if f"{name}_factor" in rope}
    return {name: torch.tensor(factors, dtype=torch.float32, device="cpu") for name, factors in given.items()}


def _llama3_factors(rope: Mapping[str, Any], config: PretrainedConfig) -> Tensor:
    """By what each frequency [D/2] is divided: short waves stay, long ones are stretched, between them it blends."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    places = torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size
    turns = rope["original_max_position_embeddings"] / (2 * torch.pi * rope["rope_theta"] ** places)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    found: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return found.float()


def check_same(found: PretrainedConfig, wanted: object, where: Path) -> None:
    """UnsupportedModel where a file says another model than `wanted`."""
    new = getattr(wanted, "new_decoder_architecture", None)
    unused = set() if new is None else {"multi_query" if new else "num_kv_heads"}
    for key in sorted(set(found.to_dict()) - _OF_NO_MATTER - unused):
        value, there = getattr(wanted, key, None), getattr(found, key, None)
        unsaid = key == "head_dim" and value is None and there == found.hidden_size // found.num_attention_heads
        if not (unsaid or _alike(value, there)):
            raise UnsupportedModel(
                f"{where}: a GGUF file cannot say that {key} is {str(value)[:60]} (it would be {str(there)[:60]})"
            )
    rope, there = (getattr(config, "rope_parameters", None) or {} for config in (wanted, found))
    if rope.get("rope_type") != "llama3" and not _alike(rope, there):
        raise UnsupportedModel(f"{where}: a GGUF file cannot say that rope_parameters is {str(rope)[:120]}")


def _alike(one: object, other: object) -> bool:
    """Values of configs: float32 in files, and what is off may be missing."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return all(_alike(one.get(key), other.get(key)) for key in {*one, *other})
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float | int) and isinstance(other, float | int):
        return abs(one - other) <= 1e-6 * max(abs(one), abs(other))
    return one == other or (not one and not other)


# The tokenizer.


def tokenizer_of(checkpoint: Checkpoint, model: StockModel) -> Metadata:
    """The keys tokenizer.*; none for a checkpoint without one. UnsupportedModel where llama.cpp would make other tokens
    of a text."""
    if isinstance(checkpoint, GgufCheckpoint):
        header = checkpoint.headers[0]
        there = {key: value for key, value in header.metadata.items() if key.startswith("tokenizer.")}
        return {key: header.texts(key) or _plain(value) for key, value in there.items()}
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        return {}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = {} if backend is None else json.loads(backend.to_str())
    inner = said.get("model", {})
    if inner.get("type") != "BPE":
        raise UnsupportedModel(f"{checkpoint.directory}: only tokenizers of the kind BPE are written as GGUF")
    keys = _words(said, model.config.vocab_size) | _special(tokenizer, model)
    pieces = bool(inner.get("byte_fallback"))
    merges = [_merge(pair) for pair in inner["merges"]]
    keys |= _scores(merges, keys) if pieces else {"tokenizer.ggml.merges": merges}
    keys["tokenizer.ggml.model"] = "llama" if pieces else "gpt2"
    key = "tokenizer.ggml.add_space_prefix" if pieces else "tokenizer.ggml.pre"
    return keys | {key: _first_alike(tokenizer, keys, key, model, checkpoint.directory)}


def _plain(value: object) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _merge(pair: str | Sequence[str]) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _words(said: Mapping[str, Any], size: int) -> Metadata:
    """Every word and its kind; places that have none are filled."""
    vocabulary, added = said["model"]["vocab"], {token["id"]: token for token in said["added_tokens"]}
    words = {place: word for word, place in vocabulary.items()} | {i: token["content"] for i, token in added.items()}
    unknown, fallback = said["model"].get("unk_token"), said["model"].get("byte_fallback")

    def kind(place: int) -> int:
        if place not in words:
            return _UNUSED
        word = words[place]
        if word == unknown:
            return _UNKNOWN
        if fallback and len(word) == 6 and word.startswith("<0x"):
            return _BYTE
        return _NORMAL if place not in added else _CONTROL if added[place]["special"] else _USER_DEFINED

    places = range(max(size, max(words) + 1))
    return {
        "tokenizer.ggml.tokens": [words.get(place, f"[PAD{place}]") for place in places][:size],
        "tokenizer.ggml.token_type": [kind(place) for place in places][:size],
    }


def _special(tokenizer: Tokenizer, model: StockModel) -> Metadata:
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    found = {key: getattr(tokenizer, f"{name}_token_id") for key, name in names.items()}
    ends = model.generation_config.eos_token_id
    others = [i for i in ([ends] if isinstance(ends, int) else ends or []) if i != found["eos"]]
    found |= dict(zip(("eot", "eom"), others, strict=False))
    said: Metadata = {f"tokenizer.ggml.{key}_token_id": i for key, i in found.items() if i is not None}
    begins = tokenizer.encode("a")
    said["tokenizer.ggml.add_bos_token"] = bool(begins) and begins[0] == found["bos"]
    said["tokenizer.ggml.add_eos_token"] = bool(begins) and len(begins) > 1 and begins[-1] == found["eos"]
    template = tokenizer.chat_template
    return said | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


def _scores(merges: Sequence[str], keys: Metadata) -> Metadata:
    """Of each word the place of the first pair that makes it: the earlier, the better."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair.split(" ")), rank)
    tokens = keys["tokenizer.ggml.tokens"]
    return {"tokenizer.ggml.scores": [-float(ranks.get(token, len(ranks))) for token in tokens]}


def _first_alike(tokenizer: Tokenizer, keys: Metadata, key: str, model: StockModel, where: Path) -> Any:
    """The rule with which a text becomes the same tokens; UnsupportedModel where none does."""
    pieces = key.endswith("add_space_prefix")
    rules: Sequence[Any] = (True, False) if pieces else list(dict.fromkeys(_rules().values()))
    expected = tokenizer.encode(_PROBE)
    with TemporaryDirectory() as place:
        path = Path(place) / "tokenizer.gguf"
        writer = gguf_package().GGUFWriter(path, model.config.model_type, use_temp_file=False)
        for name, value in keys.items():
            add_key(writer, name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        header = read_gguf(path, block_types())
        for rule in rules:
            made = tokenizer_from(replace(header, metadata=header.metadata | {key: rule}), path)
            if made.encode(_PROBE) == expected:
                return rule
    raise UnsupportedModel(f"{where}: texts become other tokens by each of llama.cpp's rules that are known here")


def _rules() -> dict[Any, str]:
    """A name in llama.cpp for each way to cut texts."""
    found: dict[Any, str] = {}
    for name, cuts in CUTS.items():
        found.setdefault((cuts, merges_whole_words(name)), name)
    return found
