"""Variants of the method, to be compared by simulation: how neurons are scored, how many a layer keeps, and what takes
the place of those that are left out.

Besides the statistic s of a prompt (arXiv 2404.01365, section 4.2) a score may use a prior g, the same statistic of
other text: g^2 [F] is the mean over texts of s^2 / S, S being the text's tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from griffin_offload.config import NEURON_MULTIPLE, SelectionMethod, check_density
from griffin_offload.errors import UsageError
from griffin_offload.method.selection import neurons_kept, select_neurons

Fusion = Literal["rank", "energy"]
Allocation = Literal["uniform", "global"]

# Selections whose score is s, or s times a norm: the others have none that a prior could be fused with.
_SCORED = ("topk", "output_aware")
# With one threshold for all layers, no layer keeps less or more than this, unless the density itself does.
_LEAST_SHARE, _LARGEST_SHARE = 0.2, 0.9


@dataclass(frozen=True)
class Variant:
    """One way to choose neurons from a prompt, and to compute without the others."""

    density: float
    selection: SelectionMethod = "topk"
    prior: Fusion | None = None
    """How s is fused with g: the mean of their ranks (GLASS, arXiv 2508.14302), or sqrt(s^2 / S + g^2)."""
    prior_share: float = 0.5
    """What g's rank weighs in the fusion by rank."""
    compensate: bool = False
    """Neurons that are left out give their mean over the prompt, instead of nothing."""
    allocation: Allocation = "uniform"
    """ "global": one threshold on s^2 / S for all layers says how many neurons each one keeps, for every prompt."""

    def __post_init__(self) -> None:
        check_density(self.density)
        if self.selection not in get_args(SelectionMethod):
            known = ", ".join(get_args(SelectionMethod))
            raise UsageError(f"selection is {self.selection!r}: choose one of {known}")
        if self.prior is not None and self.selection not in _SCORED:
            raise UsageError(f"a prior needs a score, {self.selection} has none: choose one of {', '.join(_SCORED)}")
        if self.prior != "rank" and self.prior_share != Variant.prior_share:
            raise UsageError(f"prior_share is {self.prior_share}: only fusion by rank has one")
        if not 0 <= self.prior_share <= 1:
            raise UsageError(f"prior_share is {self.prior_share}: from 0, the prompt alone, to 1, the prior alone")


def choose(
    variant: Variant,
    squared: Tensor,
    kept: int,
    generator: torch.Generator,
    *,
    norms: Tensor | None = None,
    prior: Tensor | None = None,
) -> Tensor:
    """Sorted indices [K] of the `kept` neurons of one sample: `squared` is s^2 [F], `norms` [F] are those that
    `select_neurons` asks for, `prior` is g^2 [F]."""
    if variant.prior is None:
        return select_neurons(squared, kept, variant.selection, generator, norms)
    if prior is None:
        raise UsageError(f"fusion by {variant.prior} needs a prior: measure one on other text")
    if variant.prior == "rank":
        score = fused_by_rank(squared, prior, norms, variant.prior_share)
    else:
        score = fused_by_energy(squared, prior, norms)
    return score.topk(kept).indices.sort().values


def fused_by_rank(squared: Tensor, prior: Tensor, norms: Tensor | None, share: float) -> Tensor:
    """(1 - share) * rank(s) + share * rank(g), [F]; with `norms`, of s * norm and g * norm. The largest has rank F."""
    scale = 1 if norms is None else norms.square()
    return (1 - share) * _ranks(squared * scale) + share * _ranks(prior * scale)


def fused_by_energy(squared: Tensor, prior: Tensor, norms: Tensor | None) -> Tensor:
    """sqrt(s^2 / S + g^2), [F], times the norms if there are any: as if the prior were a second prompt of the same
    length. Where no token of the prompt fired, g alone."""
    fused = (distribution(squared) + prior).sqrt()
    return fused if norms is None else fused * norms


def distribution(squared: Tensor) -> Tensor:
    """s^2 / S over the last axis: sums to 1, or is all zero where nothing fired."""
    total = squared.sum(-1, keepdim=True)
    return squared / torch.where(total > 0, total, 1)


def _ranks(values: Tensor) -> Tensor:
    """1 for the smallest to F; equal values rank by their index."""
    ranks = torch.empty_like(values)
    ranks[values.argsort(stable=True)] = torch.arange(1, values.numel() + 1, dtype=values.dtype, device=values.device)
    return ranks


def global_counts(squared: Sequence[Tensor], density: float) -> list[int]:
    """Neurons that each layer keeps when one threshold on s^2 / S decides for all of them; `squared` are the layers'
    s^2 [F].

    Shares of a layer stay within .2 and .9 and numbers are multiples of NEURON_MULTIPLE where F is one. The sum is
    that of the same density in all layers, as far as these steps allow.
    """
    shares = [distribution(layer) for layer in squared]
    neurons = [layer.numel() for layer in squared]
    steps = [NEURON_MULTIPLE if f % NEURON_MULTIPLE == 0 and f >= 4 * NEURON_MULTIPLE else 1 for f in neurons]
    lows = [neurons_kept(f, min(_LEAST_SHARE, density)) // step * step for f, step in zip(neurons, steps, strict=True)]
    highs = [math.ceil(f * max(_LARGEST_SHARE, density) / step) * step for f, step in zip(neurons, steps, strict=True)]
    highs = [min(high, f) for high, f in zip(highs, neurons, strict=True)]
    wanted = sum(neurons_kept(f, density) for f in neurons)
    counts = _counts_at_threshold(shares, lows, highs, wanted)
    return _in_steps(counts, lows, highs, steps, wanted)


def _counts_at_threshold(shares: Sequence[Tensor], lows: Sequence[int], highs: Sequence[int], wanted: int) -> list[int]:
    """How many lie above the one threshold that gives at most `wanted` in all, after clamping: bisection."""
    above, below = float(max(layer.max() for layer in shares if layer.numel())) + 1e-30, -1.0
    counts = list(lows)
    for _ in range(64):
        threshold = (above + below) / 2
        found = [
            min(max(int((layer > threshold).sum()), low), high)
            for layer, low, high in zip(shares, lows, highs, strict=True)
        ]
        if sum(found) <= wanted:
            counts, above = found, threshold
        else:
            below = threshold
    return counts


def _in_steps(
    counts: Sequence[int], lows: Sequence[int], highs: Sequence[int], steps: Sequence[int], wanted: int
) -> list[int]:
    """`counts` in multiples of the steps; what rounding down left over goes to those that lost most, in turn."""
    rounded = [max(count // step * step, low) for count, step, low in zip(counts, steps, lows, strict=True)]
    lost = sorted(range(len(counts)), key=lambda layer: rounded[layer] - counts[layer])
    for layer in lost:
        if rounded[layer] + steps[layer] <= highs[layer] and sum(rounded) + steps[layer] <= wanted:
            rounded[layer] += steps[layer]
    return rounded
