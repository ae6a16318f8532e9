"""The bytes of one combination: how many neurons, slots, where the embeddings are.

Two moments bind. At the end of prefill the residents, every layer's compact FF, the stream's slots, the KV cache
and the workspace of its last chunk are on the device at once; in decode the slots are gone, unless streamed passes
go on between tokens (exact mode, refresh). The KV cache is ours, and allocated for the whole context; a caller may
bring transformers' growing one, which is full in decode alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from griffin_offload.blocks.sizes import LayerSizes, ModelSizes
from griffin_offload.config import KVBits
from griffin_offload.kv_cache.workload import Workload, cache_parts
from griffin_offload.method.allocation import Counts, tier_shares, tiers_of
from griffin_offload.offload.weight_store import slot_bytes
from griffin_offload.planner.request import PlanRequest
from griffin_offload.planner.workspace import (
    chunk_tokens,
    graphs_bytes,
    logits_bytes,
    prompt_workspace_bytes,
    statistics_bytes,
    workspace_bytes,
)
from griffin_offload.units import format_bytes

EmbeddingDevice = Literal["device", "host"]


@dataclass(frozen=True)
class Plan:
    """A promise in bytes: what is resident, and the two peaks."""

    density: float
    """Kept neurons over all neurons."""
    counts: tuple[Counts, ...]
    """Kept neurons per layer, on each of `levels`."""
    streamed: tuple[int, ...]
    """Layers whose full FF passes through the slots for every prompt."""
    slots: int
    ff_chunk_tokens: int
    """Tokens of a sequence that pass a full FF at once."""
    embeddings: EmbeddingDevice
    precision: str
    levels: tuple[str, ...]
    """Formats of resident neurons, from the most bits to the fewest: the precision alone, or those of tiers."""
    as_held: bool
    """Whether matrices that the file holds in more bits rest in more, too."""
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
    active_experts: int = 0
    """Of a mixture of experts, how many a token is sent to, in the layer where it is sent to most."""
    expert_slots: int = 0
    """Experts of a layer that are there beside its residents while a prompt passes."""
    experts: tuple[int, int] | None = None
    """Of a mixture of experts, how many a layer keeps and has, in the layer that keeps the smallest share."""
    host_bytes: int = 0
    """Of host memory beside the files, at most, where the CPU computes what tokens miss: experts that are read or made
    for it. 0 where it does not, or nothing is missed."""

    @property
    def kept(self) -> tuple[int, ...]:
        """Kept neurons per layer."""
        return tuple(map(sum, self.counts))

    def counts_of(self, layer: int) -> Counts:
        """Neurons of a layer on those levels that have some."""
        return tuple(kept for _, kept in tiers_of(self.counts[layer]))

    @property
    def tiers(self) -> dict[str, int]:
        """Neurons of all layers by level; empty where there is one."""
        totals = dict(zip(self.levels, map(sum, zip(*self.counts, strict=True)), strict=True))
        return totals if len(totals) > 1 else {}

    @property
    def in_words(self) -> str:
        """The precision, of tiers their shares."""
        whole = f"{self.precision} and more" if self.as_held else self.precision
        return tier_shares(self.precision, self.tiers, self.density) if self.tiers else whole

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
            "tiers": self.tiers,
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
            "expert_slots": self.expert_slots,
            "host_bytes": self.host_bytes,
            "precision": self.precision,
            "tiers": self.tiers,
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
    """The largest layers that can be on their way at once, and the pages one of them is copied from; or all, where
    what is gathered looks there, too."""
    if request.offloaded_in_budget:
        return 0  # used where they rest
    dense = [i for i in streamed if not shape.layers[i].experts]
    largest = sorted((slot_bytes(shape.layers[i].ff_flat_bytes) for i in dense), reverse=True)[:slots]
    copied = sum(largest) if request.on_grids and not shape.is_plain else max(largest, default=0)
    return sum(largest) + int(copied * request.stored_share)


def _expert_slots(shape: ModelSizes, counts: tuple[Counts, ...], streamed: Sequence[int]) -> tuple[int, int]:
    """The fewest and the most experts of a layer that may be there beside its residents while a prompt passes: all of
    them, until it is known which ones stay. (0, 0) where none pass."""
    beside = [
        (shape.layers[i].neurons - sum(counts[i]), shape.layers[i].experts) for i in streamed if shape.layers[i].experts
    ]
    if not beside:
        return 0, 0
    most = max(max(count, 1) for count, _ in beside)
    return min(most, max(2, *(active for _, active in beside))), most


def _experts_bytes(shape: ModelSizes, request: PlanRequest, streamed: Sequence[int], count: int) -> int:
    """Of `count` experts beside the residents, in the layer where they are largest."""
    return max((_expert_bytes(shape, request, shape.layers[i], count) for i in streamed), default=0)


def _expert_bytes(shape: ModelSizes, request: PlanRequest, layer: LayerSizes, count: int) -> int:
    """Of `count` experts beside the residents, and of one that is made from what is stored, in floats and on its way;
    0 for a dense layer."""
    if not layer.experts:
        return 0
    made = shape.stored is not shape.precision or request.stored_share > 0
    sizes = shape.hidden_size, layer.width, shape.item_bytes
    making = layer.plain_neuron_bytes + shape.precision.gather_bytes(*sizes) if made else 0
    return count * layer.neuron_bytes + making


def _decode_workspace_bytes(shape: ModelSizes, request: PlanRequest, use: Workload, counts: tuple[Counts, ...]) -> int:
    """Of one token, and of the streamed passes between tokens."""
    passes = {1, min(max(use.pass_tokens, 1), use.ctx_tokens)}
    return max(workspace_bytes(shape, request, use, tokens, use.ctx_tokens, counts) for tokens in passes)


def _resident_parts(
    shape: ModelSizes, counts: tuple[Counts, ...], streamed: Sequence[int], embeddings: EmbeddingDevice
) -> tuple[dict[str, int], dict[str, int]]:
    """Weights on the device by part, in their precision and in the stored one."""
    passing = frozenset(streamed)
    resident = {
        "attention": sum(layer.attention_bytes for layer in shape.layers),
        "norms": sum(layer.norm_bytes for layer in shape.layers) + shape.other_bytes,
        "embeddings": shape.embedding_bytes if embeddings == "device" else 0,
        "head": shape.head_bytes,
        "feed_forward": sum(
            layer.resident_ff_bytes(counts[i], streamed=i in passing) for i, layer in enumerate(shape.layers)
        ),
    }
    plain = resident | {
        "attention": sum(layer.plain_attention_bytes for layer in shape.layers),
        "embeddings": shape.plain_embedding_bytes if embeddings == "device" else 0,
        "head": shape.plain_embedding_bytes if shape.head_is_copy else shape.plain_head_bytes,
        "feed_forward": sum(
            sum(own) * layer.plain_neuron_bytes for own, layer in zip(counts, shape.layers, strict=True)
        ),
    }
    return resident, plain


def _density(shape: ModelSizes, counts: tuple[Counts, ...]) -> float:
    """Of neurons, or where there are experts, of these."""
    counted = [i for i, layer in enumerate(shape.layers) if bool(layer.experts) == shape.has_experts]
    total = sum(shape.layers[i].neurons for i in counted)
    return sum(sum(counts[i]) for i in counted) / total if total else 1.0


def _experts(shape: ModelSizes, counts: tuple[Counts, ...]) -> tuple[int, int] | None:
    pairs = [(sum(own), layer.neurons) for own, layer in zip(counts, shape.layers, strict=True) if layer.experts]
    return min(pairs, key=lambda pair: pair[0] / pair[1], default=None)


def _moments(
    shape: ModelSizes,
    request: PlanRequest,
    use: Workload,
    counts: tuple[Counts, ...],
    streamed: Sequence[int],
    slot_bytes: tuple[int, int],
) -> tuple[dict[str, int], dict[str, int]]:
    """What is beside the weights at the end of prefill and in decode, by part; `slot_bytes` are of these two."""
    common = {
        "states": use.batch * shape.states_kept_bytes(use.pass_tokens),
        "logits": logits_bytes(shape, use),
        "statistic": request.sequences * statistics_bytes(shape, request, use, counts, streamed),
        "graphs": graphs_bytes(shape, request, use, counts),
        "sessions": request.session_bytes,
        "overhead": request.overhead_bytes,
    }
    workspaces = (
        prompt_workspace_bytes(shape, request, use, counts),
        _decode_workspace_bytes(shape, request, use, counts),
    )
    found = []
    for decoding, workspace in enumerate(workspaces):
        kv_cache, beside = cache_parts(shape, use, request.kv_bits, decoding=bool(decoding))
        own = {"kv_cache": request.sequences * kv_cache, "slots": slot_bytes[decoding], "workspace": workspace + beside}
        found.append(own | common)
    prefill, decode = found
    if request.converted_bytes or any(request.converted_ff):
        settled = sum(size for i, size in enumerate(request.converted_ff) if i not in streamed)
        prefill["converted"], decode["converted"] = request.converted_bytes + settled, 0
    return prefill, decode


def as_loaded(request: PlanRequest, plan: Plan) -> PlanRequest:
    """The request with what was solved when the model was loaded, and is fixed since."""
    solved = replace(request, ff_chunk_tokens=plan.ff_chunk_tokens, expert_slots=plan.expert_slots)
    return replace(solved, kv_bits=plan.kv_bits, halves_kv=False)


def price(
    shape: ModelSizes,
    request: PlanRequest,
    use: Workload,
    counts: tuple[Counts, ...],
    slots: int,
    embeddings: EmbeddingDevice,
) -> Plan:
    """The bytes of one combination, whether it fits or not; with as many slots for experts as there is room for."""
    plan = _priced(shape, request, use, counts, slots, embeddings)
    if plan.fits or request.expert_slots is not None:
        return plan
    fewest, most = _expert_slots(shape, counts, plan.streamed)
    size = max((shape.layers[i].neuron_bytes for i in plan.streamed if shape.layers[i].experts), default=0)
    if fewest == most or not size:
        return plan
    fitting = most - -(-(plan.peak_bytes - plan.budget_bytes) // size)
    return _priced(shape, replace(request, expert_slots=max(fewest, fitting)), use, counts, slots, embeddings)


def _priced(
    shape: ModelSizes,
    request: PlanRequest,
    use: Workload,
    counts: tuple[Counts, ...],
    slots: int,
    embeddings: EmbeddingDevice,
) -> Plan:
    # Neurons in fewer bits than all else draft for the stored ones, which every pass brings.
    everything = request.always_stream or (request.verifies and shape.precision not in shape.levels)
    streamed = shape.with_neurons if everything else shape.choosing(counts)
    slots = min(slots, len(streamed))
    resident, plain = _resident_parts(shape, counts, streamed, embeddings)
    if request.offloaded_in_budget:
        resident["offloaded"] = sum(shape.layers[i].ff_flat_bytes for i in streamed)
    elif any(request.converted_ff):
        resident["offloaded"] = sum(request.converted_ff[i] for i in streamed)
    _, most = _expert_slots(shape, counts, streamed)
    expert_slots = most if request.expert_slots is None else request.expert_slots
    in_slots = _slot_bytes(shape, request, streamed, slots) + _experts_bytes(shape, request, streamed, expert_slots)
    missed = shape.expert_slots_in_decode(expert_slots)
    missing = _experts_bytes(shape, request, streamed, 0 if request.host_computes else missed)
    in_decode = in_slots if use.pass_tokens else missing
    prefill, decode = _moments(shape, request, use, counts, streamed, (in_slots, in_decode))
    return Plan(
        density=_density(shape, counts),
        experts=_experts(shape, counts),
        active_experts=max(layer.experts for layer in shape.layers),
        expert_slots=expert_slots,
        host_bytes=_experts_bytes(shape, request, streamed, missed) if request.host_computes else 0,
        counts=counts,
        streamed=streamed,
        slots=slots,
        ff_chunk_tokens=chunk_tokens(shape, request, use.batch),
        embeddings=embeddings,
        precision=shape.precision_name,
        levels=shape.level_names,
        as_held=shape.as_held,
        context_tokens=use.ctx_tokens,
        prompt_tokens=use.prompt_tokens,
        batch=use.batch,
        kv_bits=request.kv_bits,
        budget_bytes=request.budget_bytes,
        prefill_parts=resident | prefill,
        decode_parts=resident | decode,
        plain_parts=plain,
        full_bytes=shape.weight_bytes,
        streamed_bytes=sum(shape.layers[i].ff_bytes for i in streamed),
    )


def describe_shortfall(plan: Plan, remedy: str) -> str:
    """The line a user sees when `plan` does not fit."""
    parts = ", ".join(f"{name.replace('_', ' ')} {format_bytes(n)}" for name, n in _by_size(plan.parts))
    return (
        f"needs {format_bytes(plan.peak_bytes)}, budget {format_bytes(plan.budget_bytes)} "
        f"(density {plan.density:.2f}{_of_experts(plan)}, context {plan.context_tokens}: {parts}): try {remedy}"
    )


def _of_experts(plan: Plan) -> str:
    if plan.experts is None:
        return ""
    fewest = ", as many as a token is sent to" if plan.experts[0] <= plan.active_experts else ""
    return f", {plan.experts[0]} of {plan.experts[1]} experts a layer{fewest}"


def _by_size(parts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(((n, b) for n, b in parts.items() if b), key=lambda item: -item[1])
