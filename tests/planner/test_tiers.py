"""Plans whose neurons rest in several formats: within the budget, monotone in it, and the best that their bytes buy."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from griffin_offload import UsageError
from griffin_offload.blocks.layouts import build_on_meta
from griffin_offload.blocks.model_shape import model_shape
from griffin_offload.blocks.sizes import ModelSizes, NeuronSizes
from griffin_offload.config import FLOOR_AUTO_CTX, LAYERS, TIERS
from griffin_offload.formats import INT4, INT8, every, get
from griffin_offload.method.allocation import Counts
from griffin_offload.planner.request import PlanRequest
from griffin_offload.planner.solve import best_plan, make_plan, solve
from griffin_offload.planner.tiers import (
    bits_of,
    expected_error,
    least_bits,
    options_again,
    tiered_choices,
    tiers_within,
)

LLAMA = {"hidden_size": 256, "num_attention_heads": 8, "vocab_size": 1000, "max_position_embeddings": 2048}
TIER_FORMATS = tuple(format for format in every() if format.is_tier)


def _shapes(neurons: int = 1024, layers: int = 4) -> list[ModelSizes]:
    """In all precisions that "auto" would try, then in tiers."""
    meta = build_on_meta(LlamaConfig(intermediate_size=neurons, num_hidden_layers=layers, **LLAMA), torch.bfloat16)
    plain, int8, int4 = (model_shape(meta, get(name)) for name in ("none", "int8", "int4"))
    by_layers = model_shape(meta, INT8, levels=(INT8, INT4), head=INT8, by_layer=True)
    low = model_shape(meta, TIER_FORMATS[0], levels=TIER_FORMATS)
    return [plain, int8, by_layers, int4, dataclasses.replace(low, by_layer=True), low]


SHAPES = _shapes()


def _ff_bytes(shape: ModelSizes, counts: tuple[Counts, ...]) -> int:
    return sum(layer.resident_ff_bytes(own) for layer, own in zip(shape.layers, counts, strict=True))


@pytest.mark.parametrize("neurons", [1024, 1000, 96, 64, 40])
def test_choices_ascend_in_bytes_and_never_expect_more_error(neurons: int):
    shape = _shapes(neurons, 2)[-1]
    choices = tiered_choices(shape)
    found = [(_ff_bytes(shape, counts), expected_error(shape, counts), counts) for counts in choices]
    for before, now in itertools.pairwise(found):
        assert now[0] >= before[0]  # no neurons at all have the room of one block
        assert now[1] < before[1]
    assert sum(map(sum, choices[0])) >= 0.25 * 2 * neurons
    assert choices[-1] == ((neurons, *([0] * (len(TIER_FORMATS) - 1))),) * 2
    assert found[-1][1] == pytest.approx(TIER_FORMATS[0].distortion)
    # Blocks are whole: what is expected by neurons is what was allocated by blocks.
    for index, (_, error, _) in enumerate(found):
        assert error == pytest.approx(choices.allocation.distortion(choices.first + index), abs=1e-9)


@pytest.mark.slow
@settings(max_examples=12)
@given(st.lists(st.integers(2 * 10**6, 12 * 10**6), min_size=2, max_size=20), st.sampled_from([None, 300]))
def test_more_memory_never_expects_a_worse_answer(budgets: list[int], ctx_tokens: int | None):
    before = None
    for budget in sorted(budgets):
        plan, remedy = solve(SHAPES, PlanRequest(budget, ctx_tokens))
        if remedy is not None:
            assert before is None, "less was enough"
            continue
        assert plan.fits
        shape = next(s for s in SHAPES if (s.precision_name, s.level_names) == (plan.precision, plan.levels))
        now = expected_error(shape, plan.counts)
        assert before is None or now <= before
        before = now


@settings(max_examples=30)
@given(st.integers(10**6, 12 * 10**6))
def test_no_choice_that_fits_and_errs_less_is_missed(budget: int):
    shape, request = SHAPES[-1], PlanRequest(budget, 200)
    plan = best_plan(shape, request, 200)
    choices = tiered_choices(shape)
    index = list(choices).index(plan.counts)
    if plan.fits and index + 1 < len(choices):
        richer = dataclasses.replace(request, bits=bits_of(shape, choices[index + 1]))
        one = best_plan(shape, richer, 200)
        assert one.counts == choices[index + 1]
        # A second slot may cost so much.
        assert not one.fits or plan.slots == 2


def test_bits_that_are_asked_for():
    shape = SHAPES[-1]
    for bits in (2.0, 2.5, 3.0, 3.5, 4.0):
        counts = tiers_within(shape, bits)
        assert bits - 0.2 < bits_of(shape, counts) <= bits
        again = options_again(shape, counts)
        assert again == {"quantize": TIERS, "bits": bits_of(shape, counts), "density": "auto"}
        assert tiers_within(shape, again["bits"]) == counts
        plan = make_plan([shape], PlanRequest(10**8, bits=bits))
        assert plan.counts == counts
        assert sum(plan.tiers.values()) == sum(plan.kept)
        assert set(plan.tiers) == {format.name for format in TIER_FORMATS}
    assert tiers_within(shape, "auto") == tiered_choices(shape)[-1]
    with pytest.raises(UsageError, match=r"take .* bits a weight, and more"):
        tiers_within(shape, 0.3)


def test_layers_of_int8_and_of_int4():
    shape = SHAPES[2]
    choices = tiered_choices(shape)
    in_int8 = [[layer for layer, own in enumerate(counts) if own[0]] for counts in choices]
    assert in_int8 == [[3], [0, 3], [0, 1, 3], [0, 1, 2, 3]]
    for before, now in itertools.pairwise(choices):
        assert bits_of(SHAPES[3], [(1024,)] * 4) < bits_of(shape, before) < bits_of(shape, now)
        assert expected_error(shape, now) < expected_error(shape, before)
    for counts in choices:
        assert all(sum(own) == 1024 and 0 in own for own in counts)
        assert shape.choosing(counts) == ()  # nothing is streamed for a prompt
        again = options_again(shape, counts)
        assert tiers_within(shape, again["bits"]) == counts


def test_layers_of_int4_and_less():
    """One after the other goes from int2 to int3, and then to int4: the last one first."""
    shape = SHAPES[4]
    choices = tiered_choices(shape)
    levels = ["".join(str(own.index(1024)) for own in counts) for counts in choices]
    assert levels == ["2221", "1221", "1121", "1111", "1110", "0110", "0010", "0000"]
    for before, now in itertools.pairwise(choices):
        assert _ff_bytes(shape, before) < _ff_bytes(shape, now)
        assert expected_error(shape, now) < expected_error(shape, before)
    for counts in choices:
        assert shape.choosing(counts) == ()
        again = options_again(shape, counts)
        assert again["quantize"] == LAYERS
        assert make_plan(SHAPES[2:5:2], PlanRequest(10**8, bits=again["bits"])).counts == counts


@settings(max_examples=30, deadline=None)
@given(st.integers(18 * 10**5, 6 * 10**6), st.sampled_from([None, 300]))
def test_no_mixture_of_few_bits_that_fits_errs_less(budget: int, ctx_tokens: int | None):
    """Whether layers or tiers: compared with every one of both, at the context at which quality is solved."""
    request = PlanRequest(budget, ctx_tokens)
    plan, remedy = solve(SHAPES[4:], request)
    if remedy is not None or plan.context_tokens < (ctx_tokens or FLOOR_AUTO_CTX):
        return
    fitting = [
        expected_error(shape, counts)
        for shape in SHAPES[4:]
        for counts in tiered_choices(shape)
        if best_plan(
            shape, dataclasses.replace(request, bits=bits_of(shape, counts)), ctx_tokens or FLOOR_AUTO_CTX
        ).fits
    ]
    own = next(s for s in SHAPES[4:] if s.precision_name == plan.precision)
    # Where a second slot costs much one is planned for: the best with two may fit by more.
    assert expected_error(own, plan.counts) <= min(fitting) * 1.0001


@settings(max_examples=15)
@given(st.integers(15 * 10**5, 25 * 10**5), st.sampled_from([None, 300]))
def test_what_is_named_where_nothing_fits_is_the_smallest_and_enough(budget: int, ctx_tokens: int | None):
    request = PlanRequest(budget, ctx_tokens)
    plan, remedy = solve(SHAPES, request)
    if remedy is None:
        return
    assert plan.peak_bytes == min(solve([shape], request)[0].peak_bytes for shape in SHAPES[4:])
    assert solve(SHAPES, dataclasses.replace(request, budget_bytes=plan.peak_bytes))[1] is None


@settings(max_examples=20)
@given(st.floats(1.2, 9.0))
def test_bits_decide_between_layers_and_tiers(bits: float):
    """The least expected error of those bits; what is asked for is refused where it does not fit."""
    shapes = [SHAPES[2], SHAPES[4], SHAPES[5]]
    plan = make_plan(shapes, PlanRequest(10**8, bits=bits))
    shape = next(s for s in shapes if (s.precision_name, s.level_names) == (plan.precision, plan.levels))
    assert bits_of(shape, plan.counts) <= bits
    errors = [expected_error(one, tiers_within(one, bits)) for one in shapes if least_bits(one) <= bits]
    assert expected_error(shape, plan.counts) == min(errors)
    # With as much room as they want neurons that a prompt chooses are better than layers, but for those of int8.
    assert plan.precision == TIERS or plan.levels == SHAPES[2].level_names
    small, remedy = solve(shapes, PlanRequest(plan.resident_bytes, bits=bits))
    assert remedy is not None
    assert small.counts == plan.counts


def test_layers_of_one_format_are_not_streamed_and_those_of_several_are():
    shape = SHAPES[-1]
    whole = make_plan([shape], PlanRequest(10**8))
    assert whole.streamed == ()
    assert whole.kept == (1024,) * 4
    some = make_plan([shape], PlanRequest(10**8, bits=4.0))
    assert some.streamed == tuple(i for i, own in enumerate(some.counts) if sum(map(bool, own)) > 1)
    assert some.streamed


@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_layer_without_neurons_changes_no_choice(place: int):
    for shape in (SHAPES[2], SHAPES[4], SHAPES[5]):
        without = dataclasses.replace(
            shape.layers[0],
            neurons=0,
            own_width=0,
            ff_bytes=0,
            ff_flat_bytes=0,
            levels=(NeuronSizes(0),) * len(shape.levels),
        )
        more = dataclasses.replace(shape, layers=(*shape.layers[:place], without, *shape.layers[place:]))
        nothing = (0,) * len(shape.levels)
        for expected, found in zip(tiered_choices(shape), tiered_choices(more), strict=True):
            assert found == (*expected[:place], nothing, *expected[place:])
            assert expected_error(more, found) == expected_error(shape, expected)
            assert bits_of(more, found) == bits_of(shape, expected)
    again = options_again(
        dataclasses.replace(more, levels=shape.levels[:1]), [(512,)] * place + [(0,)] + [(512,)] * (4 - place)
    )
    assert again["density"] == [0.5] * place + [1.0] + [0.5] * (4 - place)


def test_a_plan_of_one_format_says_how_to_have_it_again():
    shape = SHAPES[3]
    plan = best_plan(shape, PlanRequest(10**8, density=0.5), 200)
    again = options_again(shape, plan.counts)
    assert again == {"quantize": "int4", "density": [0.5] * 4}
    assert plan.tiers == {}
