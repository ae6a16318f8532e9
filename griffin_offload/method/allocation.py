"""How many neurons of each layer rest in how many bits: reverse water-filling on a prior.

A neuron of energy w, its mean square times that of its output column, errs by w * c on a level of distortion c: the
relative squared error of what a neuron gives, 1 where it is left out. The bytes are best spent where one of them takes
away most error: a neuron of large energy gets more bits, and only when the last one is not worth the fewest bits it
is left out. Taken one after another, such steps give for any number of bytes the least error that these can buy
(Cover and Thomas, Elements of Information Theory, section 10.3.3, with levels for rates).

The counts are of a model's layers, for good; which neurons get the bits, each prompt says
(`split_levels` in selection.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Counts = tuple[int, ...]
"""Neurons of a layer on each level, from the most bits to the fewest; the others are left out."""
TYPICAL_GAIN = 0.5
"""Bits that allocation gains where nothing is known of a model: see `bits_gained`."""


def tiers_of(counts: Counts) -> list[tuple[int, int]]:
    """(level, neurons) of those that have some; of no neurons at all, the last level."""
    return [(i, count) for i, count in enumerate(counts) if count] or [(len(counts) - 1, 0)]


@dataclass(frozen=True)
class Level:
    """What a neuron takes and errs in one format."""

    neuron_bytes: float
    distortion: float


@dataclass(frozen=True)
class _Step:
    """From one level to the next that is worth it, or from being left out to the first one."""

    level: int
    """The one that is reached."""
    worth: float
    """Distortion that goes per byte, of a neuron of energy 1."""
    less: float
    """Distortion that goes."""


class Allocation(Sequence[tuple[Counts, ...]]):
    """Counts of all layers, from no neuron at all to all of them on the first level, each step of one block of neurons
    in one layer, and each the best that its bytes can buy.

    `energies` float [F] are of each layer's neurons, or of as many typical ones, in any order and unit: layers weigh
    the same. `levels` are of each layer, from the most bytes to the fewest.
    """

    def __init__(self, energies: Sequence[Tensor], levels: Sequence[Sequence[Level]], block: int) -> None:
        self._neurons, self._block = [layer.numel() for layer in energies], block
        self._widths = [len(layer) for layer in levels]
        self._steps = [_worthwhile(layer) for layer in levels]
        worth, less, places = [], [], []
        for index, (layer, steps) in enumerate(zip(energies, self._steps, strict=True)):
            blocks = _block_energies(layer, block)
            for number, step in enumerate(steps):
                worth.append(blocks * step.worth)
                less.append(blocks * step.less)
                places.append(torch.full_like(blocks, index * _MOST_STEPS + number))
        order = torch.cat(worth).argsort(descending=True, stable=True)
        self._places = torch.cat(places).long()[order]
        gone = torch.cat(less)[order].cumsum(0) / len(self._neurons)
        self._distortions = 1 - torch.cat([torch.zeros_like(gone[:1]), gone])

    def __len__(self) -> int:
        return len(self._places) + 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        taken = self._places[: index % len(self)].bincount(minlength=len(self._neurons) * _MOST_STEPS)
        return tuple(self._counts(layer, row) for layer, row in enumerate(taken.view(-1, _MOST_STEPS).tolist()))

    def distortion(self, index: int) -> float:
        """Of what the layers' blocks give, relative to that, by the prior: the mean over layers."""
        return max(float(self._distortions[index]), 0.0)

    def _counts(self, layer: int, blocks: list[int]) -> Counts:
        """Of one layer, of which so many blocks have taken each of its steps."""
        reached = [min(count * self._block, self._neurons[layer]) for count in blocks]
        counts = [0] * self._widths[layer]
        for step, (here, beyond) in zip(self._steps[layer], pairwise([*reached, 0]), strict=False):
            counts[step.level] = here - beyond
        return tuple(counts)


_MOST_STEPS = 16


def _worthwhile(levels: Sequence[Level]) -> list[_Step]:
    """The steps from nothing to the first of `levels`, over those on the lower convex hull of bytes and distortion."""
    assert len(levels) < _MOST_STEPS, "more levels than there are formats"
    points = [(0.0, 1.0, -1), *((level.neuron_bytes, level.distortion, i) for i, level in enumerate(levels))]
    points.sort()
    hull: list[tuple[float, float, int]] = []
    for point in points:
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [_Step(there[2], _slope(here, there), here[1] - there[1]) for here, there in pairwise(hull)]


def _slope(here: tuple[float, float, int], there: tuple[float, float, int]) -> float:
    return (here[1] - there[1]) / (there[0] - here[0])


def _block_energies(energies: Tensor, block: int) -> Tensor:
    """Of blocks of so many neurons, the largest first, as shares of the layer's: float64."""
    ordered = energies.double().sort(descending=True).values
    total = ordered.sum()
    shares = ordered / total if total > 0 else torch.full_like(ordered, 1 / max(ordered.numel(), 1))
    return torch.stack([part.sum() for part in shares.split(block)])


def distortion_of(energies: Tensor, counts: Counts, distortions: Sequence[float], score: Tensor | None = None) -> float:
    """Of a layer of these energies [F], those of the largest `score` (None: energy) in the first level and so on; the
    rest is left out."""
    ordered = energies[(energies if score is None else score).argsort(descending=True)]
    left_out = energies.numel() - sum(counts)
    parts = ordered.split([*counts, left_out])
    error = sum(float(part.sum()) * each for part, each in zip(parts, [*distortions, 1.0], strict=True))
    total = float(energies.sum())
    return error / total if total > 0 else 0.0


def typical_energies(neurons: int, gain: float = TYPICAL_GAIN) -> Tensor:
    """Energies float64 [F] of a layer nothing is known of: quantiles of a log-normal distribution in which allocation
    gains `gain` bits."""
    places = (torch.arange(neurons, dtype=torch.float64, device="cpu") + 0.5) / neurons
    found: Tensor = (torch.special.ndtri(places) * math.sqrt(4 * math.log(2) * gain)).exp()
    return found


def bits_gained(energies: Tensor) -> float:
    """What allocation saves in bits a number at the same error, where all levels are fine ones: half of log2 of the
    arithmetic over the geometric mean of the energies [F]."""
    fired = energies[energies > 0].double()
    return 0.5 * math.log2(float(fired.mean()) / math.exp(float(fired.log().mean()))) if fired.numel() else 0.0


def tier_shares(precision: str, tiers: dict[str, int], density: float) -> str:
    """For people: `precision`, and shares of the neurons by format, of which `density` are kept. All neurons in the
    first one, which attention is in, are that format alone."""
    used = [name for name, count in tiers.items() if count]
    if density == 1 and len(used) == 1:
        return used[0] if used[0] == next(iter(tiers)) else f"feed-forwards in {used[0]}"
    neurons = sum(tiers.values()) / density if density else 1.0
    shares = [f"{name} {tiers[name] / neurons:.0%}" for name in used]
    return f"{precision} ({', '.join([*shares, *([f'none {1 - density:.0%}'] if density < 1 else [])])})"
