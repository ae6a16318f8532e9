"""16-bit attention of one token on CPUs without 16-bit instructions.

There torch's kernel emulates every product, and takes two to three times as long as in float32 with keys and values
translated before (benchmarks/NOTES.md). So a few heads at a time are translated, and stock attention multiplies those.
Scores are in float32 either way; results are rounded once. Of several tokens it is as fast as it is.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from griffin_offload.pricing import ATTENTION_GROUP_NUMBERS

_NAME, _STOCK = "griffin_offload_float32", "sdpa"
_HALVES = (torch.bfloat16, torch.float16)


def translate_attention(model: Any) -> None:
    """Make the attention of a model multiply in float32, if it is torch's own, found by transformers' interface; others
    stay as they are."""
    if model.config._attn_implementation != _STOCK or not model._supports_attention_backend:
        return
    AttentionInterface.register(_NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS[_STOCK])
    model.set_attn_implementation(_NAME)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward`: query [B, heads, T, D], key and value [B, kv heads, S, D] to [B, T, heads, D]."""
    if query.shape[2] > 1 or query.dtype not in _HALVES or kwargs.get("position_bias") is not None:
        stock: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return stock
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    heads, shared = key.shape[1], query.shape[1] // key.shape[1]
    output = query.new_empty(query.shape[0], 1, query.shape[1], value.shape[3])
    step = max(ATTENTION_GROUP_NUMBERS * heads // (2 * query.numel() + key.numel() + value.numel()), 1)
    for start in range(0, heads, step):
        some, queries = slice(start, start + step), slice(start * shared, (start + step) * shared)
        mask = attention_mask
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, queries]
        part, _ = sdpa_attention_forward(
            module, query[:, queries].float(), key[:, some].float(), value[:, some].float(), mask, **kwargs
        )
        output[:, :, queries] = part
    return output, None
