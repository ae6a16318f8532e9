"""Fused scores and numbers from one threshold, by brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from griffin_offload.errors import UsageError
from griffin_offload.method.variants import Variant, choose, distribution, fused_by_energy, fused_by_rank, global_counts


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_fusion_by_rank():
    squared, prior = torch.tensor([4.0, 1.0, 9.0]), torch.tensor([0.1, 0.7, 0.2])
    assert fused_by_rank(squared, prior, None, 0.25).tolist() == [2 * 0.75 + 1 * 0.25, 1 * 0.75 + 3 * 0.25, 2.75]
    norms = torch.tensor([10.0, 1.0, 1.0])
    assert fused_by_rank(squared, prior, norms, 0.25).tolist() == [3.0, 0.75 + 0.25 * 2, 2 * 0.75 + 0.25]


def test_fusion_by_energy():
    squared, prior = torch.tensor([4.0, 1.0, 5.0]), torch.tensor([0.1, 0.7, 0.2])
    torch.testing.assert_close(fused_by_energy(squared, prior, None), torch.tensor([0.5, 0.8, 0.7]).sqrt())
    norms = torch.tensor([2.0, 1.0, 3.0])
    torch.testing.assert_close(fused_by_energy(squared, prior, norms), torch.tensor([0.5, 0.8, 0.7]).sqrt() * norms)
    assert torch.equal(fused_by_energy(torch.zeros(3), prior, None), prior.sqrt())


def test_a_prior_alone_and_none_at_all_are_the_ends_of_fusion_by_rank():
    squared, prior = torch.rand(50, generator=_generator(0)), torch.rand(50, generator=_generator(1))
    ends = {0.0: squared, 1.0: prior}
    for share, alone in ends.items():
        variant = Variant(0.4, prior="rank", prior_share=share)
        chosen = choose(variant, squared, 20, _generator(0), prior=prior)
        assert torch.equal(chosen, alone.topk(20).indices.sort().values)


def test_distribution():
    values = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert distribution(values).tolist() == [[0.25, 0.75], [0.0, 0.0]]


@given(seed=st.integers(0, 999), density=st.floats(0, 1), neurons=st.sampled_from([100, 256, 512]))
def test_global_counts(seed: int, density: float, neurons: int):
    """Against all thresholds there are: the sum is what a uniform density keeps, shares are clamped, in whole steps."""
    generator, step = _generator(seed), 64 if neurons >= 256 else 1
    layers = [torch.rand(neurons, generator=generator) ** power for power in (1, 2, 8)]
    counts = global_counts(layers, density)
    wanted = 3 * int(neurons * density + 1e-9)
    assert wanted - 3 * step < sum(counts) <= wanted
    for count in counts:
        assert count % step == 0 or count == neurons
        assert min(0.2, density) * neurons - step < count <= max(0.9, density) * neurons + step
    if all(count < 0.8 * neurons for count in counts):
        assert wanted - step < sum(counts)
    if step == 1 and 0.25 < density < 0.8:
        values = torch.cat([layer / layer.sum() for layer in layers]).sort(descending=True).values
        by_threshold = [int((layer / layer.sum() >= values[wanted - 1]).sum()) for layer in layers]
        if all(20 <= count <= 90 for count in by_threshold):
            assert counts == by_threshold


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.5}, "density is 1.5"),
        ({"density": 0.5, "selection": "best"}, "selection is 'best'"),
        ({"density": 0.5, "selection": "random", "prior": "rank"}, "random has none"),
        ({"density": 0.5, "prior": "rank", "prior_share": 2}, "prior_share is 2"),
        ({"density": 0.5, "prior": "energy", "prior_share": 0.1}, "only fusion by rank"),
    ],
)
def test_what_cannot_be(options: dict, message: str):
    with pytest.raises(UsageError, match=message):
        Variant(**options)
