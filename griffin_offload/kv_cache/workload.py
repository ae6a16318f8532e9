"""How many bytes the KV cache takes: ours, allocated for the whole context before prefill, and transformers' own kinds,
for a whole model and use.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from griffin_offload.config import CacheKind, KVBits
from griffin_offload.kv_cache.store import KV_GROUP, PIECE_TOKENS, STORES

KV_SLACK_TOKENS = 64
"""A layer with a window has room for so many tokens more: they are moved seldom, and some can be rolled back."""
_FLOAT_BYTES = 4


def piece_bytes(numbers: int, item_bytes: int, tokens: int, bits: KVBits, *, moves: bool) -> int:
    """What is made beside a store of `tokens` of so many numbers: a piece that is quantised, as two float32 copies, and
    with 4 bits its codes before and after two are put into a byte, or one that is moved."""
    number_bytes = {16: item_bytes * moves, 8: 2 * _FLOAT_BYTES, 4: 2 * _FLOAT_BYTES + 2}[bits]
    return numbers * min(tokens, PIECE_TOKENS) * number_bytes


def kv_tokens_kept(window: int | None, ctx_tokens: int) -> int:
    """Tokens that a layer has room for."""
    return ctx_tokens if window is None else min(ctx_tokens, window - 1 + KV_SLACK_TOKENS)


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
    reserved_tokens: int = 0
    """Tokens that our KV cache has room for at least."""
    together: int = 1
    """Uses that are decoded in one step, this one among them; the others' KV caches are none of its own."""

    prompts: int = 1
    """Prompts of uses like this one that pass behind each other in one forward: `prompt_tokens` are all of theirs."""

    @property
    def cache_tokens(self) -> int:
        """Tokens that our KV cache is made for."""
        return max(self.ctx_tokens + self.drafts, self.reserved_tokens)

    def among(self, passing: Sequence["Workload"], decoding: int) -> "Workload":
        """This use, whose prompt passes together with those of `passing`, beside so many that are decoded."""
        prompt_tokens = self.prompt_tokens + sum(other.prompt_tokens for other in passing)
        prompts = 1 + len(passing)
        return replace(self, prompt_tokens=prompt_tokens, prompts=prompts, together=prompts + decoding)


class LayerKV(Protocol):
    """What of a layer's sizes (`LayerSizes`) its KV cache depends on."""

    @property
    def window(self) -> int | None: ...
    @property
    def kv_width(self) -> int | None: ...
    @property
    def key_width(self) -> int | None: ...
    @property
    def kv_heads(self) -> int | None: ...
    @property
    def states(self) -> Sequence[Any]: ...


class ModelKV(Protocol):
    """And of a model's (`ModelSizes`), whose width and heads are those of layers without their own."""

    @property
    def layers(self) -> Sequence[LayerKV]: ...
    @property
    def item_bytes(self) -> int: ...
    @property
    def kv_width(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...


def width_of(shape: ModelKV, layer: LayerKV) -> int:
    """Numbers per token in the keys and values of `layer`."""
    return shape.kv_width if layer.kv_width is None else layer.kv_width


def kv_bytes(shape: ModelKV, batch: int, ctx_tokens: int, bits: KVBits = 16) -> int:
    """Bytes of our KV cache, exactly; its scratch with fewer than 16 bits is in `kv_workspace_bytes`."""
    return batch * sum(
        _layer_bytes(shape, layer, kv_tokens_kept(layer.window, ctx_tokens), bits) for layer in shape.layers
    )


def _layer_bytes(shape: ModelKV, layer: LayerKV, tokens: int, bits: KVBits = 16) -> int:
    """Bytes of so many tokens in the KV cache of `layer`."""
    width, heads = width_of(shape, layer), shape.kv_heads if layer.kv_heads is None else layer.kv_heads
    if bits == 16 or not heads:
        return width * tokens * shape.item_bytes
    keys = width // 2 if layer.key_width is None else layer.key_width
    parts = [store.shapes(own // heads, tokens) for store, own in zip(STORES[bits], (keys, width - keys), strict=True)]
    codes = sum(rows * numbers for (rows, numbers), *_ in parts)
    beside = sum(rows * numbers for _, *more in parts for rows, numbers in more)
    return int(heads * (codes + beside * shape.item_bytes))


def halves_again(shape: ModelKV) -> bool:
    """Whether all heads can be kept in 4 bits."""
    heads = [(width_of(shape, layer), layer.kv_heads or shape.kv_heads) for layer in shape.layers]
    return all(count and width % (4 * count) == 0 for width, count in heads if width)


def kv_workspace_bytes(shape: ModelKV, batch: int, ctx_tokens: int, bits: KVBits, decoding: bool) -> int:
    """What our KV cache makes beside itself: a piece of keys that is quantised or moved, and with fewer than 16 bits in
    decode, the scratch, which is one layer's keys and values, with 4 bits in whole groups."""
    piece = piece_bytes(batch * shape.kv_width // 2, shape.item_bytes, ctx_tokens, bits, moves=decoding)
    largest = max(kv_tokens_kept(layer.window, ctx_tokens) for layer in shape.layers)
    largest = -(-largest // KV_GROUP) * KV_GROUP if bits == 4 else largest
    scratch = batch * shape.kv_width * largest * shape.item_bytes if bits != 16 and decoding else 0
    return piece + scratch


def _stock_kv_bytes(shape: ModelKV, use: Workload, tokens: int) -> int:
    """Bytes of a KV cache of transformers' when `tokens` have passed. Layers with a window keep that many, but a
    growing one keeps the whole prompt of such a layer alive until its first decode step."""
    at_least = min(tokens, use.prompt_tokens) if use.cache == "dynamic" else 0
    return use.batch * sum(
        _layer_bytes(shape, layer, tokens if layer.window is None else max(min(tokens, layer.window), at_least))
        for layer in shape.layers
    )


def cache_parts(shape: ModelKV, use: Workload, bits: KVBits, decoding: bool) -> tuple[int, int]:
    """(bytes of the KV cache, bytes of workspace it needs) at the end of prefill, or of decode."""
    if use.cache == "ours":
        beside = kv_workspace_bytes(shape, use.batch, use.cache_tokens, bits, decoding)
        return kv_bytes(shape, use.batch, use.cache_tokens, bits), beside
    whole = decoding or use.cache == "static"
    # A dynamic cache grows by copying: one layer's keys exist twice for a moment.
    copied = use.batch * shape.kv_width * shape.item_bytes * use.ctx_tokens // 2 if decoding else 0
    return _stock_kv_bytes(shape, use, use.ctx_tokens if whole else use.prompt_tokens), copied
