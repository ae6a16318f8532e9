"""Attention of one token on the CPU: our kernel in place of torch's, for models that take theirs from transformers."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from griffin_offload.kernels import attention

_NAME, _STOCK = "griffin_offload_one_token", "sdpa"


def use_own_attention(model: Any) -> None:
    """Let our kernel attend for single tokens where a model's attention is torch's, found by transformers' interface;
    others stay as they are."""
    if model.config._attn_implementation != _STOCK or not model._supports_attention_backend:
        return
    AttentionInterface.register(_NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS[_STOCK])
    model.set_attn_implementation(_NAME)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward`: query [B, heads, T, D], key and value [B, kv heads, S, D] to [B, T, heads, D]."""
    # Each changes what is computed, or is refused by the stock function.
    plain = not any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    plain = plain and not kwargs.get("dropout")
    if not (plain and attention.can_attend(query, key, value)):
        stock: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return stock
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention.attend(query, key, value, attention_mask, scaling), None
