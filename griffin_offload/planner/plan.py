"""The bytes of one combination: how many neurons, slots, where the embeddings are; and what lives for a moment.

Two moments bind. At the end of prefill the residents, every layer's compact FF, the stream's slots, the KV cache
and the workspace of its last chunk are on the device at once; in decode the slots are gone, unless streamed passes
go on between tokens (exact mode, refresh). The KV cache is ours, and allocated for the whole context; a caller may
bring transformers' growing one, which is full in decode alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from griffin_offload.blocks.hooks import whole_chunk
from griffin_offload.blocks.sizes import LayerSizes, ModelSizes
from griffin_offload.config import KVBits
from griffin_offload.kernels.attention_and_norm import attending_bytes
from griffin_offload.kernels.by_blocks import product_bytes
from griffin_offload.kv_cache.sequence import snapshot_bytes, statistic_bytes
from griffin_offload.kv_cache.store import Workload, cache_parts
from griffin_offload.method.statistic import sharing_bytes, summing_bytes
from griffin_offload.offload.weight_store import slot_bytes
from griffin_offload.planner.request import PlanRequest

EmbeddingDevice = Literal["device", "host"]


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
    embeddings: EmbeddingDevice
    precision: str
    context_tokens: int
    prompt_tokens: int
    batch: int
    kv_bits: KVBits
    budget_bytes: int
    prefill_parts: dict[str, int]
    decode_parts: dict[str, int]
    plain_parts: dict[str, int]
    """The residents without quantisation, for comparison."""
    full_bytes: int
    """All weights of the model, for comparison."""
    streamed_bytes: int
    """Weight bytes streamed per prompt; of experts, all, of which tokens need a part."""
    experts: tuple[int, int] | None = None
    """Of a mixture of experts, how many a layer keeps and has, in the layer that keeps the smallest share."""

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
        return sum(self.resident_parts.values())

    @property
    def resident_parts(self) -> dict[str, int]:
        return {name: self.decode_parts[name] for name in RESIDENT_PARTS}

    def run_figures(self) -> dict[str, Any]:
        """The part of a run's report that the plan knows."""
        return {
            "budget_bytes": self.budget_bytes,
            "density": self.density,
            "precision": self.precision,
            "parts": self.resident_parts,
            "parts_16bit": self.plain_parts,
        }

    @property
    def decoded_bytes(self) -> int:
        """Weight bytes that one token reads: residents without the embeddings, of which it reads a row, unless they
        are the head as well."""
        tied = self.decode_parts["head"] == 0
        return self.resident_bytes - (0 if tied else self.decode_parts["embeddings"])

    def to_json(self, remedy: str | None = None) -> dict[str, Any]:
        """The object that `griffin-offload plan --json` prints."""
        return {
            "fits": self.fits,
            "density": self.density,
            "experts": self.experts,
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
            "parts_16bit": self.plain_parts,
            "parts_prefill": self.prefill_parts,
            "parts_decode": self.decode_parts,
            "remedy": remedy,
        }


RESIDENT_PARTS = ("attention", "norms", "embeddings", "head", "feed_forward")


def _slot_bytes(shape: ModelSizes, request: PlanRequest, streamed: Sequence[int], slots: int) -> int:
    """The largest layers that can be on their way at once, and the pages one of them is copied from."""
    if request.offloaded_in_budget:
        return 0  # used where they rest
    dense = [i for i in streamed if not shape.layers[i].experts]
    largest = sorted((slot_bytes(shape.layers[i].ff_flat_bytes) for i in dense), reverse=True)[:slots]
    # Of experts one layer's are there at once: all that its tokens are sent to, until it is known which ones stay.
    experts = max(
        (_expert_bytes(shape, request, shape.layers[i], shape.layers[i].neurons) for i in streamed), default=0
    )
    return sum(largest) + int(max(largest, default=0) * request.stored_share) + experts


def _missing_bytes(shape: ModelSizes, request: PlanRequest, streamed: Sequence[int]) -> int:
    """Room for an expert that is read while tokens are decoded, and finds none in its layer."""
    return max((_expert_bytes(shape, request, shape.layers[i], 1) for i in streamed), default=0)


def _expert_bytes(shape: ModelSizes, request: PlanRequest, layer: LayerSizes, count: int) -> int:
    """Of `count` experts beside the residents, and of one that is made from what is stored, in floats and on its way;
    0 for a dense layer."""
    if not layer.experts:
        return 0
    made = shape.stored is not shape.precision or request.stored_share > 0
    sizes = shape.hidden_size, layer.width, shape.item_bytes
    making = layer.plain_neuron_bytes + shape.precision.gather_bytes(*sizes) if made else 0
    return count * layer.neuron_bytes + making


