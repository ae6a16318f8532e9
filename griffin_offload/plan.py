"""The plan: sizes and a budget in, a density or a named shortfall out. Pure arithmetic, before any weight is read.

Two moments bind. At the end of prefill the residents, every layer's compact FF, the stream's slots, the prompt's
KV cache and the workspace of its last chunk are on the device at once; in decode the slots are gone and the KV
cache is full.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from griffin_offload.config import MAX_AUTO_CTX, MIN_AUTO_CTX, MIN_AUTO_DENSITY, NEURON_MULTIPLE, Density
from griffin_offload.errors import DoesNotFit, UsageError
from griffin_offload.method.selection import densities_per_layer, neurons_kept
from griffin_offload.method.statistic import ROWS_AT_ONCE
from griffin_offload.units import format_bytes
from griffin_offload.weights.shape import ModelShape

# One layer computes while the next one is read; one slot alone works, without the overlap.
SLOTS = (2, 1)
# The second slot is given up when it would cost more density than this: quality lasts, prefill passes. A slot is
# 1/L of all FFs, so this concerns models of a few layers, and budgets where two slots fit nothing at all.
_SECOND_SLOT_DENSITY = 0.05
# FF activations of one chunk take at most this share of a slot, and a chunk at most so many tokens.
_CHUNK_SHARE_OF_SLOT = 0.25
_MAX_CHUNK_TOKENS = 512
_MIN_CHUNK_TOKENS = 16
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
    translated: bool = False
    """Linear layers multiply in float32, block by block (runtime/cpu_linear.py): counted in the workspace."""


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
    hidden = tokens * shape.hidden_size * (4 * item + 2 * _FLOAT_BYTES)
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
    rounded = fitting // _MIN_CHUNK_TOKENS * _MIN_CHUNK_TOKENS
    return max(_MIN_CHUNK_TOKENS, min(rounded, _MAX_CHUNK_TOKENS))


def _activation_bytes(shape: ModelShape, tokens: int) -> int:
    """FF activations of `tokens`: gate, up, the activated gate and the product, or two of them without a gate."""
    neurons = max(layer.neurons for layer in shape.layers)
    return tokens * neurons * shape.item_bytes * (4 if shape.gated else 2)


def _score_bytes(shape: ModelShape, use: Usage, new_tokens: int) -> int:
    past = use.prompt_tokens if new_tokens > 1 else use.ctx_tokens
    per_head = use.batch * new_tokens * past
    if shape.materialises_scores:
        return per_head * shape.heads * (2 * shape.item_bytes + _FLOAT_BYTES)
    # A mask is built for padded batches and for windows; otherwise attention is causal without one.
    needs_mask = use.batch > 1 or any(layer.window is not None for layer in shape.layers)
    return per_head * (1 + shape.item_bytes) if needs_mask else 0


def logits_bytes(shape: ModelShape, batch: int) -> int:
    """Scores of the last position: the model's own, a float32 copy, and what sampling sorts."""
    return batch * shape.vocab_size * (shape.item_bytes + 3 * _FLOAT_BYTES + _INDEX_BYTES)


def make_plan(shape: ModelShape, request: PlanRequest, precision: str) -> Plan:
    """The best plan that fits the budget; DoesNotFit names the shortfall and the remedy."""
    plan, remedy = solve(shape, request, precision)
    if remedy is not None:
        raise DoesNotFit(describe_shortfall(plan, remedy))
    return plan


def solve(shape: ModelShape, request: PlanRequest, precision: str) -> tuple[Plan, str | None]:
    """The best plan that fits and None, or the smallest one that does not and what to change.

    Best is: everything resident; else the largest density, with a second slot if it costs little, and with the
    embeddings on the host where that keeps more neurons.
    """
    plan = None
    for ctx_tokens in _contexts(shape, request):
        plan = best_plan(shape, request, precision, ctx_tokens)
        if plan.fits:
            return plan, None
    assert plan is not None
    return plan, remedy_for(shape, request, plan)


