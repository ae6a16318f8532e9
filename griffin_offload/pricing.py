"""What things cost in bytes: weights kept, KV cache, slots, activations, logits. Pure arithmetic.

Two moments bind. At the end of prefill the residents, every layer's compact FF, the stream's slots, the KV cache
and the workspace of its last chunk are on the device at once; in decode the slots are gone. The KV cache is ours,
and allocated for the whole context; a caller may bring transformers' growing one, which is full in decode alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from griffin_offload.config import CacheKind, Density, KVBits
from griffin_offload.method.statistic import ROWS_AT_ONCE
from griffin_offload.weights.shape import ModelShape

# Chunks of tokens come in multiples of this: the GEMM kernels' row blocks.
CHUNK_MULTIPLE = 16
# FF activations of one chunk take at most this share of a slot, and a chunk at most so many tokens.
_CHUNK_SHARE_OF_SLOT = 0.25
_MAX_CHUNK_TOKENS = 512
_MAX_SCRATCH_BYTES = 16 * 2**20
_FLOAT_BYTES = 4
_INDEX_BYTES = 8
# A layer with a window has room for so many tokens more: they are moved seldom, and some can be rolled back.
KV_SLACK_TOKENS = 64
# Tokens of a layer that are moved or quantised at once.
KV_PIECE_TOKENS = 128

Placement = Literal["device", "host"]


@dataclass(frozen=True)
class PlanRequest:
    """What is asked of the planner."""

    budget_bytes: int
    ctx_tokens: int | None = None
    """None: the largest of MAX_AUTO_CTX, halved until it fits."""
    prompt_tokens: int | None = None
    """Longest prompt; None: the whole context."""
    batch: int = 1
    density: Density | Literal["auto"] = "auto"
    overhead_bytes: int = 0
    """What the device's own runtime takes (a CUDA context); 0 on the CPU."""
    offloaded_in_budget: bool = False
    """The full FF weights of streamed layers rest inside the budget (CPU device, --offload ram)."""
    ff_chunk_tokens: int | None = None
    always_stream: bool = False
    host_embeddings: bool = True
    """Whether the embeddings may stay on the host where that helps."""
    stored_share: float = 0.0
    """On the CPU in another precision than the stored one: pages of the source beside a slot, per byte of it."""
    kv_bits: KVBits = 16
    cache: CacheKind = "ours"
    """The KV cache that `generate` uses when not told otherwise: ours, unless the model's layers need another."""
    translated: bool = False
    """Linear layers multiply in float32, block by block (runtime/cpu_linear.py)."""


@dataclass(frozen=True)
class Plan:
    """A promise in bytes: what is resident, and the two peaks."""

    density: float
    """Kept neurons over all neurons."""
    kept: tuple[int, ...]
    """Kept neurons per layer."""
    streamed: tuple[int, ...]
    """Layers whose full FF passes through the slots for every prompt."""
    slots: int
    ff_chunk_tokens: int
    """Tokens of a sequence that pass a full FF at once."""
    embeddings: Placement
    precision: str
    context_tokens: int
    prompt_tokens: int
    batch: int
    kv_bits: KVBits
    budget_bytes: int
    prefill_parts: dict[str, int]
    decode_parts: dict[str, int]
    full_bytes: int
    """All weights of the model, for comparison."""
    streamed_bytes: int
    """Weight bytes streamed per prompt."""

    @property
    def peak_prefill_bytes(self) -> int:
        return sum(self.prefill_parts.values())

    @property
    def peak_decode_bytes(self) -> int:
        return sum(self.decode_parts.values())

    @property
    def peak_bytes(self) -> int:
        return max(self.peak_prefill_bytes, self.peak_decode_bytes)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.budget_bytes

    @property
    def parts(self) -> dict[str, int]:
        """The parts of whichever phase needs more: their sum is the peak."""
        binding = self.peak_prefill_bytes >= self.peak_decode_bytes
        return self.prefill_parts if binding else self.decode_parts

    @property
    def resident_bytes(self) -> int:
        return sum(self.decode_parts[name] for name in RESIDENT_PARTS)

    def to_json(self, remedy: str | None = None) -> dict[str, Any]:
        """The object that `griffin-offload plan --json` prints."""
        return {
            "fits": self.fits,
            "density": self.density,
            "precision": self.precision,
            "context_tokens": self.context_tokens,
            "prompt_tokens": self.prompt_tokens,
            "batch": self.batch,
            "kv_bits": self.kv_bits,
            "budget_bytes": self.budget_bytes,
            "peak_prefill_bytes": self.peak_prefill_bytes,
            "peak_decode_bytes": self.peak_decode_bytes,
            "resident_bytes": self.resident_bytes,
            "full_bytes": self.full_bytes,
            "streamed_bytes": self.streamed_bytes,
            "slots": self.slots,
            "ff_chunk_tokens": self.ff_chunk_tokens,
            "embeddings": self.embeddings,
            "parts": self.parts,
            "parts_prefill": self.prefill_parts,
            "parts_decode": self.decode_parts,
            "remedy": remedy,
        }


