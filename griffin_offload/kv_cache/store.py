"""Where a layer's keys or values lie, tensors of their final size, written and moved in place; and how many bytes they
take, for a whole model and use.

Shapes: B batch, D size of a head; all parts of a store are [B, heads, tokens, ...].
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from griffin_offload.config import CacheKind, KVBits
from griffin_offload.devices.memory import untouched_zeros

KV_SLACK_TOKENS = 64
"""A layer with a window has room for so many tokens more: they are moved seldom, and some can be rolled back."""
_LARGEST_INT8 = 127
# Tokens of a layer that are moved or quantised at once.
_PIECE_TOKENS = 128
_FLOAT_BYTES = 4


class Store:
    """`tokens` tokens of keys or of values like `like`, [B, heads, any, D], in their own dtype."""

    def __init__(self, like: Tensor, tokens: int) -> None:
        batch, heads, _, size = like.shape
        # Zeros: a static step reads what was never written, too, and weighs it with 0, which NaN would survive.
        self._parts = [untouched_zeros((batch, heads, tokens, size), like.dtype, like.device)]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the parts lie: a captured graph reads and writes there."""
        return tuple(part.data_ptr() for part in self._parts)

    def suits(self, states: Tensor) -> bool:
        """Whether tokens like `states` can be kept here."""
        return self._parts[0].shape[:2] == states.shape[:2]

    def write(self, start: int, states: Tensor) -> None:
        self._parts[0][:, :, start : start + states.shape[-2]] = states

    def put(self, place: Tensor, states: Tensor) -> None:
        """Write one token [B, heads, 1, D] at `place` [1], which the host need not know."""
        self._parts[0].index_copy_(2, place, states)

    def read(self, start: int, end: int) -> Tensor:
        """Tokens from `start` to `end`, [B, heads, end - start, D]."""
        return self._parts[0][:, :, start:end]

    def parts(self, tokens: int) -> list[Tensor]:
        """Views of the first `tokens` as they are kept."""
        return [part[:, :, :tokens] for part in self._parts]

    def fill(self, parts: list[Tensor]) -> None:
        """Begin with what `parts` of another store gave."""
        for part, given in zip(self._parts, parts, strict=True):
            part[:, :, : given.shape[2]] = given

    def move_to_start(self, start: int, tokens: int) -> None:
        """Move `tokens` from `start` on to the start; the two may overlap, so the first go first."""
        for piece in _pieces(tokens if start else 0):
            for part in self._parts:
                source = part[:, :, piece.start + start : piece.stop + start]
                part[:, :, piece] = source.clone()

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """Make every part what `change` makes of it: for another batch."""
        self._parts = [change(part) for part in self._parts]

    def reorder(self, indices: Tensor, tokens: int) -> None:
        for piece in _pieces(tokens):
            for part in self._parts:
                part[:, :, piece] = part[:, :, piece].index_select(0, indices.to(part.device))


class Int8Store(Store):
    """Numbers as int8 [B, heads, tokens, D], and a scale [B, heads, tokens, 1] by which they are to be multiplied."""

    def __init__(self, like: Tensor, tokens: int, scratch: "DequantBuffer") -> None:
        batch, heads, _, size = like.shape
        self._parts = [
            untouched_zeros((batch, heads, tokens, size), torch.int8, like.device),
            untouched_zeros((batch, heads, tokens, 1), like.dtype, like.device),
        ]
        self._scratch = scratch
        self._scratch.reserve(self._parts[0].numel())

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        super().replace(change)
        self._scratch.reserve(self._parts[0].numel())

    def write(self, start: int, states: Tensor) -> None:
        numbers, scales = self._parts
        for piece in _pieces(states.shape[-2]):
            there = slice(start + piece.start, start + piece.stop)
            numbers[:, :, there], scales[:, :, there] = _quantized(states[:, :, piece])

    def put(self, place: Tensor, states: Tensor) -> None:
        numbers, scale = _quantized(states)
        self._parts[0].index_copy_(2, place, numbers.to(torch.int8))
        self._parts[1].index_copy_(2, place, scale)

    def read(self, start: int, end: int) -> Tensor:
        numbers, scales = (part[:, :, start:end] for part in self._parts)
        return self._scratch.take(numbers, scales.dtype).copy_(numbers).mul_(scales)


