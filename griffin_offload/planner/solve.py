"""The plan: sizes and a budget in, a density or a named shortfall out, before any weight is read."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from griffin_offload.blocks.sizes import LayerSizes, ModelSizes
from griffin_offload.config import FLOOR_AUTO_CTX, MAX_AUTO_CTX, MIN_AUTO_CTX, MIN_AUTO_DENSITY, NEURON_MULTIPLE
from griffin_offload.errors import DoesNotFit, UsageError
from griffin_offload.kv_cache.workload import Workload, cache_parts, halves_again
from griffin_offload.method.allocation import Counts
from griffin_offload.method.selection import densities_per_layer, neurons_kept
from griffin_offload.offload.weight_store import slot_bytes
from griffin_offload.planner.plan import EmbeddingDevice, Plan, as_loaded, describe_shortfall, price
from griffin_offload.planner.request import PlanRequest, planned_use
from griffin_offload.planner.tiers import expected_error, least_bits, tiered_choices, tiers_within
from griffin_offload.planner.workspace import statistics_bytes

# One layer computes while the next one is read; one slot alone works, without the overlap.
SLOTS = (2, 1)
# A second slot that costs more density than this is given up for neurons: quality lasts, prefill passes. A slot is 1/L
# of all FFs as they are stored, so this concerns models of a few layers, and 4-bit residents of a 16-bit checkpoint.
_SECOND_SLOT_DENSITY = 0.05
# A context that is solved comes in steps of so many tokens.
_CTX_STEP = 64


def make_plan(shapes: Sequence[ModelSizes], request: PlanRequest, others: Sequence[ModelSizes] = ()) -> Plan:
    """The best plan that fits the budget; DoesNotFit names the shortfall and the remedy."""
    plan, remedy = solve(shapes, request, others)
    if remedy is not None:
        raise DoesNotFit(describe_shortfall(plan, remedy))
    return plan


def solve(
    shapes: Sequence[ModelSizes], request: PlanRequest, others: Sequence[ModelSizes] = ()
) -> tuple[Plan, str | None]:
    """The best plan that fits and None, or the smallest one that does not and what to change.

    `shapes` are the model in the precisions to choose from, best first. Best is the first rung of the ladder that
    fits: all neurons in each precision, and only then fewer neurons, as many as fit, in the last; each with a KV cache
    in 16 bits and then, where that is allowed, in 8. Of mixtures of fewer bits, which all share a rung, it is the one
    that is expected to err least. Without `ctx_tokens` that is asked at the context's floor; what is
    left over lengthens a context in 16 bits, then pays for a second slot and for embeddings on the device. Where not
    even the last rung has room for the floor, the context shrinks.
    So more memory never gives fewer bits or neurons, nor, with as many of both, a shorter context. `others` are
    precisions that were not asked for: a remedy.
    """
    shape, rung, plan = _best(shapes, request)
    if plan.fits:
        return plan, None
    remedy = remedy_for(shape, rung, plan)
    for shape in others:
        if best_plan(shape, rung, plan.context_tokens).fits:
            other = f"a copy converted to {shape.precision}" if request.verifies else f"--quantize {shape.option}"
            return plan, f"{remedy} or {other}"
    return plan, remedy


def _best(shapes: Sequence[ModelSizes], request: PlanRequest) -> tuple[ModelSizes, PlanRequest, Plan]:
    """The plan of `solve`, the sizes that it is of, and the rung of the ladder that it stands on."""
    contexts, shapes = _contexts(shapes[0], request), _of_bits(shapes, request)
    for choices, rung in _ladder(shapes, request):
        found = [(shape, *_best_quality(shape, rung, contexts.floor)) for shape in choices]
        if any(plan.fits for _, plan, _ in found):
            shape, plan, grows = _least_error(found)
            if grows and rung.kv_bits == request.kv_bits:
                plan = _lengthened(shape, rung, plan, contexts.floor, contexts.most)
            return shape, rung, _with_the_rest(shape, rung, plan)
    least, floor = contexts.least, contexts.floor
    found = [(shape, _lengthened(shape, rung, plan, least, floor), grows) for shape, plan, grows in found]
    shape, plan, _ = _least_error(found)
    return shape, rung, _with_the_rest(shape, rung, plan) if plan.fits else plan


_Found = tuple[ModelSizes, Plan, bool]


def _least_error(found: list[_Found]) -> _Found:
    """Of plans those that fit, and of these the one that is expected to err least; where none fits, the smallest."""
    fitting = [one for one in found if one[1].fits]
    if len(fitting) > 1:
        return min(fitting, key=lambda one: expected_error(one[0], one[1].counts) or 0)
    return fitting[0] if fitting else min(found, key=lambda one: one[1].peak_bytes)


def _of_bits(shapes: Sequence[ModelSizes], request: PlanRequest) -> Sequence[ModelSizes]:
    """That of `shapes` which is expected to err least in the bits that were asked for."""
    bits = request.bits
    if isinstance(bits, str):
        return shapes
    mixed = [shape for shape in reversed(shapes) if len(shape.levels) > 1 and least_bits(shape) <= bits]
    if not mixed:
        return shapes[-1:]
    return [min(mixed, key=lambda shape: expected_error(shape, tiers_within(shape, bits)) or 0)]


def _ladder(shapes: Sequence[ModelSizes], request: PlanRequest) -> Iterator[tuple[list[ModelSizes], PlanRequest]]:
    """What to try, best first: a neuron in fewer bits is worth more than none, and a KV cache in 8 bits costs less than
    matrices in fewer."""
    for _, group in itertools.groupby(shapes, key=lambda shape: (len(shape.levels) > 1, shape.precision)):
        choices = list(group)
        whole = replace(request, density=1.0) if request.density == "auto" else request
        asked = request if choices[-1] is shapes[-1] or len(choices[0].levels) > 1 else whole
        if request.halves_kv:
            yield choices[:1], whole
            asked = replace(asked, kv_bits=8)
        yield choices, asked


def alternatives(shapes: Sequence[ModelSizes], request: PlanRequest, ctx_tokens: int) -> list[Plan]:
    """The largest plan of every precision, and its dense one, that fit at `ctx_tokens`; tiers where they are some."""
    found: list[Plan] = []
    for shape in shapes:
        tiered = len(shape.levels) > 1
        if tiered and not isinstance(request.bits, str) and least_bits(shape) > request.bits:
            continue
        for density in ("auto",) if tiered else (1.0, "auto"):
            *_, plan = _best([shape], replace(request, density=density, ctx_tokens=ctx_tokens))
            if plan.fits and plan not in found and not (tiered and plan.counts == tiers_within(shape, "auto")):
                found.append(plan)
    return found


@dataclass(frozen=True)
class _Contexts:
    """Tokens that a context may have: quality is solved at `floor`."""

    least: int
    floor: int
    most: int


def _contexts(shape: ModelSizes, request: PlanRequest) -> _Contexts:
    prompt, given = request.prompt_tokens or 0, request.ctx_tokens
    if given is not None:
        if prompt > given:
            raise UsageError(f"a prompt of {prompt} tokens exceeds the context of {given}")
        if given > shape.max_positions:
            of_prompt = f" of {prompt} tokens" if prompt else ""
            raise UsageError(
                f"a context of {given} tokens is more than the model's {shape.max_positions}: shorten the prompt"
                f"{of_prompt}, or take a smaller -n or --ctx-size (ctx_size)"
            )
        return _Contexts(given, given, given)
    most = min(MAX_AUTO_CTX, shape.max_positions)
    if prompt > most:
        raise UsageError(f"a prompt of {prompt} tokens exceeds the largest context, {most}")
    return _Contexts(*(max(min(tokens, most), prompt) for tokens in (MIN_AUTO_CTX, FLOOR_AUTO_CTX, most)))


def best_plan(shape: ModelSizes, request: PlanRequest, ctx_tokens: int) -> Plan:
    """The best plan at `ctx_tokens`; when none fits, the smallest one (its `fits` is False)."""
    return _with_the_rest(shape, request, _best_quality(shape, request, ctx_tokens)[0])


def _best_quality(shape: ModelSizes, request: PlanRequest, ctx_tokens: int) -> tuple[Plan, bool]:
    """As many neurons as fit at `ctx_tokens`, and whether what is left over may lengthen the context: not where it was
    too little for the slots. When none fits, the smallest plan."""
    use = _use(request, ctx_tokens)
    placement = _placements(shape, request)[-1]
    for rung in _rungs(shape, request):
        plan = _largest_fitting(shape, request, use, rung.choices, rung.slots, placement)
        if plan is not None:
            return plan, rung.grows
    return price(shape, request, use, rung.choices[0], rung.slots, placement), rung.grows


def _lengthened(shape: ModelSizes, request: PlanRequest, plan: Plan, least: int, most: int) -> Plan:
    """`plan` with the longest context from `least` to `most` tokens that fits; with `least` where none does."""
    lengths = sorted({least, most, *range(-(-least // _CTX_STEP) * _CTX_STEP, most, _CTX_STEP)})

    def of_length(tokens: int) -> Plan:
        return replan_for(shape, request, plan, _use(request, tokens))

    return _last_fitting(len(lengths), lambda i: of_length(lengths[i])) or of_length(least)


def _with_the_rest(shape: ModelSizes, request: PlanRequest, plan: Plan) -> Plan:
    """`plan` with what makes it faster and nothing better, as far as there is room: a second slot, then embeddings on
    the device."""
    use = _use(request, plan.context_tokens)
    for slots, placement in ((SLOTS[0], plan.embeddings), (plan.slots, _placements(shape, request)[0])):
        richer = price(shape, request, use, plan.counts, max(slots, plan.slots), placement)
        if plan.fits and richer.fits:
            plan = richer
    return plan


def _use(request: PlanRequest, ctx_tokens: int) -> Workload:
    prompt = ctx_tokens if request.prompt_tokens is None else request.prompt_tokens
    return planned_use(request, prompt, ctx_tokens)


class _Choices(Sequence[tuple[Counts, ...]]):
    """Kept neurons per layer, made when asked for: a config may promise more neurons than a list has room for."""

    def __init__(self, shape: ModelSizes, kept_of_widest: Sequence[int]) -> None:
        self._shape, self._kept, self._widest = shape, kept_of_widest, _widest(shape)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        density = self._kept[index] / self._widest
        return tuple((max(_kept_at(self._shape, layer, density), layer.experts),) for layer in self._shape.layers)


def _kept_at(shape: ModelSizes, layer: LayerSizes, density: float) -> int:
    """Dense layers beside experts stay whole: a density is the experts' there."""
    whole = shape.has_experts and not layer.experts
    return layer.neurons if whole else neurons_kept(layer.neurons, density)


