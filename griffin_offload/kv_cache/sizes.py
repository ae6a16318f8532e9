"""Bytes of the KV cache: ours, allocated for the whole context before prefill, and transformers' own kinds."""

from dataclasses import dataclass

from griffin_offload.blocks.sizes import LayerSizes, ModelSizes
from griffin_offload.config import CacheKind, KVBits
from griffin_offload.kv_cache.kv_cache import kv_tokens_kept
from griffin_offload.kv_cache.store import piece_bytes


@dataclass(frozen=True)
class Workload:
    """One use of a planned model: what the KV cache and the workspace depend on."""

    batch: int
    prompt_tokens: int
    ctx_tokens: int
    cache: CacheKind = "ours"
    """Allocated for the whole context before decode ("ours", "static"), or growing with every token ("dynamic")."""
    drafts: int = 0
    """Tokens of prompt lookup that are in the KV cache behind the context before they are rolled back."""
    logit_positions: int = 1
    """Positions per sequence whose logits exist at once: drafts of prompt lookup, all of them in a bare forward."""
    past_tokens: int = 0
    """Tokens of the prompt that are in the KV cache already."""
    pass_tokens: int = 0
    """Tokens of a streamed pass between two tokens of the answer; 0: none."""
    statistics: int = 0
    """Tables of s^2, float32 for every neuron of the streamed layers, that outlive a pass."""
    marks: int = 0
    """Earlier states of a conversation that are kept: a table, what it selected, and logits."""
    kept_scores: int = 0
    """float32 scores that are kept for the caller (output_scores, output_logits), per sequence."""

    @property
    def cache_tokens(self) -> int:
        """Tokens that our KV cache is made for."""
        return self.ctx_tokens + self.drafts


def kv_bytes(shape: ModelSizes, batch: int, ctx_tokens: int, bits: KVBits = 16) -> int:
    """Bytes of our KV cache, exactly; its scratch with 8 bits is in `kv_workspace_bytes`."""
    return batch * sum(
        _token_bytes(shape, layer, bits) * kv_tokens_kept(layer.window, ctx_tokens) for layer in shape.layers
    )


def _token_bytes(shape: ModelSizes, layer: LayerSizes, bits: KVBits = 16) -> int:
    """Bytes of one token in the KV cache of `layer`."""
    width, scales = shape.kv_width_of(layer), 2 * shape.kv_heads_of(layer) * shape.item_bytes
    return width + scales if bits == 8 else width * shape.item_bytes


def kv_workspace_bytes(shape: ModelSizes, batch: int, ctx_tokens: int, bits: KVBits, decoding: bool) -> int:
    """What our KV cache makes beside itself: a piece of keys that is quantised or moved, and with 8 bits in decode, the
    scratch, which is one layer's keys and values."""
    piece = piece_bytes(batch * shape.kv_width // 2, shape.item_bytes, ctx_tokens, bits, moves=decoding)
    largest = max(kv_tokens_kept(layer.window, ctx_tokens) for layer in shape.layers)
    scratch = batch * shape.kv_width * largest * shape.item_bytes if bits == 8 and decoding else 0
    return piece + scratch


def _stock_kv_bytes(shape: ModelSizes, use: Workload, tokens: int) -> int:
    """Bytes of a KV cache of transformers' when `tokens` have passed. Layers with a window keep that many, but a
    growing one keeps the whole prompt of such a layer alive until its first decode step."""
    at_least = min(tokens, use.prompt_tokens) if use.cache == "dynamic" else 0
    return use.batch * sum(
        _token_bytes(shape, layer) * (tokens if layer.window is None else max(min(tokens, layer.window), at_least))
        for layer in shape.layers
    )


def cache_parts(shape: ModelSizes, use: Workload, bits: KVBits, decoding: bool) -> tuple[int, int]:
    """(bytes of the KV cache, bytes of workspace it needs) at the end of prefill, or of decode."""
    if use.cache == "ours":
        beside = kv_workspace_bytes(shape, use.batch, use.cache_tokens, bits, decoding)
        return kv_bytes(shape, use.batch, use.cache_tokens, bits), beside
    whole = decoding or use.cache == "static"
    # A dynamic cache grows by copying: one layer's keys exist twice for a moment.
    copied = use.batch * shape.kv_width * shape.item_bytes * use.ctx_tokens // 2 if decoding else 0
    return _stock_kv_bytes(shape, use, use.ctx_tokens if whole else use.prompt_tokens), copied
