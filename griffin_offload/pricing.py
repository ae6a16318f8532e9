"""What things cost in bytes: weights kept, KV cache, slots, activations, logits. Pure arithmetic.

Two moments bind. At the end of prefill the residents, every layer's compact FF, the stream's slots, the prompt's
KV cache and the workspace of its last chunk are on the device at once; in decode the slots are gone and the KV
cache is full.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from griffin_offload.config import Density
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
    static_cache: bool = False
    """The KV cache is allocated for the whole context before prefill."""
    logit_positions: int = 1
    """Positions per sequence whose logits exist at once: drafts of prompt lookup, all of them in a bare forward."""
    kept_scores: int = 0
    """float32 scores that are kept for the caller (output_scores, output_logits), per sequence."""


def kv_bytes(shape: ModelShape, batch: int, tokens: int, at_least: int = 0) -> int:
    """Bytes of the KV cache when `tokens` have passed. Layers with a window keep that many, but never fewer than
    `at_least`: transformers keeps the whole prompt of such a layer alive until its first decode step."""
    width = shape.kv_width * shape.item_bytes * batch
    return sum(
        width * (tokens if layer.window is None else max(min(tokens, layer.window), min(tokens, at_least)))
        for layer in shape.layers
    )


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
    at_least = 0 if use.static_cache else use.prompt_tokens
    prefill = {
        "kv_cache": kv_bytes(shape, use.batch, use.ctx_tokens if use.static_cache else use.prompt_tokens, at_least),
        "slots": _slot_bytes(shape, request, streamed, slots),
        "workspace": workspace_bytes(shape, request, use, use.prompt_tokens, kept),
    }
    # A dynamic cache grows by copying: one layer's keys exist twice for a moment.
    one_layer = shape.kv_width * shape.item_bytes * use.batch * use.ctx_tokens // 2
    decode = {
        "kv_cache": kv_bytes(shape, use.batch, use.ctx_tokens, at_least),
        "slots": 0,
        "workspace": workspace_bytes(shape, request, use, 1, kept) + one_layer,
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
        budget_bytes=request.budget_bytes,
        prefill_parts={**resident, **prefill, **common},
        decode_parts={**resident, **decode, **common},
        full_bytes=shape.weight_bytes,
        streamed_bytes=sum(shape.layers[i].ff_bytes for i in streamed),
    )
