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

from typing import ClassVar

import torch
from torch import Tensor

from griffin_offload.formats.few_bits_grid import Levels, best_grid
from griffin_offload.formats.grouped import GROUP, Grouped

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


class Int3(FewBits):
    """Codes 0..7."""

    name, bits, code_bits, grid = "int3", 3.5, 3, Levels.of_bits(3)
    is_tier, distortion = True, 0.04


class Int2(FewBits):
    """Codes 0..3."""

    name, bits, code_bits, grid = "int2", 2.5, 2, Levels.of_bits(2)
    is_tier, distortion = True, 0.145


INT3, INT2 = Int3(), Int2()