RESIDENT_PARTS = ("attention", "norms", "embeddings", "head", "feed_forward")


@dataclass(frozen=True)
class Usage:
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
    kept_scores: int = 0
    """float32 scores that are kept for the caller (output_scores, output_logits), per sequence."""

    @property
    def cache_tokens(self) -> int:
        """Tokens that our KV cache is made for."""
        return self.ctx_tokens + self.drafts


def kv_tokens_kept(window: int | None, ctx_tokens: int) -> int:
    """Tokens that a layer of our KV cache has room for."""
    return ctx_tokens if window is None else min(ctx_tokens, window - 1 + KV_SLACK_TOKENS)


def kv_bytes(shape: ModelShape, batch: int, ctx_tokens: int, bits: KVBits = 16) -> int:
    """Bytes of our KV cache, exactly; its scratch with 8 bits is in `kv_workspace_bytes`."""
    scales = 2 * shape.kv_heads * shape.item_bytes
    token_bytes = shape.kv_width + scales if bits == 8 else shape.kv_width * shape.item_bytes
    return batch * token_bytes * sum(kv_tokens_kept(layer.window, ctx_tokens) for layer in shape.layers)


def kv_workspace_bytes(shape: ModelShape, batch: int, ctx_tokens: int, bits: KVBits, decoding: bool) -> int:
    """What our KV cache makes beside itself: a piece of keys that is quantised (as two float32 copies) or moved, and
    with 8 bits in decode, the scratch, which is one layer's keys and values."""
    number_bytes = 2 * _FLOAT_BYTES if bits == 8 else shape.item_bytes * decoding
    piece = batch * shape.kv_width // 2 * min(ctx_tokens, KV_PIECE_TOKENS) * number_bytes
    largest = max(kv_tokens_kept(layer.window, ctx_tokens) for layer in shape.layers)
    scratch = batch * shape.kv_width * largest * shape.item_bytes if bits == 8 and decoding else 0
    return piece + scratch


def _stock_kv_bytes(shape: ModelShape, use: Usage, tokens: int) -> int:
    """Bytes of a KV cache of transformers' when `tokens` have passed. Layers with a window keep that many, but a
    growing one keeps the whole prompt of such a layer alive until its first decode step."""
    at_least = min(tokens, use.prompt_tokens) if use.cache == "dynamic" else 0
    kept = (tokens if layer.window is None else max(min(tokens, layer.window), at_least) for layer in shape.layers)
    return use.batch * shape.kv_width * shape.item_bytes * sum(kept)