def _widest(shape: ModelSizes) -> int:
    """Neurons, or experts, of the layer that has most."""
    return max(layer.neurons for layer in shape.layers if bool(layer.experts) == shape.has_experts)


def _check_experts(shape: ModelSizes, counts: Sequence[Counts]) -> None:
    """UsageError where a layer would keep fewer experts than a token is sent to."""
    for index, (layer, count) in enumerate(zip(shape.layers, map(sum, counts), strict=True)):
        if count < layer.experts:
            raise UsageError(
                f"layer {index} would keep {count} of {layer.neurons} experts, and a token is sent to {layer.experts}: "
                f"the density is at least {math.ceil(layer.experts / layer.neurons * 100) / 100:.2f}"
            )


@dataclass(frozen=True)
class _Candidate:
    """Kept neurons to choose from (ascending) with so many slots."""

    choices: Sequence[tuple[Counts, ...]]
    slots: int
    grows: bool = True
    """Whether the context may grow: not where one slot is all there is room for, so that it does not have to shrink
    for the second one when there is more."""


def _rungs(shape: ModelSizes, request: PlanRequest) -> Iterator[_Candidate]:
    """Best first. Which of them has two slots is a matter of the model, not of the budget: with more memory a second
    one must not cost neurons."""
    two, one = SLOTS
    wanted = _wanted(shape, request)
    yield _Candidate([wanted], two)
    yield _Candidate([wanted], one, grows=False)
    if request.density != "auto" or request.bits != "auto" or not shape.with_neurons:
        return
    choices = pruned_choices(shape)
    if _second_slot_density(shape, request) > _SECOND_SLOT_DENSITY:
        yield _Candidate(choices, one)
        return
    yield _Candidate(choices, two)
    yield _Candidate([choices[0]], one, grows=False)