def _decode_workspace_bytes(shape: ModelSizes, request: PlanRequest, use: Workload, kept: tuple[int, ...]) -> int:
    """Of one token, and of the streamed passes between tokens."""
    passes = {1, min(max(use.pass_tokens, 1), use.ctx_tokens)}
    return max(workspace_bytes(shape, request, use, tokens, use.ctx_tokens, kept) for tokens in passes)


def _resident_parts(
    shape: ModelSizes, kept: tuple[int, ...], embeddings: EmbeddingDevice
) -> tuple[dict[str, int], dict[str, int]]:
    """Weights on the device by part, in their precision and in the stored one."""
    resident = {
        "attention": sum(layer.attention_bytes for layer in shape.layers),
        "norms": sum(layer.norm_bytes for layer in shape.layers) + shape.other_bytes,
        "embeddings": shape.embedding_bytes if embeddings == "device" else 0,
        "head": shape.head_bytes,
        "feed_forward": sum(layer.resident_ff_bytes(k) for k, layer in zip(kept, shape.layers, strict=True)),
    }
    plain = resident | {
        "attention": sum(layer.plain_attention_bytes for layer in shape.layers),
        "embeddings": shape.plain_embedding_bytes if embeddings == "device" else 0,
        "head": shape.plain_head_bytes,
        "feed_forward": sum(k * layer.plain_neuron_bytes for k, layer in zip(kept, shape.layers, strict=True)),
    }
    return resident, plain


def _density(shape: ModelSizes, kept: tuple[int, ...]) -> float:
    """Of neurons, or where there are experts, of these."""
    counted = [i for i, layer in enumerate(shape.layers) if bool(layer.experts) == shape.has_experts]
    return sum(kept[i] for i in counted) / sum(shape.layers[i].neurons for i in counted)


def _experts(shape: ModelSizes, kept: tuple[int, ...]) -> tuple[int, int] | None:
    pairs = [(k, layer.neurons) for k, layer in zip(kept, shape.layers, strict=True) if layer.experts]
    return min(pairs, key=lambda pair: pair[0] / pair[1], default=None)


def price(
    shape: ModelSizes,
    request: PlanRequest,
    use: Workload,
    kept: tuple[int, ...],
    slots: int,
    embeddings: EmbeddingDevice,
) -> Plan:
    """The bytes of one combination, whether it fits or not."""
    streamed = tuple(i for i, layer in enumerate(shape.layers) if request.always_stream or kept[i] < layer.neurons)
    slots = min(slots, len(streamed))
    resident, plain = _resident_parts(shape, kept, embeddings)
    if request.offloaded_in_budget:
        resident["offloaded"] = sum(shape.layers[i].ff_flat_bytes for i in streamed)
    elif any(request.converted_ff):
        resident["offloaded"] = sum(request.converted_ff[i] for i in streamed)
    common = {
        "states": states_bytes(shape, use),
        "logits": logits_bytes(shape, use),
        "statistic": request.sequences * statistics_bytes(shape, request, use, kept, streamed),
        "graphs": graphs_bytes(shape, request, use, kept),
        "sessions": request.session_bytes,
        "overhead": request.overhead_bytes,
    }
    kv_cache, beside = cache_parts(shape, use, request.kv_bits, decoding=False)
    in_slots = _slot_bytes(shape, request, streamed, slots)
    prefill = {
        "kv_cache": request.sequences * kv_cache,
        "slots": in_slots,
        "workspace": prompt_workspace_bytes(shape, request, use, kept) + beside,
    }
    kv_cache, beside = cache_parts(shape, use, request.kv_bits, decoding=True)
    decode = {
        "kv_cache": request.sequences * kv_cache,
        "slots": in_slots if use.pass_tokens else _missing_bytes(shape, request, streamed),
        "workspace": _decode_workspace_bytes(shape, request, use, kept) + beside,
    }
    if request.converted_bytes or any(request.converted_ff):
        settled = sum(size for i, size in enumerate(request.converted_ff) if i not in streamed)
        prefill["converted"], decode["converted"] = request.converted_bytes + settled, 0
    return Plan(
        density=_density(shape, kept),
        experts=_experts(shape, kept),
        kept=kept,
        streamed=streamed,
        slots=slots,
        ff_chunk_tokens=chunk_tokens(shape, request, use.batch),
        embeddings=embeddings,
        precision=shape.dtype if shape.precision.is_plain else shape.precision.name,
        context_tokens=use.ctx_tokens,
        prompt_tokens=use.prompt_tokens,
        batch=use.batch,
        kv_bits=request.kv_bits,
        budget_bytes=request.budget_bytes,
        prefill_parts={**resident, **prefill, **common},
        decode_parts={**resident, **decode, **common},
        plain_parts=plain,
        full_bytes=shape.weight_bytes,
        streamed_bytes=sum(shape.layers[i].ff_bytes for i in streamed),
    )