def _cache_parts(shape: ModelShape, use: Usage, bits: KVBits, decoding: bool) -> tuple[int, int]:
    """(bytes of the KV cache, bytes of workspace it needs) at the end of prefill, or of decode."""
    if use.cache == "ours":
        beside = kv_workspace_bytes(shape, use.batch, use.cache_tokens, bits, decoding)
        return kv_bytes(shape, use.batch, use.cache_tokens, bits), beside
    whole = decoding or use.cache == "static"
    # A dynamic cache grows by copying: one layer's keys exist twice for a moment.
    copied = use.batch * shape.kv_width * shape.item_bytes * use.ctx_tokens // 2 if decoding else 0
    return _stock_kv_bytes(shape, use, use.ctx_tokens if whole else use.prompt_tokens), copied


def workspace_bytes(shape: ModelShape, request: PlanRequest, use: Usage, new_tokens: int, kept: Sequence[int]) -> int:
    """Activations alive at once while `new_tokens` per sample pass a layer, and the statistic beside them.

    An upper estimate by counting: hidden states (residual, normed, two float32 copies in the norm, output),
    queries, keys, values and their rotated copies, then either the attention's masks and scores or one FF chunk.
    """
    tokens, item = use.batch * new_tokens, shape.item_bytes
    chunk = chunk_tokens(shape, request, use.batch)
    translation = _translation_bytes(shape, use, new_tokens, chunk) if request.translated else 0
    hidden = tokens * shape.hidden_size * (5 * item + 2 * _FLOAT_BYTES)
    projections = tokens * 2 * (shape.attention_width + shape.kv_width) * item
    ff_tokens = tokens if shape.inline_ff else min(tokens, use.batch * chunk)
    neurons = max(layer.neurons for layer in shape.layers)
    activations = _activation_bytes(shape, ff_tokens)
    rows = min(new_tokens, ROWS_AT_ONCE) if shape.inline_ff else min(new_tokens, chunk, ROWS_AT_ONCE)
    statistic = use.batch * neurons * _FLOAT_BYTES * (rows + 8)
    selection = sum(kept) * _INDEX_BYTES
    masks = _score_bytes(shape, use, new_tokens)
    return hidden + max(projections + masks, activations + statistic) + selection + translation