def _wanted(shape: ModelSizes, request: PlanRequest) -> tuple[Counts, ...]:
    """All neurons in the most bits, or what was asked for."""
    if len(shape.levels) > 1:
        return tiers_within(shape, request.bits)
    if request.density == "auto":
        return tuple((layer.neurons,) for layer in shape.layers)
    densities = densities_per_layer(request.density, len(shape.layers))
    counts = tuple((_kept_at(shape, one, d),) for one, d in zip(shape.layers, densities, strict=True))
    if request.always_stream and request.density == 0:  # a measurement, for which nothing need stay
        counts = tuple((max(*own, one.experts),) for own, one in zip(counts, shape.layers, strict=True))
    _check_experts(shape, counts)
    return counts


def _second_slot_density(shape: ModelSizes, request: PlanRequest) -> float:
    """What a second slot costs in kept neurons, at most."""
    if request.offloaded_in_budget:
        return 0.0  # there are no slots
    if shape.has_experts:
        return 0.0  # they pass one by one
    slot = slot_bytes(max(layer.ff_flat_bytes for layer in shape.layers))
    return slot / max(sum(layer.neurons * layer.neuron_bytes for layer in shape.layers), 1)


def _placements(shape: ModelSizes, request: PlanRequest) -> tuple[EmbeddingDevice, ...]:
    """Where the embeddings may be, the cheapest last: a token looks up a few kB of them. A table that the head is made
    of is not on the device twice."""
    if shape.head_is_copy:
        return ("host",)
    return ("device",) if shape.tied or not request.host_embeddings else ("device", "host")


