"""The allocation against brute force: no other counts of as few bytes err less."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from griffin_offload.method.allocation import Allocation, Level, bits_gained, typical_energies
from griffin_offload.method.selection import split_levels

LEVELS = (Level(8.1, 1e-4), Level(4.5, 0.008), Level(3.5, 0.033), Level(2.5, 0.14))


def _energies(draw: st.DrawFn, neurons: int) -> Tensor:
    values = st.floats(0, 100) | st.floats(1e-3, 1)
    return torch.tensor(draw(st.lists(values, min_size=neurons, max_size=neurons)), dtype=torch.float64)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], list[list[Level]]]:
    """One or two layers of a few neurons with up to three levels, on the hull of bytes and distortion or not."""
    level = st.builds(Level, st.floats(0.5, 9).map(lambda b: round(b, 2)), st.floats(0, 0.9))
    energies = [_energies(draw, draw(st.integers(1, 3))) for _ in range(draw(st.integers(1, 2)))]
    levels = draw(st.lists(level, min_size=1, max_size=3, unique_by=lambda one: one.neuron_bytes))
    levels.sort(key=lambda one: -one.neuron_bytes)
    return energies, [[Level(one.neuron_bytes * (1 + i), one.distortion) for one in levels] for i in range(2)][
        : len(energies)
    ]


def _taken(counts: tuple[tuple[int, ...], ...], levels: list[list[Level]]) -> float:
    pairs = itertools.chain.from_iterable(zip(c, own, strict=True) for c, own in zip(counts, levels, strict=True))
    return sum(count * level.neuron_bytes for count, level in pairs)


def _errs(energies: list[Tensor], counts: tuple[tuple[int, ...], ...], levels: list[list[Level]]) -> float:
    """The neurons of the largest energy have the most bits; by its definition, in Python's floats."""
    total = 0.0
    for layer, own, table in zip(energies, counts, levels, strict=True):
        shares = sorted((layer / layer.sum() if layer.sum() > 0 else torch.ones_like(layer) / len(layer)).tolist())
        each = [level.distortion for count, level in zip(own, table, strict=True) for _ in range(count)]
        each += [1.0] * (len(shares) - len(each))
        total += sum(share * error for share, error in zip(reversed(shares), each, strict=True))
    return total / len(energies)


def _all_counts(neurons: int, levels: int) -> list[tuple[int, ...]]:
    return [c for c in itertools.product(range(neurons + 1), repeat=levels) if sum(c) <= neurons]


@settings(max_examples=200)
@given(cases())
def test_nothing_of_as_few_bytes_errs_less(case: tuple[list[Tensor], list[list[Level]]]):
    energies, levels = case
    each = (_all_counts(len(layer), len(own)) for layer, own in zip(energies, levels, strict=True))
    everything = list(itertools.product(*each))
    priced = [(_taken(counts, levels), _errs(energies, counts, levels)) for counts in everything]
    allocation = Allocation(energies, levels, 1)
    for index in range(len(allocation)):
        counts = allocation[index]
        taken, error = _taken(counts, levels), _errs(energies, counts, levels)
        assert allocation.distortion(index) == pytest.approx(error, abs=1e-9)
        assert error <= min(other for bytes_, other in priced if bytes_ <= taken * (1 + 1e-12)) + 1e-9


@given(st.data(), st.integers(1, 4), st.sampled_from([1, 3, 64]))
def test_more_bytes_never_err_more_and_every_neuron_is_counted_once(data: st.DataObject, layers: int, block: int):
    neurons = data.draw(st.lists(st.integers(1, 200), min_size=layers, max_size=layers))
    energies = [typical_energies(n, data.draw(st.floats(0, 1))) for n in neurons]
    allocation = Allocation(energies, [LEVELS] * layers, block)
    assert allocation[0] == ((0, 0, 0, 0),) * layers
    assert allocation[-1] == allocation[len(allocation) - 1] == tuple((n, 0, 0, 0) for n in neurons)
    assert (allocation.distortion(0), allocation.distortion(len(allocation) - 1)) == pytest.approx((1, 1e-4))
    before = (0.0, 1.0)
    for index in range(len(allocation)):
        counts = allocation[index]
        assert all(min(c) >= 0 and sum(c) <= n for c, n in zip(counts, neurons, strict=True))
        # Whole blocks on all levels but the one where the last neurons are.
        assert all(sum(c % block != 0 for c in own) <= 1 for own in counts)
        now = (_taken(counts, [list(LEVELS)] * layers), allocation.distortion(index))
        assert now[0] >= before[0]
        assert now[1] <= before[1] + 1e-12
        before = now
    with pytest.raises(IndexError):
        allocation[len(allocation)]
    assert allocation[0:2] == [allocation[0], allocation[1]]


def test_a_level_that_is_not_worth_its_bytes_is_never_used():
    dear = (Level(8, 0.0), Level(7.9, 0.5), Level(4, 0.01))
    counts = [own for chosen in Allocation([typical_energies(64)], [dear], 4) for own in chosen]
    assert all(own[1] == 0 for own in counts)
    assert any(own[2] for own in counts)


def test_uneven_layers_get_the_bits():
    """With the same bytes, a layer whose neurons are alike needs more bits than one in which a few do everything."""
    allocation = Allocation([typical_energies(1024, 0.05), typical_energies(1024, 1.0)], [LEVELS] * 2, 64)
    even, uneven = allocation[len(allocation) // 3]
    assert even[3] + even[2] + even[1] > uneven[3] + uneven[2] + uneven[1]


@pytest.mark.parametrize("gain", [0.0, 0.39, 0.78])
def test_typical_neurons_gain_what_they_are_asked_for(gain: float):
    energies = typical_energies(100_000, gain)
    assert bits_gained(energies) == pytest.approx(gain, abs=0.01)
    assert bits_gained(torch.cat([energies, torch.zeros(5)])) == bits_gained(energies)
    assert math.isfinite(bits_gained(torch.zeros(3)))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 1000))
def test_a_prompt_says_who_sits_where(counts: list[int], seed: int):
    """Against sorting by hand; one level leaves the choice as it is."""
    generator = torch.Generator().manual_seed(seed)
    score, kept = torch.rand(32, generator=generator), sum(counts)
    chosen = torch.randperm(32, generator=generator)[:kept].sort().values
    found = split_levels(score, chosen, tuple(counts)).tolist()
    ranked = sorted(chosen.tolist(), key=lambda neuron: -float(score[neuron]))
    expected = [sorted(ranked[sum(counts[:i]) : sum(counts[: i + 1])]) for i in range(len(counts))]
    assert found == [neuron for level in expected for neuron in level]