def scratch_bytes(shape: ModelShape) -> int:
    """The float32 scratch that translated linear layers share: small against a slot, and inside a cache."""
    layer = max(shape.layers, key=lambda layer: layer.ff_bytes)
    row_bytes = max(shape.hidden_size, layer.neurons) * _FLOAT_BYTES
    return max(row_bytes, min(layer.ff_bytes // 8, _MAX_SCRATCH_BYTES))


def _translation_bytes(shape: ModelShape, use: Usage, new_tokens: int, chunk: int) -> int:
    """The scratch, the float32 copy of a layer's input, and the float32 output of one block."""
    tokens, scratch = use.batch * new_tokens, scratch_bytes(shape)
    if tokens == 1:
        return scratch
    neurons = max(layer.neurons for layer in shape.layers)
    ff_tokens = tokens if shape.inline_ff else min(tokens, use.batch * chunk)
    widest = max(tokens * max(shape.hidden_size, shape.attention_width), ff_tokens * neurons)
    return scratch + widest * _FLOAT_BYTES + tokens * scratch // min(shape.hidden_size, neurons)


def chunk_tokens(shape: ModelShape, request: PlanRequest, batch: int) -> int:
    """Tokens of each sequence that pass a full FF at once."""
    if request.ff_chunk_tokens is not None:
        return request.ff_chunk_tokens
    layer = max(shape.layers, key=lambda layer: layer.ff_bytes)
    token_bytes = _activation_bytes(shape, batch)
    fitting = int(layer.ff_bytes * _CHUNK_SHARE_OF_SLOT / token_bytes)
    rounded = fitting // CHUNK_MULTIPLE * CHUNK_MULTIPLE
    return max(CHUNK_MULTIPLE, min(rounded, _MAX_CHUNK_TOKENS))


def _activation_bytes(shape: ModelShape, tokens: int) -> int:
    """FF activations of `tokens`: gate, up, the activated gate and the product, or two of them without a gate."""
    neurons = max(layer.neurons for layer in shape.layers)
    return tokens * neurons * shape.item_bytes * (4 if shape.gated else 2)


def _score_bytes(shape: ModelShape, use: Usage, new_tokens: int) -> int:
    past = use.prompt_tokens if new_tokens > 1 else use.ctx_tokens
    per_head = use.batch * new_tokens * past
    if shape.materialises_scores:
        return per_head * shape.heads * (3 * shape.item_bytes + _FLOAT_BYTES)
    # A mask is built for padded batches and for windows; otherwise attention is causal without one.
    needs_mask = use.batch > 1 or any(layer.window is not None for layer in shape.layers)
    return per_head * (1 + shape.item_bytes) if needs_mask else 0


def logits_bytes(shape: ModelShape, use: Usage) -> int:
    """Scores of the last position: the model's own, float32 copies, and what sampling sorts, indices included; of
    further positions the model's own; and those that are kept for the caller."""
    last = shape.vocab_size * (shape.item_bytes + 6 * _FLOAT_BYTES + 2 * _INDEX_BYTES)
    others = (use.logit_positions - 1) * shape.vocab_size * (shape.item_bytes + _FLOAT_BYTES)
    return use.batch * (last + others + use.kept_scores * shape.vocab_size * _FLOAT_BYTES)


def _slot_bytes(shape: ModelShape, request: PlanRequest, streamed: Sequence[int], slots: int) -> int:
    """The largest layers that can be on their way at once, and the pages one of them is copied from."""
    if request.offloaded_in_budget:
        return 0  # used where they rest
    largest = sorted((shape.layers[i].ff_bytes for i in streamed), reverse=True)[:slots]
    return sum(largest) + int(max(largest, default=0) * request.stored_share)


def price(
    shape: ModelShape,
    request: PlanRequest,
    use: Usage,
    kept: tuple[int, ...],
    slots: int,
    embeddings: Placement,
    precision: str,
) -> Plan:
    """The bytes of one combination, whether it fits or not."""
    streamed = tuple(i for i, layer in enumerate(shape.layers) if request.always_stream or kept[i] < layer.neurons)
    slots = min(slots, len(streamed))
    resident = {
        "attention": sum(layer.attention_bytes for layer in shape.layers),
        "norms": sum(layer.norm_bytes for layer in shape.layers) + shape.other_bytes,
        "embeddings": shape.embedding_bytes if embeddings == "device" else 0,
        "head": shape.head_bytes,
        "feed_forward": sum(k * layer.neuron_bytes for k, layer in zip(kept, shape.layers, strict=True)),
    }
    if request.offloaded_in_budget:
        resident["offloaded"] = sum(shape.layers[i].ff_bytes for i in streamed)
    common = {"logits": logits_bytes(shape, use), "overhead": request.overhead_bytes}
    kv_cache, beside = _cache_parts(shape, use, request.kv_bits, decoding=False)
    prefill = {
        "kv_cache": kv_cache,
        "slots": _slot_bytes(shape, request, streamed, slots),
        "workspace": workspace_bytes(shape, request, use, use.prompt_tokens, kept) + beside,
    }
    kv_cache, beside = _cache_parts(shape, use, request.kv_bits, decoding=True)
    decode = {
        "kv_cache": kv_cache,
        "slots": 0,
        "workspace": workspace_bytes(shape, request, use, 1, kept) + beside,
    }
    return Plan(
        density=sum(kept) / sum(layer.neurons for layer in shape.layers),
        kept=kept,
        streamed=streamed,
        slots=slots,
        ff_chunk_tokens=chunk_tokens(shape, request, use.batch),
        embeddings=embeddings,
        precision=precision,
        context_tokens=use.ctx_tokens,
        prompt_tokens=use.prompt_tokens,
        batch=use.batch,
        kv_bits=request.kv_bits,
        budget_bytes=request.budget_bytes,
        prefill_parts={**resident, **prefill, **common},
        decode_parts={**resident, **decode, **common},
        full_bytes=shape.weight_bytes,
        streamed_bytes=sum(shape.layers[i].ff_bytes for i in streamed),
    )
