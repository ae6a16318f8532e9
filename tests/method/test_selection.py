"""The chosen sets against direct implementations of the paper's methods."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import select_direct

from griffin_offload.errors import UsageError
from griffin_offload.method.selection import densities_per_layer, neurons_kept, select_neurons

METHODS = ("topk", "sample", "topk_sample", "random", "magnitude")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=40)
@given(neurons=st.integers(1, 200), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_equals_a_direct_implementation(method: str, neurons: int, share: float, seed: int):
    kept = int(neurons * share)
    s = torch.rand(neurons, generator=_generator(seed)) + 1e-3
    norms = torch.rand(neurons, generator=_generator(seed + 1))
    scores = norms if method == "magnitude" else (s * s).sqrt()
    chosen = select_neurons(s * s, kept, method, _generator(7), norms)
    assert torch.equal(chosen, select_direct(method, kept, scores, _generator(7)))
    assert torch.equal(chosen, chosen.unique())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kept", [0, 1, 5, 16])
def test_dead_neurons_only_fill_up(method: str, kept: int):
    """With 3 of 16 neurons alive, every method still returns `kept` different ones, the live ones first."""
    squared = torch.zeros(16)
    squared[[2, 7, 11]] = torch.tensor([4.0, 1.0, 2.0])
    chosen = select_neurons(squared, kept, method, _generator(0), squared)
    assert chosen.numel() == kept
    assert torch.equal(chosen, chosen.unique())
    if method != "random":
        assert len({2, 7, 11} & set(chosen.tolist())) == min(kept, 3)


@given(st.integers(1, 20000), st.integers(0, 20000))
def test_neurons_kept_undoes_the_division(neurons: int, kept: int):
    kept = min(kept, neurons)
    assert neurons_kept(neurons, kept / neurons) == kept


@given(st.integers(1, 20000), st.floats(0, 1))
def test_neurons_kept_is_the_floor(neurons: int, density: float):
    kept = neurons_kept(neurons, density)
    assert 0 <= kept <= neurons
    assert abs(kept - neurons * density) <= 1


def test_schedules():
    assert densities_per_layer(0.5, 3) == (0.5, 0.5, 0.5)
    assert densities_per_layer([0.5, 1, 0], 3) == (0.5, 1.0, 0.0)
    with pytest.raises(UsageError, match="2 densities for 3 layers"):
        densities_per_layer([0.5, 1], 3)
