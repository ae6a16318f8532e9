"""The statistic against the paper's formula in float64, whatever the chunks, masks and zero rows."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import shared_statistic_float64, statistic_float64

from griffin_offload.method.selection import share_kept, shared_score, split_tokens, squared_statistic

_shapes = st.tuples(st.integers(1, 3), st.integers(1, 300), st.integers(1, 40))


def _activations(seed: int, batch: int, tokens: int, neurons: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different norms, some of them all zero, as ReLU gives."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, tokens, neurons, generator=generator).relu()
    z *= 10 ** torch.empty(batch, tokens, 1).uniform_(-3, 3, generator=generator)
    z[torch.rand(batch, tokens, generator=generator) < 0.1] = 0
    return z.to(dtype)


def _mask(seed: int, batch: int, tokens: int) -> torch.Tensor:
    """Left padding; each sample has at least one token."""
    lengths = torch.randint(1, tokens + 1, (batch, 1), generator=torch.Generator().manual_seed(seed))
    return (torch.arange(tokens) >= tokens - lengths).long()


@settings(max_examples=60)
@given(_shapes, st.integers(0, 2**31), st.lists(st.integers(1, 299), max_size=4))
def test_equals_the_formula_for_any_chunks(shape: tuple[int, int, int], seed: int, cuts: list[int]):
    batch, tokens, _ = shape
    z, mask = _activations(seed, *shape), _mask(seed, batch, tokens)
    halves = split_tokens(mask)
    bounds = sorted({0, tokens, *(cut for cut in cuts if cut < tokens)})
    squared = sum(squared_statistic(z[:, a:b], halves[:, :, a:b]) for a, b in pairwise(bounds))
    assert isinstance(squared, torch.Tensor)
    expected = statistic_float64(z, mask)
    torch.testing.assert_close(squared.sum(1).sqrt().double(), expected, rtol=2e-6, atol=1e-7)


def test_is_a_distribution_over_the_tokens_that_fired():
    z = _activations(0, 2, 50, 30)
    squared = squared_statistic(z, torch.ones(2, 1, 50))
    fired = (z.abs().sum(-1) > 0).sum(1)
    torch.testing.assert_close(squared.sum((1, 2)), fired.float())


def test_half_precision_activations_are_summed_in_float32():
    z = _activations(1, 1, 200, 64, torch.bfloat16)
    squared = squared_statistic(z, torch.ones(1, 1, 200))
    assert squared.dtype == torch.float32
    torch.testing.assert_close(squared[0].sqrt().double(), statistic_float64(z), rtol=2e-6, atol=1e-7)


@given(st.integers(1, 100), st.integers(0, 20))
def test_the_last_quarter_is_held_out(tokens: int, padding: int):
    mask = torch.tensor([[0] * padding + [1] * tokens])
    chooses, held_out = split_tokens(mask)[0]
    assert held_out.sum() == tokens // 4
    assert torch.equal(chooses + held_out, mask[0].float())
    assert not held_out[: padding + tokens - tokens // 4].any()


def test_batch_formulas():
    z, mask = _activations(3, 3, 40, 24).clamp_min(1e-3), _mask(5, 3, 40)
    squared = squared_statistic(z, split_tokens(mask)).sum(1)
    for name, by_length in (("sum", False), ("mean", True)):
        expected = shared_statistic_float64(z, mask, by_length=by_length)
        torch.testing.assert_close(shared_score(squared, name).sqrt().double(), expected, rtol=1e-5, atol=1e-7)


def test_share_kept():
    squared = torch.tensor([1.0, 3.0, 0.0, 4.0])
    assert share_kept(squared, torch.tensor([1, 3])) == 7 / 8
    assert share_kept(squared, torch.tensor([], dtype=torch.long)) == 0
    assert share_kept(torch.zeros(4), torch.tensor([0])) == 1