def _contexts(shape: ModelShape, request: PlanRequest) -> Iterator[int]:
    if request.ctx_tokens is not None:
        if (request.prompt_tokens or 0) > request.ctx_tokens:
            raise UsageError(f"a prompt of {request.prompt_tokens} tokens exceeds the context of {request.ctx_tokens}")
        if request.ctx_tokens > shape.max_positions:
            raise UsageError(f"a context of {request.ctx_tokens} tokens is more than the model's {shape.max_positions}")
        yield request.ctx_tokens
        return
    tokens = min(MAX_AUTO_CTX, shape.max_positions)
    if (request.prompt_tokens or 0) > tokens:
        raise UsageError(f"a prompt of {request.prompt_tokens} tokens exceeds the largest context, {tokens}")
    yield tokens
    while (tokens := tokens // 2) >= max(MIN_AUTO_CTX, request.prompt_tokens or 0):
        yield tokens


def best_plan(shape: ModelShape, request: PlanRequest, precision: str, ctx_tokens: int) -> Plan:
    """The best plan at `ctx_tokens`; when none fits, the smallest one (its `fits` is False)."""
    prompt = ctx_tokens if request.prompt_tokens is None else request.prompt_tokens
    use = Usage(request.batch, prompt, ctx_tokens)
    best: Plan | None = None
    rungs = list(_rungs(shape, request))
    for kept_choices, slots, embeddings in rungs:
        plan = _largest_fitting(shape, request, use, kept_choices, slots, embeddings, precision)
        if plan is not None and (best is None or plan.density > best.density + _SECOND_SLOT_DENSITY):
            best = plan
        if best is not None and not best.streamed:
            break
    if best is not None:
        return best
    kept_choices, slots, embeddings = rungs[-1]
    return price(shape, request, use, kept_choices[0], slots, embeddings, precision)


_Rung = tuple[list[tuple[int, ...]], int, Placement]


def _rungs(shape: ModelShape, request: PlanRequest) -> Iterator[_Rung]:
    """Kept neurons to choose from (ascending), slots and placement of the embeddings, best first."""
    placements: tuple[Placement, ...] = ("device", "host")
    if shape.tied or not request.host_embeddings:
        placements = ("device",)
    everything = tuple(layer.neurons for layer in shape.layers)
    if request.density != "auto":
        densities = densities_per_layer(request.density, len(shape.layers))
        fixed = [tuple(neurons_kept(f, d) for f, d in zip(everything, densities, strict=True))]
        yield from ((fixed, slots, placement) for slots in SLOTS for placement in placements)
        return
    yield from (([everything], SLOTS[0], placement) for placement in placements)
    choices = pruned_choices(shape)
    # Embedding rows are a few kB a token; FF neurons kept instead are worth more than that.
    yield from ((choices, slots, placements[-1]) for slots in SLOTS)


def pruned_choices(shape: ModelShape) -> list[tuple[int, ...]]:
    """Kept neurons per layer for every density the planner considers, ascending, all below 1."""
    widest = max(layer.neurons for layer in shape.layers)
    step = NEURON_MULTIPLE if widest % NEURON_MULTIPLE == 0 and widest >= 4 * NEURON_MULTIPLE else 1
    lowest = math.ceil(widest * MIN_AUTO_DENSITY / step) * step
    kept_of_widest = range(lowest, widest, step) or [widest]  # one neuron a layer leaves no choice
    return [tuple(neurons_kept(layer.neurons, kept / widest) for layer in shape.layers) for kept in kept_of_widest]


def _largest_fitting(
    shape: ModelShape,
    request: PlanRequest,
    use: Usage,
    choices: list[tuple[int, ...]],
    slots: int,
    embeddings: Placement,
    precision: str,
) -> Plan | None:
    """Bisection: the peak grows with every kept neuron."""
    low, high, best = 0, len(choices) - 1, None
    while low <= high:
        middle = (low + high + 1) // 2
        plan = price(shape, request, use, choices[middle], slots, embeddings, precision)
        if plan.fits:
            best, low = plan, middle + 1
        else:
            high = middle - 1
    return best


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
    common = {"logits": logits_bytes(shape, use.batch), "overhead": request.overhead_bytes}
    prefill = {
        "kv_cache": kv_bytes(shape, use.batch, use.prompt_tokens, at_least=use.prompt_tokens),
        "slots": sum(sorted((shape.layers[i].ff_bytes for i in streamed), reverse=True)[:slots]),
        "workspace": workspace_bytes(shape, request, use, use.prompt_tokens, kept),
    }
    # A dynamic cache grows by copying: one layer's keys exist twice for a moment.
    one_layer = shape.kv_width * shape.item_bytes * use.batch * use.ctx_tokens // 2
    decode = {
        "kv_cache": kv_bytes(shape, use.batch, use.ctx_tokens, at_least=use.prompt_tokens),
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


def replan_for(shape: ModelShape, request: PlanRequest, plan: Plan, use: Usage) -> Plan:
    """The same residents under another use (batch, prompt, context); its `fits` says whether it is allowed."""
    slots = plan.slots or SLOTS[0]
    return price(shape, request, use, plan.kept, slots, plan.embeddings, plan.precision)


def describe_shortfall(plan: Plan, remedy: str) -> str:
    """The line a user sees when `plan` does not fit."""
    parts = ", ".join(f"{name.replace('_', ' ')} {format_bytes(n)}" for name, n in _by_size(plan.parts))
    return (
        f"needs {format_bytes(plan.peak_bytes)}, budget {format_bytes(plan.budget_bytes)} "
        f"(density {plan.density:.2f}, context {plan.context_tokens}: {parts}): try {remedy}"
    )


def _by_size(parts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(((n, b) for n, b in parts.items() if b), key=lambda item: -item[1])


def remedy_for(shape: ModelShape, request: PlanRequest, plan: Plan) -> str:
    """What to change so that `plan`'s model fits: the budget, always, and a context or density that would do."""
    remedies = [f"--max-gpu-mem {_rounded_up(plan.peak_bytes)}"]
    if request.density != "auto":
        automatic = best_plan(shape, replace(request, density="auto"), plan.precision, plan.context_tokens)
        if automatic.fits:
            remedies.append(f"--density {math.floor(automatic.density * 100) / 100:.2f} or auto")
    context = plan.context_tokens // 2
    # With a prompt in hand the context is not ours to shorten.
    while request.prompt_tokens is None and context >= 2:
        if best_plan(shape, request, plan.precision, context).fits:
            remedies.append(f"--ctx-size {context}")
            break
        context //= 2
    if (
        request.offloaded_in_budget
        and best_plan(shape, replace(request, offloaded_in_budget=False), plan.precision, plan.context_tokens).fits
    ):
        remedies.append("--offload disk")
    return " or ".join(remedies)


def _rounded_up(size_bytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if size_bytes >= factor:
            return f"{math.ceil(size_bytes / factor * 10) / 10:.1f}{unit}"
    return f"{math.ceil(size_bytes / 1000)}kB"
