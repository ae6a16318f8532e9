"""What lives for a moment: activations, the statistic, scratch, logits.

Upper estimates, by counting what is alive at once.
"""

from collections.abc import Sequence
from dataclasses import replace

from griffin_offload.blocks.base import whole_chunk
from griffin_offload.blocks.sizes import ModelSizes
from griffin_offload.kernels.attention import attending_bytes
from griffin_offload.kernels.by_blocks import product_bytes
from griffin_offload.kernels.recording import recorded_bytes
from griffin_offload.kernels.small_operators import tables_bytes
from griffin_offload.kv_cache.sequence import snapshot_bytes, statistic_bytes
from griffin_offload.kv_cache.workload import Workload
from griffin_offload.method.allocation import Counts
from griffin_offload.method.selection import sharing_bytes, summing_bytes
from griffin_offload.planner.request import PlanRequest

# FF activations of one chunk take at most this share of a slot, and a chunk at most so many tokens.
_CHUNK_SHARE_OF_SLOT = 0.25
_MAX_CHUNK_TOKENS = 512
_FLOAT_BYTES = 4
_INDEX_BYTES = 8


def prompt_workspace_bytes(shape: ModelSizes, request: PlanRequest, use: Workload, counts: Sequence[Counts]) -> int:
    """The workspace of a prompt's pass; where prompts are continued, of one whose first half has passed before, too:
    attention then needs a mask."""
    pasts = {use.past_tokens, use.prompt_tokens // 2} if request.continued else {use.past_tokens}
    seen = use.prompt_tokens
    return max(workspace_bytes(shape, request, use, seen - past, seen, counts) for past in pasts)


def workspace_bytes(
    shape: ModelSizes, request: PlanRequest, use: Workload, new_tokens: int, seen_tokens: int, counts: Sequence[Counts]
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
    blocks = request.translated or not shape.is_plain
    ff_tokens = tokens if shape.inline_ff else min(tokens, use.batch * max(chunk, together))
    translation = _translation_bytes(shape, tokens, ff_tokens) if blocks else 0
    hidden = tokens * shape.hidden_size * (5 * item + 2 * _FLOAT_BYTES)
    projections = tokens * 2 * (shape.attention_width + shape.kv_width) * item
    mixing = tokens * max(layer.mixing_bytes for layer in shape.layers)
    activations = _activation_bytes(shape, ff_tokens)
    at_once = new_tokens if shape.inline_ff else min(new_tokens, chunk)
    statistic = summing_bytes(use.batch, shape.neurons, at_once, use.prompts if new_tokens > 1 else 1)
    statistic += sharing_bytes(use.together, shape.neurons) + _routing_bytes(shape, tokens)
    selection = sum(map(sum, counts)) * _INDEX_BYTES
    masks = _score_bytes(shape, use, new_tokens, seen_tokens)
    if new_tokens == 1:
        masks += attending_bytes(use.batch * together, shape.heads, shape.attention_width, seen_tokens)
    streamed = request.always_stream or shape.choosing(counts)
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
    return max(format.gather_bytes(*sizes) for format in shape.levels) + shape.stored.floats_bytes(*sizes)


def _translation_bytes(shape: ModelSizes, tokens: int, ff_tokens: int) -> int:
    """The scratch, a copy of a layer's input, scaled or in float32, and the product with one block."""
    scratch, neurons = shape.scratch_bytes, shape.width or shape.hidden_size
    widest = max(tokens * max(shape.hidden_size, shape.attention_width), ff_tokens * neurons)
    block = product_bytes(tokens, min(shape.hidden_size, neurons), scratch)
    product = max(block, tokens * shape.hidden_size * _FLOAT_BYTES)
    return scratch + widest * _FLOAT_BYTES + product


def chunk_tokens(shape: ModelSizes, request: PlanRequest, batch: int) -> int:
    """Tokens of each sequence that pass a full FF at once."""
    if request.ff_chunk_tokens is not None:
        return request.ff_chunk_tokens
    layer = max(shape.layers, key=lambda layer: layer.ff_bytes)
    token_bytes = max(_activation_bytes(shape, batch), 1)  # none of a model without a feed-forward
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


def graphs_bytes(shape: ModelSizes, request: PlanRequest, use: Workload, counts: Sequence[Counts]) -> int:
    """Of captured decode steps: their common pool, which holds one token's workspace for good, and each one's kernels
    and logits. Their attention always has a mask."""
    costs = request.graphs
    if costs is None:
        return _replays_bytes(shape, request, use, counts)
    step = workspace_bytes(shape, request, use, 1, use.ctx_tokens, counts)
    scores = use.batch * use.ctx_tokens * shape.heads * (shape.item_bytes + _FLOAT_BYTES)
    logits = use.batch * shape.vocab_size * shape.item_bytes
    nodes = len(shape.layers) * costs.layer_bytes
    return costs.pool_bytes + step + scores + costs.most * (logits + nodes)


def _replays_bytes(shape: ModelSizes, request: PlanRequest, use: Workload, counts: Sequence[Counts]) -> int:
    """Of recorded decode steps, of as many sequences as there may be, and of fewer."""
    found = 0
    for rows in range(max(request.sequences - request.replays, 0) + 1, request.sequences + 1):
        step = workspace_bytes(shape, request, replace(use, batch=rows, together=1), 1, use.ctx_tokens, counts)
        found += recorded_bytes(step - shape.scratch_bytes + rows * shape.vocab_size * shape.item_bytes)
    whole = max(format.neuron_multiple for format in shape.levels)
    widest = max(-(-shape.width // whole) * whole, shape.attention_width)
    return found + tables_bytes(request.sequences * widest) if found else 0


def statistics_bytes(
    shape: ModelSizes, request: PlanRequest, use: Workload, counts: Sequence[Counts], streamed: Sequence[int]
) -> int:
    """What outlives a pass: tables of s^2 and of norms, and marks."""
    neurons, chosen = sum(shape.layers[i].neurons for i in streamed), sum(sum(counts[i]) for i in streamed)
    tables = (use.statistics + request.weight_norms) * statistic_bytes(use.batch, neurons)
    mark_bytes = snapshot_bytes(use.batch, neurons, chosen, shape.vocab_size, use.batch * shape.state_bytes)
    return tables + use.marks * mark_bytes


def logits_bytes(shape: ModelSizes, use: Workload) -> int:
    """Scores of the last position: the model's own, float32 copies, and what sampling sorts, indices included; of
    further positions the model's own, and of uses decoded together; and those that are kept for the caller."""
    last = shape.vocab_size * (shape.item_bytes + 6 * _FLOAT_BYTES + 2 * _INDEX_BYTES)
    others = (use.logit_positions - 1) * shape.vocab_size * (shape.item_bytes + _FLOAT_BYTES)
    beside = (use.together - 1) * shape.vocab_size * shape.item_bytes
    return use.batch * (last + others + use.kept_scores * shape.vocab_size * _FLOAT_BYTES + beside)
