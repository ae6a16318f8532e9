"""Which matrices of a layer are small, of models as they are published."""

import pytest
import torch
import transformers as hf

from griffin_offload.blocks.layouts import build_on_meta, find_feed_forwards
from griffin_offload.blocks.model_shape import model_shape
from griffin_offload.blocks.replace import outside_names, small_names
from griffin_offload.formats import SMALL_MATRICES, get

KEYS_AND_VALUES = frozenset({"self_attn.k_proj", "self_attn.v_proj"})


def _sizes(hidden: int, heads: int, kv_heads: int, neurons: int) -> dict[str, int]:
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return {
        **sizes,
        "intermediate_size": neurons,
        "num_hidden_layers": 1,
        "vocab_size": 64,
        "head_dim": hidden // heads,
    }


PUBLISHED: dict[str, tuple[hf.PreTrainedConfig, frozenset[str]]] = {
    "Llama 2 7B": (hf.LlamaConfig(**_sizes(4096, 32, 32, 11008)), frozenset()),
    "Llama 2 13B": (hf.LlamaConfig(**_sizes(5120, 40, 40, 13824)), frozenset()),
    "Llama 3 8B": (hf.LlamaConfig(**_sizes(4096, 32, 8, 14336)), KEYS_AND_VALUES),
    "SmolLM2 135M": (hf.LlamaConfig(**_sizes(576, 9, 3, 1536)), KEYS_AND_VALUES),
    "Gemma 3 270M": (hf.Gemma3TextConfig(**{**_sizes(640, 4, 1, 2048), "head_dim": 256}), KEYS_AND_VALUES),
    "Gemma 2 2B": (hf.Gemma2Config(**{**_sizes(2304, 8, 4, 9216), "head_dim": 256}), KEYS_AND_VALUES),
    "Mixtral 8x7B": (hf.MixtralConfig(**_sizes(4096, 32, 8, 14336)), KEYS_AND_VALUES),
    "Phi 3 mini, fused": (hf.Phi3Config(**{**_sizes(3072, 32, 32, 8192), "pad_token_id": 0}), frozenset()),
    "GPT-2": (hf.GPT2Config(n_layer=1, vocab_size=64), frozenset()),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_values_of_grouped_queries(name: str):
    config, expected = PUBLISHED[name]
    model = build_on_meta(config, torch.bfloat16)
    decoder, blocks = find_feed_forwards(model, 1)
    assert small_names(decoder[0], blocks[0]) == expected
    int4, mixed = (model_shape(model, get("int4"), finer=finer) for finer in (None, SMALL_MATRICES))
    assert (mixed.finer is SMALL_MATRICES) == bool(expected)
    assert (mixed.finer is None) == (mixed == int4)
    # 8 bits and a scale for each row, in place of 4 and two bytes for 32, and that scale.
    numbers = sum(decoder[0].get_submodule(name).weight.numel() for name in expected)
    assert mixed.layers[0].attention_bytes - int4.layers[0].attention_bytes == numbers * (1 - 4.5 / 8)
    read = blocks[0].read_numbers + sum(
        decoder[0].get_submodule(name).weight.numel() for name in outside_names(decoder[0], blocks[0])
    )
    assert numbers <= read / 16