def _quantized(states: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers, and the scale [B, heads, T, 1] of each token and head."""
    exact = states.float()
    scale = (torch.linalg.vector_norm(exact, torch.inf, dim=-1, keepdim=True) / _LARGEST_INT8).to(states.dtype)
    scale.masked_fill_(scale == 0, 1)
    # By the scale as it is kept: its rounding costs nothing then.
    return (exact / scale).round_().clamp_(-_LARGEST_INT8, _LARGEST_INT8), scale


class DequantBuffer:
    """Room for one layer's dequantised keys, or values, which all layers of a cache take in turn."""

    def __init__(self) -> None:
        self._numbers = 0
        self._buffer: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.nbytes

    def reserve(self, numbers: int) -> None:
        """A layer will need room for so many numbers. All layers say so before the first one takes it."""
        self._numbers = max(self._numbers, numbers)

    def take(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Room in the shape of `like`, until the next one takes it."""
        if self._buffer is None or self._buffer.numel() < self._numbers:
            self._buffer = like.new_empty(self._numbers, dtype=dtype)
        return self._buffer[: like.numel()].view(like.shape)


def _pieces(tokens: int) -> Iterator[slice]:
    """[0, tokens) in pieces: what is made of one beside the cache stays small."""
    return (slice(start, min(start + _PIECE_TOKENS, tokens)) for start in range(0, tokens, _PIECE_TOKENS))


def piece_bytes(numbers: int, item_bytes: int, tokens: int, bits: KVBits, *, moves: bool) -> int:
    """What is made beside a store of `tokens` of so many numbers: a piece that is quantised, as two float32 copies, or
    one that is moved."""
    number_bytes = 2 * _FLOAT_BYTES if bits == 8 else item_bytes * moves
    return numbers * min(tokens, _PIECE_TOKENS) * number_bytes


def kv_tokens_kept(window: int | None, ctx_tokens: int) -> int:
    """Tokens that a layer has room for."""
    return ctx_tokens if window is None else min(ctx_tokens, window - 1 + KV_SLACK_TOKENS)


# Bytes of the KV cache: ours, allocated for the whole context before prefill, and transformers' own kinds.


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

    @property
    def cache_tokens(self) -> int:
        """Tokens that our KV cache is made for."""
        return max(self.ctx_tokens + self.drafts, self.reserved_tokens)


class LayerKV(Protocol):
    """What of a layer's sizes (`LayerSizes`) its KV cache depends on."""

    @property
    def window(self) -> int | None: ...
    @property
    def kv_width(self) -> int | None: ...
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
    """Bytes of our KV cache, exactly; its scratch with 8 bits is in `kv_workspace_bytes`."""
    return batch * sum(
        _token_bytes(shape, layer, bits) * kv_tokens_kept(layer.window, ctx_tokens) for layer in shape.layers
    )


def _token_bytes(shape: ModelKV, layer: LayerKV, bits: KVBits = 16) -> int:
    """Bytes of one token in the KV cache of `layer`."""
    heads = shape.kv_heads if layer.kv_heads is None else layer.kv_heads
    width, scales = width_of(shape, layer), 2 * heads * shape.item_bytes
    return width + scales if bits == 8 else width * shape.item_bytes


def kv_workspace_bytes(shape: ModelKV, batch: int, ctx_tokens: int, bits: KVBits, decoding: bool) -> int:
    """What our KV cache makes beside itself: a piece of keys that is quantised or moved, and with 8 bits in decode, the
    scratch, which is one layer's keys and values."""
    piece = piece_bytes(batch * shape.kv_width // 2, shape.item_bytes, ctx_tokens, bits, moves=decoding)
    largest = max(kv_tokens_kept(layer.window, ctx_tokens) for layer in shape.layers)
    scratch = batch * shape.kv_width * largest * shape.item_bytes if bits == 8 and decoding else 0
    return piece + scratch


def _stock_kv_bytes(shape: ModelKV, use: Workload, tokens: int) -> int:
    """Bytes of a KV cache of transformers' when `tokens` have passed. Layers with a window keep that many, but a
    growing one keeps the whole prompt of such a layer alive until its first decode step."""
    at_least = min(tokens, use.prompt_tokens) if use.cache == "dynamic" else 0
    return use.batch * sum(
        _token_bytes(shape, layer) * (tokens if layer.window is None else max(min(tokens, layer.window), at_least))
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