# Bytes that live for a moment: activations, the statistic, scratch, logits.


# FF activations of one chunk take at most this share of a slot, and a chunk at most so many tokens.
_CHUNK_SHARE_OF_SLOT = 0.25
_MAX_CHUNK_TOKENS = 512
_FLOAT_BYTES = 4
_INDEX_BYTES = 8


def prompt_workspace_bytes(shape: ModelSizes, request: PlanRequest, use: Workload, kept: Sequence[int]) -> int:
    """The workspace of a prompt's pass; where prompts are continued, of one whose first half has passed before, too:
    attention then needs a mask."""
    pasts = {use.past_tokens, use.prompt_tokens // 2} if request.continued else {use.past_tokens}
    seen = use.prompt_tokens
    return max(workspace_bytes(shape, request, use, seen - past, seen, kept) for past in pasts)


def workspace_bytes(
    shape: ModelSizes, request: PlanRequest, use: Workload, new_tokens: int, seen_tokens: int, kept: Sequence[int]
) -> int:
    """Activations alive at once while `new_tokens` per sample pass a layer, and the statistic beside them; attention
    reads `seen_tokens`, of which they are the last.

    An upper estimate by counting: hidden states (residual, normed, two float32 copies in the norm, output),
    queries, keys, values and their rotated copies, then either the attention's masks and scores, or a recurrence's
    scan, or one FF chunk. Uses that are decoded together pass everything but attention at once.
    """
    together = use.together if new_tokens == 1 else 1
    tokens, item = use.batch * new_tokens * together, shape.item_bytes
    chunk = chunk_tokens(shape, request, use.batch)
    blocks = request.translated or not shape.precision.is_plain
    ff_tokens = tokens if shape.inline_ff else min(tokens, use.batch * max(chunk, together))
    translation = _translation_bytes(shape, tokens, ff_tokens) if blocks else 0
    hidden = tokens * shape.hidden_size * (5 * item + 2 * _FLOAT_BYTES)
    projections = tokens * 2 * (shape.attention_width + shape.kv_width) * item
    mixing = tokens * max(layer.mixing_bytes for layer in shape.layers)
    activations = _activation_bytes(shape, ff_tokens)
    at_once = new_tokens if shape.inline_ff else min(new_tokens, chunk)
    statistic = summing_bytes(use.batch, shape.neurons, at_once) + sharing_bytes(use.together, shape.neurons)
    statistic += _routing_bytes(shape, tokens)
    selection = sum(kept) * _INDEX_BYTES
    masks = _score_bytes(shape, use, new_tokens, seen_tokens)
    if new_tokens == 1:
        masks += attending_bytes(use.batch, shape.heads, shape.attention_width, seen_tokens)
    streamed = request.always_stream or any(k < n.neurons for k, n in zip(kept, shape.layers, strict=True))
    gathering = _gather_bytes(shape) if streamed and new_tokens > 1 else 0
    return hidden + max(projections + masks, mixing, activations + statistic, gathering) + selection + translation


def _routing_bytes(shape: ModelSizes, tokens: int) -> int:
    """Of routers: scores of all experts several times in float32, chosen ones with index, weight and norm; and an
    expert's tokens on their way into it and out of it, which may be all of them."""
    if not shape.has_experts:
        return 0
    most = max((layer for layer in shape.layers if layer.experts), key=lambda layer: layer.neurons)
    routing = 4 * most.neurons * _FLOAT_BYTES + most.experts * (2 * _INDEX_BYTES + 3 * _FLOAT_BYTES)
    return tokens * (routing + shape.hidden_size * (3 * shape.item_bytes + _FLOAT_BYTES))


def _gather_bytes(shape: ModelSizes) -> int:
    """A matrix on its way into the layout that it rests in."""
    sizes = shape.hidden_size, shape.width, shape.item_bytes
    return shape.precision.gather_bytes(*sizes) + shape.stored.floats_bytes(*sizes)


def _translation_bytes(shape: ModelSizes, tokens: int, ff_tokens: int) -> int:
    """The scratch, a copy of a layer's input, scaled or in float32, and the product with one block."""
    scratch, neurons = shape.scratch_bytes, shape.width
    widest = max(tokens * max(shape.hidden_size, shape.attention_width), ff_tokens * neurons)
    block = product_bytes(tokens, min(shape.hidden_size, neurons), scratch)
    product = max(block, tokens * shape.hidden_size * _FLOAT_BYTES)
    return scratch + widest * _FLOAT_BYTES + product


def chunk_tokens(shape: ModelSizes, request: PlanRequest, batch: int) -> int:
    """Tokens of each sequence that pass a full FF at once."""
    if request.ff_chunk_tokens is not None:
        return request.ff_chunk_tokens
    layer = max(shape.layers, key=lambda layer: layer.ff_bytes)
    token_bytes = _activation_bytes(shape, batch)
    fitting = int(layer.ff_bytes * _CHUNK_SHARE_OF_SLOT / token_bytes)
    return whole_chunk(min(fitting, _MAX_CHUNK_TOKENS))


def _activation_bytes(shape: ModelSizes, tokens: int) -> int:
    """FF activations of `tokens`: gate, up, the activated gate and the product, or two of them without a gate."""
    neurons = shape.width
    return tokens * neurons * shape.item_bytes * (4 if shape.gated else 2)


def _score_bytes(shape: ModelSizes, use: Workload, new_tokens: int, seen_tokens: int) -> int:
    per_head = use.batch * new_tokens * seen_tokens
    if shape.materialises_scores:
        return per_head * shape.heads * (3 * shape.item_bytes + _FLOAT_BYTES)
    # A mask is built for padded batches, for windows, and behind a filled cache; else attention is causal without one.
    windows = any(layer.window is not None for layer in shape.layers)
    if use.batch == 1 and not windows and not 1 < new_tokens < seen_tokens:
        return 0
    # With a mask, keys and values are repeated for every head that shares them.
    width = 2 * shape.attention_width if shape.attention_width > shape.kv_width // 2 else 0
    if windows and 1 < new_tokens < seen_tokens:
        width += shape.kv_width  # a window's past and many new tokens are put together beside the KV cache
    return per_head * (1 + shape.item_bytes) + use.batch * seen_tokens * width * shape.item_bytes


def graphs_bytes(shape: ModelSizes, request: PlanRequest, use: Workload, kept: Sequence[int]) -> int:
    """Of captured decode steps: their common pool, which holds one token's workspace for good, and each one's kernels
    and logits. Their attention always has a mask."""
    costs = request.graphs
    if costs is None:
        return 0
    step = workspace_bytes(shape, request, use, 1, use.ctx_tokens, kept)
    scores = use.batch * use.ctx_tokens * shape.heads * (shape.item_bytes + _FLOAT_BYTES)
    logits = use.batch * shape.vocab_size * shape.item_bytes
    nodes = len(shape.layers) * costs.layer_bytes
    return costs.pool_bytes + step + scores + costs.most * (logits + nodes)


def statistics_bytes(
    shape: ModelSizes, request: PlanRequest, use: Workload, kept: Sequence[int], streamed: Sequence[int]
) -> int:
    """What outlives a pass: tables of s^2 and of norms, and marks."""
    neurons, chosen = sum(shape.layers[i].neurons for i in streamed), sum(kept[i] for i in streamed)
    tables = (use.statistics + request.weight_norms) * statistic_bytes(use.batch, neurons)
    mark_bytes = snapshot_bytes(use.batch, neurons, chosen, shape.vocab_size, use.batch * shape.state_bytes)
    return tables + use.marks * mark_bytes


def states_bytes(shape: ModelSizes, use: Workload) -> int:
    """Of convolutions and recurrences: the states themselves; and where tokens are drafted a copy of them, and what
    the layers are given of those tokens."""
    drafting = bool(use.pass_tokens)
    return use.batch * ((1 + drafting) * shape.state_bytes + use.pass_tokens * shape.taken_back_bytes)


def logits_bytes(shape: ModelSizes, use: Workload) -> int:
    """Scores of the last position: the model's own, float32 copies, and what sampling sorts, indices included; of
    further positions the model's own, and of uses decoded together; and those that are kept for the caller."""
    last = shape.vocab_size * (shape.item_bytes + 6 * _FLOAT_BYTES + 2 * _INDEX_BYTES)
    others = (use.logit_positions - 1) * shape.vocab_size * (shape.item_bytes + _FLOAT_BYTES)
    beside = (use.together - 1) * shape.vocab_size * shape.item_bytes
    return use.batch * (last + others + use.kept_scores * shape.vocab_size * _FLOAT_BYTES + beside)
