"""Mixtures of experts in GGUF files: what their configs add, and how an expert is made of its blocks.

A file has gate, up and down of all experts of a layer in a tensor each, [E, outputs, inputs]; transformers has gate and
up in one, above each other or (gpt-oss) row by row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from griffin_offload.checkpoint.base import StoredTensor
from griffin_offload.checkpoint.decoding import EachExpert
from griffin_offload.checkpoint.direct_io import Extent
from griffin_offload.checkpoint.gguf_blocks import BlockDecoder
from griffin_offload.checkpoint.gguf_config import LLAMA_ROWS, Architecture, Described
from griffin_offload.checkpoint.gguf_file import GgufTensor
from griffin_offload.errors import CheckpointError

# Of transformers' module of experts, by the parameter's name.
_MADE_OF = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}
_ROUTED = ".experts."
_INTERLEAVED = ("gpt_oss",)


def sources_of(name: str) -> tuple[str, ...]:
    """What of a layer in the file makes the model's tensor `name`, without "blk.N."; none for one that is not of all
    experts."""
    own = name.rpartition(_ROUTED)[2] if _ROUTED in name else ""
    bias = own.endswith("_bias")
    ends = "bias" if bias else "weight"
    return tuple(f"{source}.{ends}" for source in _MADE_OF.get(own.removesuffix("_bias"), ()))


def stored_experts(tensors: Sequence[GgufTensor], model_type: str, dtype: torch.dtype, where: Any) -> StoredTensor:
    """The experts of a layer out of the file's tensors of them, or their biases. CheckpointError where these do not go
    together."""
    shape = tensors[0].shape
    if len(shape) not in (2, 3) or any(tensor.shape != shape for tensor in tensors):
        found = " and ".join(str(list(tensor.shape)) for tensor in tensors)
        raise CheckpointError(f"{where}: {tensors[0].name} and what belongs to it are {found}, they have to be alike")
    packed = [tensor for tensor in tensors if len(shape) == 2 and tensor.type.numbers != 1]
    if packed:
        raise CheckpointError(f"{where}: {packed[0].name} holds biases in blocks of {packed[0].type.name}")
    experts, rows, width = (*shape, 1)[:3]
    parts = tuple(_extent(tensor, expert) for expert in range(experts) for tensor in tensors)
    decoders = tuple(BlockDecoder(tensor.type, rows, width) for tensor in tensors)
    decode = EachExpert(_Together(decoders, model_type in _INTERLEAVED), len(tensors))
    made = (experts, rows * len(tensors), *shape[2:])
    return StoredTensor(made, dtype, parts, decode=decode, of_experts=True)


def _extent(tensor: GgufTensor, expert: int) -> Extent:
    whole, size = tensor.extent, tensor.extent.nbytes // tensor.shape[0]
    return Extent(whole.path, whole.offset + expert * size, size)


@dataclass(frozen=True)
class _Together:
    """One matrix of several, above each other or row by row: all of it at once."""

    decoders: tuple[BlockDecoder, ...]
    interleaved: bool

    def __call__(self, parts: Sequence[Tensor], first: int, end: int, into: Tensor) -> None:
        count, rows = len(self.decoders), self.decoders[0].rows
        assert (first, end) == (0, count * rows), "an expert is made as a whole"
        for place, (decode, part) in enumerate(zip(self.decoders, parts, strict=True)):
            target = into[place::count] if self.interleaved else into[place * rows : (place + 1) * rows]
            made = torch.empty(target.shape, dtype=into.dtype, device="cpu") if self.interleaved else target
            decode([part], 0, rows, made)
            if self.interleaved:
                target.copy_(made)


# What single architectures add.


def _experts(described: Described, config: dict[str, Any], count: str) -> None:
    config[count] = described.integer("expert_count")
    config["num_experts_per_tok"] = described.integer("expert_used_count")


def _inner(described: Described, config: dict[str, Any], key: str) -> None:
    config[key] = described.integer("expert_feed_forward_length", config["intermediate_size"])


def _mixtral(described: Described, config: dict[str, Any]) -> None:
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


def _gpt_oss(described: Described, config: dict[str, Any]) -> None:
    _experts(described, config, "num_local_experts")
    _inner(described, config, "intermediate_size")
    config["sliding_window"] = described.integer("attention.sliding_window")
    layers = range(min(config["num_hidden_layers"], 2**16))
    config["layer_types"] = ["full_attention" if layer % 2 else "sliding_attention" for layer in layers]
    config["attention_bias"] = described.has("blk.0.attn_q.bias")
    rope = config["rope_parameters"]
    if rope["rope_type"] == "yarn":
        rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}


MIXTURES: Mapping[str, Architecture] = {
    "llama": Architecture("mixtral", "llama", _mixtral, rows=LLAMA_ROWS),
    "qwen2moe": Architecture("qwen2_moe", "qwen2moe", _qwen2_moe),
    "qwen3moe": Architecture("qwen3_moe", "qwen3moe", _qwen3_moe),
    "gpt-oss": Architecture("gpt_oss", "gpt-oss", _gpt_oss),
}
"""By the name in general.architecture, of files that have experts."""
