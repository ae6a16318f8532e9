"""The levels of half a group of int3 and int2: a step and an offset of sixteen each, and the search for the pair that
misses least."""

from dataclasses import dataclass

import torch
from torch import Tensor

from griffin_offload.formats.int4_grid import fitted

# The same as in few_bits.h and quantize.c.
STEPS = (10, 20, 29, 35, 42, 49, 56, 65, 75, 87, 103, 125, 176, 288, 448, 672)
_FITS = 2
_FAR = 6.0


@dataclass(frozen=True)
class Levels:
    """Of one format, in root mean squares of the row and in steps."""

    highest: int
    """Code."""
    steps: Tensor
    """float32 [16]."""
    between: Tensor
    """[15]: from which number on the next step is the nearest."""
    middles: Tensor
    """[8]: how far the middle of the levels may lie above zero, or below it."""
    halfway: Tensor
    """[7]: between these."""
    shares: tuple[float, ...]
    """Of a range, that are tried."""

    @classmethod
    def of_bits(cls, bits: int) -> "Levels":
        """Of int3 or int2. Offsets and codes together have at most eight bits, which bfloat16 holds."""
        unit = {3: 128, 2: 64}[bits]
        middles = {3: (2, 5, 8, 11, 16, 23, 34, 56), 2: (1, 3, 4.5, 6, 8, 11, 15, 24)}[bits]
        steps, middle = _floats(STEPS) / unit, _floats(middles) / 16
        return cls(
            highest=2**bits - 1,
            steps=steps,
            between=(steps[1:] + steps[:-1]) / 2,
            middles=middle,
            halfway=(middle[1:] + middle[:-1]) / 2,
            shares={3: (1.0, 0.85), 2: (1.0, 0.72)}[bits],
        )

    def steps_of(self, groups: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """step and offset [..., 2] of groups [..., 2]."""
        index = groups.long()
        steps = self.steps.to(groups.device, dtype)
        both = torch.cat([self.middles, -self.middles]) - self.highest / 2
        return steps[index & 15], both.to(groups.device, dtype)[index >> 4]


@dataclass
class Grid:
    """Indices of steps and offsets as they are stored, and what they are worth: [R, G, 2, 1]."""

    index: Tensor
    step: Tensor
    middle: Tensor

    @classmethod
    def nearest(cls, step: Tensor, middle: Tensor, levels: Levels) -> "Grid":
        """The stored grid nearest to a step and the middle of all levels."""
        index = torch.bucketize(step, levels.between.to(step.device), right=True)
        value = levels.steps.to(step.device)[index]
        share = middle * (1 / value)
        size = torch.bucketize(share.abs(), levels.halfway.to(step.device), right=True)
        below = share < 0
        own = levels.middles.to(step.device)[size]
        return cls(index + 16 * size + 128 * below, value, torch.where(below, -own, own))

    def codes(self, numbers: Tensor, levels: Levels) -> Tensor:
        """Of `numbers` [R, G, 2, 16]."""
        half = levels.highest / 2
        return (numbers * (1 / self.step)).sub_(self.middle - half).round_().clamp_(0, levels.highest)

    def take(self, other: "Grid", better: Tensor) -> None:
        """Be `other` where that is `better`."""
        for name in ("index", "step", "middle"):
            setattr(self, name, torch.where(better, getattr(other, name), getattr(self, name)))


def best_grid(numbers: Tensor, importance: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Codes uint8 of `numbers` [R, G, 2, 16], and the bytes [R, G, 2]: of shares of their range, each fitted by least
    squares, the one that errs least by `importance` [G, 2, 16]."""
    low, high = numbers.amin(-1, keepdim=True), numbers.amax(-1, keepdim=True)
    far = torch.maximum(high, -low) / (levels.highest / 2 + float(levels.middles[-1]))  # no offset reaches beyond
    starts = [
        (torch.maximum((high - low) * (share / levels.highest), far), (low + high) / 2) for share in levels.shares
    ]
    # Beside a far one all others are near zero, which had better be a level.
    farthest = torch.where(high > -low, high, low)
    alone = farthest.abs() > _FAR
    step, middle = starts[-1]
    starts.append((torch.where(alone, farthest.abs() / levels.highest, step), torch.where(alone, farthest / 2, middle)))
    best, least = None, None
    for step, middle in starts:
        for _ in range(_FITS):
            grid = Grid.nearest(step, middle, levels)
            error, step, middle = _missed(numbers, importance, grid, levels)
            if best is None or least is None:
                best, least = grid, error
            else:
                best.take(grid, error < least)
                least = torch.minimum(error, least)
    assert best is not None
    return best.codes(numbers, levels).to(torch.uint8), best.index[..., 0].to(torch.uint8)


def _missed(numbers: Tensor, importance: Tensor, grid: Grid, levels: Levels) -> tuple[Tensor, Tensor, Tensor]:
    """What the grid misses [R, G, 2, 1], and step and middle that fit its codes best."""
    codes = grid.codes(numbers, levels).sub_(levels.highest / 2)
    missed = ((codes + grid.middle) * grid.step).sub_(numbers).square_().mul_(importance)
    return missed.sum(-1, keepdim=True), *fitted(codes, numbers, importance, grid.step)


def _floats(numbers: tuple[float, ...]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")
