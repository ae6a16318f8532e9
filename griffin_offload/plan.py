"""The plan: sizes and a budget in, a density or a named shortfall out, before any weight is read."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from griffin_offload.config import MAX_AUTO_CTX, MIN_AUTO_CTX, MIN_AUTO_DENSITIES, MIN_AUTO_DENSITY, NEURON_MULTIPLE
from griffin_offload.errors import DoesNotFit, UsageError
from griffin_offload.method.selection import densities_per_layer, neurons_kept
from griffin_offload.pricing import Placement, Plan, PlanRequest, Usage, planned_use, price
from griffin_offload.units import format_bytes
from griffin_offload.weights.shape import ModelShape

# One layer computes while the next one is read; one slot alone works, without the overlap.
SLOTS = (2, 1)
# The second slot is given up when it would cost more density than this: quality lasts, prefill passes. A slot is
# 1/L of all FFs, so this concerns models of a few layers, and budgets where two slots fit nothing at all.
_SECOND_SLOT_DENSITY = 0.05


def make_plan(shapes: Sequence[ModelShape], request: PlanRequest, others: Sequence[ModelShape] = ()) -> Plan:
    """The best plan that fits the budget; DoesNotFit names the shortfall and the remedy."""
    plan, remedy = solve(shapes, request, others)
    if remedy is not None:
        raise DoesNotFit(describe_shortfall(plan, remedy))
    return plan


def solve(
    shapes: Sequence[ModelShape], request: PlanRequest, others: Sequence[ModelShape] = ()
) -> tuple[Plan, str | None]:
    """The best plan that fits and None, or the smallest one that does not and what to change.

    `shapes` are the model in the precisions to choose from, best first. Best is the first rung of the ladder that
    fits: everything resident in 16 bit; in 8; in 8 with the largest density of a half or more; in 4 with the largest.
    With one precision: everything resident, else the largest density. A second slot is kept if it costs little
    density, and the embeddings go to the host where that keeps more neurons. `others` are precisions that were not
    asked for: a remedy.
    """
    plan = None
    for ctx_tokens in _contexts(shapes[0], request):
        for shape, rung in _ladder(shapes, request):
            plan = best_plan(shape, rung, ctx_tokens)
            if plan.fits:
                return plan, None
    assert plan is not None
    remedy = remedy_for(shapes[-1], request, plan)
    for shape in others:
        if best_plan(shape, request, plan.context_tokens).fits:
            other = f"a copy converted to {shape.precision}" if request.verifies else f"--quantize {shape.precision}"
            return plan, f"{remedy} or {other}"
    return plan, remedy


def _ladder(shapes: Sequence[ModelShape], request: PlanRequest) -> Iterator[tuple[ModelShape, PlanRequest]]:
    """What to try, best first."""
    for shape in shapes:
        if len(shapes) > 1 and request.density == "auto":
            # A neuron in fewer bits is worth more than none: pruning begins at 8 bit, below a half at 4.
            lowest = MIN_AUTO_DENSITIES[shape.precision]
            yield shape, replace(request, density=1.0 if lowest == 1 else "auto", min_density=lowest)
        else:
            yield shape, request


def alternatives(shapes: Sequence[ModelShape], request: PlanRequest, ctx_tokens: int) -> list[Plan]:
    """The largest plan of every precision, and its dense one, that fit at `ctx_tokens`."""
    found = [
        best_plan(shape, replace(request, density=density), ctx_tokens) for shape in shapes for density in (1.0, "auto")
    ]
    return [plan for i, plan in enumerate(found) if plan.fits and plan not in found[:i]]


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


def best_plan(shape: ModelShape, request: PlanRequest, ctx_tokens: int) -> Plan:
    """The best plan at `ctx_tokens`; when none fits, the smallest one (its `fits` is False)."""
    prompt = ctx_tokens if request.prompt_tokens is None else request.prompt_tokens
    use = planned_use(request, prompt, ctx_tokens)
    best: Plan | None = None
    rungs = list(_rungs(shape, request))
    for kept_choices, slots, embeddings in rungs:
        plan = _largest_fitting(shape, request, use, kept_choices, slots, embeddings)
        if plan is not None and (best is None or plan.density > best.density + _SECOND_SLOT_DENSITY):
            best = plan
        if best is not None and not best.streamed:
            break
    if best is not None:
        return best
    kept_choices, slots, embeddings = rungs[-1]
    return price(shape, request, use, kept_choices[0], slots, embeddings)


class _Choices(Sequence[tuple[int, ...]]):
    """Kept neurons per layer, made when asked for: a config may promise more neurons than a list has room for."""

    def __init__(self, neurons: tuple[int, ...], kept_of_widest: Sequence[int]) -> None:
        self._neurons, self._kept, self._widest = neurons, kept_of_widest, max(neurons)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        density = self._kept[index] / self._widest
        return tuple(neurons_kept(neurons, density) for neurons in self._neurons)


_Rung = tuple[Sequence[tuple[int, ...]], int, Placement]


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
    # Where nothing is streamed there are no slots.
    of_everything = SLOTS if request.always_stream else SLOTS[:1]
    yield from (([everything], slots, placement) for slots in of_everything for placement in placements)
    choices = pruned_choices(shape, request.min_density)
    # Embedding rows are a few kB a token; FF neurons kept instead are worth more than that.
    yield from ((choices, slots, placements[-1]) for slots in SLOTS)


def pruned_choices(shape: ModelShape, min_density: float = MIN_AUTO_DENSITY) -> Sequence[tuple[int, ...]]:
    """Kept neurons per layer for every density the planner considers, ascending, all below 1."""
    widest = max(layer.neurons for layer in shape.layers)
    step = NEURON_MULTIPLE if widest % NEURON_MULTIPLE == 0 and widest >= 4 * NEURON_MULTIPLE else 1
    lowest = math.ceil(widest * min_density / step) * step
    kept_of_widest = range(lowest, widest, step) or [widest]  # one neuron a layer leaves no choice
    return _Choices(tuple(layer.neurons for layer in shape.layers), kept_of_widest)


def _largest_fitting(
    shape: ModelShape,
    request: PlanRequest,
    use: Usage,
    choices: Sequence[tuple[int, ...]],
    slots: int,
    embeddings: Placement,
) -> Plan | None:
    """Bisection: the peak grows with every kept neuron."""
    low, high, best = 0, len(choices) - 1, None
    while low <= high:
        middle = (low + high + 1) // 2
        plan = price(shape, request, use, choices[middle], slots, embeddings)
        if plan.fits:
            best, low = plan, middle + 1
        else:
            high = middle - 1
    return best


def replan_for(shape: ModelShape, request: PlanRequest, plan: Plan, use: Usage) -> Plan:
    """The same residents under another use (batch, prompt, context); its `fits` says whether it is allowed."""
    return price(shape, as_loaded(request, plan), use, plan.kept, plan.slots, plan.embeddings)


def as_loaded(request: PlanRequest, plan: Plan) -> PlanRequest:
    """The request with what was solved when the model was loaded, and is fixed since."""
    return replace(request, ff_chunk_tokens=plan.ff_chunk_tokens)


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