def pruned_choices(shape: ModelSizes) -> Sequence[tuple[Counts, ...]]:
    """Kept neurons per layer for every density the planner considers, ascending, all below 1; of tiers, for every
    number of bytes."""
    if len(shape.levels) > 1:
        return tiered_choices(shape)
    widest = _widest(shape)
    if shape.has_experts:
        fewest = max(math.ceil(one.experts * widest / one.neurons) for one in shape.layers if one.experts)
        return _Choices(shape, range(fewest, widest) or [widest])
    step = NEURON_MULTIPLE if widest % NEURON_MULTIPLE == 0 and widest >= 4 * NEURON_MULTIPLE else 1
    lowest = math.ceil(widest * MIN_AUTO_DENSITY / step) * step
    kept_of_widest = range(lowest, widest, step) or [widest]  # one neuron a layer leaves no choice
    return _Choices(shape, kept_of_widest)


def _largest_fitting(
    shape: ModelSizes,
    request: PlanRequest,
    use: Workload,
    choices: Sequence[tuple[Counts, ...]],
    slots: int,
    embeddings: EmbeddingDevice,
) -> Plan | None:
    return _last_fitting(len(choices), lambda i: price(shape, request, use, choices[i], slots, embeddings))


def _last_fitting(count: int, plan_of: Callable[[int], Plan]) -> Plan | None:
    """The last of `count` plans that fits, by bisection: their peaks grow. None where none does."""
    low, high, best = 0, count - 1, None
    while low <= high:
        middle = (low + high + 1) // 2
        plan = plan_of(middle)
        if plan.fits:
            best, low = plan, middle + 1
        else:
            high = middle - 1
    return best


def replan_for(shape: ModelSizes, request: PlanRequest, plan: Plan, use: Workload) -> Plan:
    """The same residents under another use (batch, prompt, context); its `fits` says whether it is allowed."""
    return price(shape, as_loaded(request, plan), use, plan.counts, plan.slots, plan.embeddings)


def replan_beside(
    shape: ModelSizes, request: PlanRequest, plan: Plan, use: Workload, passing: Sequence[Workload], decoding: int
) -> Plan:
    """`replan_for` one sequence whose prompt passes together with those of `passing`, which hold nothing yet, beside
    so many that are decoded, whose bytes are among the request's of sessions."""
    own = [
        sum(cache_parts(shape, other, plan.kv_bits, decoding=True))
        + statistics_bytes(shape, request, other, plan.counts, plan.streamed)
        for other in passing
    ]
    request = replace(request, session_bytes=request.session_bytes + sum(own), sequences=1)
    return replan_for(shape, request, plan, use.among(passing, decoding))


def remedy_for(shape: ModelSizes, request: PlanRequest, plan: Plan) -> str:
    """What to change so that `plan`'s model fits: the budget, always, and a context, a density or a KV cache that would
    do."""
    remedies = [f"--max-gpu-mem {_rounded_up(plan.peak_bytes)}"]
    if request.density != "auto":
        automatic = best_plan(shape, replace(request, density="auto"), plan.context_tokens)
        if automatic.fits:
            remedies.append(f"--density {math.floor(automatic.density * 100) / 100:.2f} or auto")
    context = plan.context_tokens // 2
    # With a prompt in hand the context is not ours to shorten.
    while request.prompt_tokens is None and context >= 2:
        if best_plan(shape, request, context).fits:
            remedies.append(f"--ctx-size {context}")
            break
        context //= 2
    if (
        request.kv_bits == 8
        and halves_again(shape)
        and best_plan(shape, replace(request, kv_bits=4), plan.context_tokens).fits
    ):
        remedies.append("--kv-bits 4")
    if (
        request.offloaded_in_budget
        and best_plan(shape, replace(request, offloaded_in_budget=False), plan.context_tokens).fits
    ):
        remedies.append("--offload disk")
    return " or ".join(remedies)


def _rounded_up(size_bytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if size_bytes >= factor:
            return f"{math.ceil(size_bytes / factor * 10) / 10:.1f}{unit}"
    return f"{math.ceil(size_bytes / 1000)}kB"
