"""The int3 and int2 formats: groups of 32 numbers in two halves, each with a byte that says step and offset.

    number = scale * step * (code + offset),    code 0..7 or 0..3

- byte of a half: the step's index in its lower, the offset's in its upper four bits. Steps are STEPS over a unit;
  offsets are MIDDLES, or with the uppermost bit what is as far below zero, less half the highest code. The tables
  are dense where most halves of trained models lie, and reach weights of 31 (int2) and 36 (int3) rms.
- codes: byte b of the first four is of the first half, that of the next four of the second one, and holds the lower two
  bits of numbers b, b + 4, b + 8 and b + 12 of it, from the lowest bit on. int3 has four bytes more, two for each half:
  nibble b has the upper bits of the same four numbers.

3.5 and 2.5 bits a number and one scale a row (grouped.py has the layouts). Halves of 16 with four bits for step and
offset each err less than groups of 32 with eight (benchmarks/NOTES.md).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from griffin_offload.config import TIERS
from griffin_offload.formats.base import Format, Layout, Spec, Tensors
from griffin_offload.formats.compensation import Compensation, Packed, counts_of
from griffin_offload.formats.grouped import GROUP, Grouped
from griffin_offload.formats.int4 import fitted
from griffin_offload.kernels import table

# Levels of half a group: a step and an offset of sixteen each, and the search for the pair that misses least.

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


# The formats.

_LOW_BYTES = 8
_HALVES = 2
_PLACES = _BYTES = 4  # numbers of a byte; bytes of a half
_HALF = GROUP // _HALVES


class FewBits(Grouped):
    """Codes of two or three bits."""

    alternative, by_name_only = "int4", True
    grid: ClassVar[Levels]

    def levels_of(self, numbers: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        halves = numbers.view(*numbers.shape[:-1], _HALVES, _HALF)
        codes, pairs = best_grid(halves, importance.view(-1, _HALVES, _HALF), self.grid)
        return codes.view(numbers.shape), pairs

    def pack(self, levels: Tensor) -> Tensor:
        # [R, G, half, place in a byte, byte]
        numbers = levels.reshape(levels.shape[0], levels.shape[1] // GROUP, _HALVES, _PLACES, _BYTES)
        low, high = torch.zeros_like(numbers[..., 0, :]), torch.zeros_like(numbers[..., 0, :])
        for place in range(_PLACES):
            low |= (numbers[..., place, :] & 3) << 2 * place
            high |= (numbers[..., place, :] >> 2) << place
        codes = low.flatten(2)
        if self.code_bits == 3:
            codes = torch.cat([codes, (high[..., ::2] | (high[..., 1::2] << 4)).flatten(2)], dim=2)
        return codes.flatten(1)

    def read_codes(self, codes: Tensor, out: Tensor) -> None:
        shape = codes.shape[:-1]
        low = codes[..., :_LOW_BYTES].unflatten(-1, (_HALVES, _BYTES))  # there may be no rows
        numbers = out.view(*shape, _HALVES, _PLACES, _BYTES)
        high = None
        if self.code_bits == 3:
            both = codes[..., _LOW_BYTES:].unflatten(-1, (_HALVES, _BYTES // 2))
            high = torch.stack([both & 15, both >> 4], dim=-1).flatten(-2)
        for place in range(_PLACES):
            found = (low >> 2 * place) & 3
            numbers[..., place, :] = found if high is None else found | ((high >> place & 1) << 2)

    def steps_of(self, groups: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.grid.steps_of(groups, dtype)

    def __init__(self) -> None:
        super().__init__()
        table.add(
            table.Kernel("quantize", f"{self.name}_of_int4", "by blocks", self._of_int4_by_torch, ours=False), last=True
        )

    def gather(
        self,
        full: Tensors,
        source: Layout,
        chosen: Tensor,
        out: Tensors,
        *,
        is_down: bool,
        parts: int = 1,
        importance: Tensor | None = None,
    ) -> None:
        """Of int4 group by group: its numbers are read, and rounded again by the same scale of the row."""
        scale = "input_scale" if is_down else "scale"
        if not isinstance(source.format, Grouped) or source.format.code_bits != 4 or scale not in full:
            super().gather(full, source, chosen, out, is_down=is_down, parts=parts, importance=importance)
            return
        starts = range(0, chosen.numel(), self.chunk)
        chunks = (
            ((chosen[i : i + self.chunk], i) for i in starts) if is_down else self.row_chunks(full, chosen, out, parts)
        )
        for index, start in chunks:
            target = slice(start, start + index.numel())
            out[scale][target] = full[scale][index]
            rows = (full[name].index_select(0, index) for name in _OWN)
            counts = None if is_down else counts_of(importance)
            found = table.call("quantize", f"{self.name}_of_int4", *rows, counts, source.format)
            if is_down:
                every = torch.arange(index.numel(), dtype=torch.int64, device=index.device)
                self.gather_neurons(found, every, (out["weight"], out["groups"]), start)
            else:
                out["weight"][target], out["groups"][target] = found

    def _of_int4_by_torch(self, codes: Tensor, groups: Tensor, importance: Tensor | None, stored: Grouped) -> Packed:
        """Rows of int4 in this format, of the same scales."""
        numbers = torch.empty(codes.shape[0], groups.shape[1] * GROUP, dtype=torch.float32, device=codes.device)
        stored.unpack(codes, groups, numbers)
        return self.quantize_rows(numbers, numbers.new_ones(len(numbers)), importance)


class Int3(FewBits):
    """Codes 0..7."""

    name, bits, code_bits, grid = "int3", 3.5, 3, Levels.of_bits(3)
    is_tier, distortion = True, 0.04


class Int2(FewBits):
    """Codes 0..3."""

    name, bits, code_bits, grid = "int2", 2.5, 2, Levels.of_bits(2)
    is_tier, distortion = True, 0.145


INT3, INT2 = Int3(), Int2()


# Copies for tiers: every neuron in int4, in int3 and in int2, each rounded once and as well as the format can. A prompt
# passes through int4; residents are copied from the tensors of their own format: `weight_int3`, `groups_int3` beside
# `weight` and `groups`; all have one scale. 10.5 bits a number; what holds no neurons is in int4 alone.

_OWN = ("weight", "groups")
"""Tensors that each format has for itself."""


class TiersCopy(Format):
    """int4, and beside it what int3 and int2 have."""

    name, bits, wants_importance, gives_chosen = TIERS, 10.5, True, True
    neuron_multiple, scratch_rows = Grouped.neuron_multiple, Grouped.scratch_rows

    def __init__(self, first: Format, *others: Format) -> None:
        """`first` is what a prompt passes through."""
        self.holds, self._first = (first, *others), first
        self._layouts = {is_down: self._layout(is_down=is_down) for is_down in (False, True)}

    def _layout(self, *, is_down: bool) -> Layout:
        def specs(outputs: int, inputs: int, down: bool) -> dict[str, Spec]:
            found: dict[str, Spec] = {}
            for format in self.holds:
                for name, spec in format.stored(is_down=down).specs(outputs, inputs, is_down=down).items():
                    found[self._named(name, format)] = spec
            return found

        return replace(self._first.stored(is_down=is_down), format=self, tensors=specs)

    def stored(self, *, is_down: bool) -> Layout:
        return self._layouts[is_down]

    @property
    def option(self) -> str:
        return self._first.name

    def rests_as(self) -> Format:
        return self._first

    def outside(self) -> Format:
        return self._first

    def part(self, format: Format, full: Tensors) -> Tensors:
        others = {self._named(name, other) for other in self.holds for name in _OWN}
        own = {name: full[self._named(name, format)] for name in _OWN}
        return {name: tensor for name, tensor in full.items() if name not in others} | own

    def check(self, outputs: int, inputs: int, where: str, *, is_down: bool) -> None:
        self._first.check(outputs, inputs, where, is_down=is_down)

    def check_device(self, device: str) -> None:
        self._first.check_device(device)

    def quantize(
        self, weight: Tensor, dtype: torch.dtype, *, is_down: bool, compensation: Compensation | None = None
    ) -> Tensors:
        found: Tensors = {}
        for format in self.holds:
            own = format.quantize(weight, dtype, is_down=is_down, compensation=compensation)
            found |= {self._named(name, format): tensor for name, tensor in own.items()}
        return found

    def compensation(self, x: Tensor, *, is_down: bool) -> Compensation:
        return self._first.compensation(x, is_down=is_down)

    def missed(self, matrix: Tensor, found: Tensors, *, is_down: bool) -> tuple[int, float]:
        return self._first.missed(matrix, self.part(self._first, found), is_down=is_down)

    def chosen_floats(self, full: Tensors, index: Tensor, dtype: torch.dtype, *, is_down: bool) -> Tensor:
        return self._first.chosen_floats(full, index, dtype, is_down=is_down)

    def row_norms(self, full: Tensors) -> Tensor:
        return self._first.row_norms(full)

    def gather_bytes(self, outputs: int, neurons: int, item_bytes: int) -> int:
        return self._first.gather_bytes(outputs, neurons, item_bytes)

    def floats_bytes(self, *sizes: Any) -> int:
        return 0  # nothing is made floats

    def _named(self, name: str, format: Format) -> str:
        return name if format is self._first or name not in _OWN else f"{name}_{format.name}"
