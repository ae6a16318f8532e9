"""The int4 format: groups of 32 numbers with a step and an offset of 8 bits each (grouped.py has the layouts).

    number = scale * step * (code + offset),    code 0..15

- step and offset: of a group, a pair of bytes. The step byte is 2^(e - 11) * (1 + m / 16), e its upper and m its lower
  four bits, so that weights of up to 232 rms are reached; the offset byte counts signed eighths, from -8.
- codes: two a byte, byte b of a group holds number b (low) and b + 16 (high).

4.5 bits a number and one scale a row.
"""

import torch
from torch import Tensor

from griffin_offload.formats.grouped import GROUP, Grouped
from griffin_offload.formats.int4_grid import CENTRE, best_grid, steps_of

_HALF = GROUP // 2


class Int4(Grouped):
    """Codes 0..15."""

    name, bits, code_bits, version = "int4", 4.5, 4, 2  # version 1 had one scale a neuron in its down projection
    is_tier, distortion = True, 0.013

    def levels_of(self, numbers: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        grid = best_grid(numbers, importance)
        pairs = torch.cat([grid.step.to(torch.uint8), grid.offset.to(torch.int8).view(torch.uint8)], dim=-1)
        return grid.codes(numbers).add_(CENTRE).to(torch.uint8), pairs

    def pack(self, levels: Tensor) -> Tensor:
        groups = levels.reshape(levels.shape[0], levels.shape[1] // GROUP, 2, _HALF)
        return (groups[:, :, 0] | (groups[:, :, 1] << 4)).flatten(1)

    def read_codes(self, codes: Tensor, out: Tensor) -> None:
        out[..., :_HALF] = codes & 15
        out[..., _HALF:] = codes >> 4

    def steps_of(self, groups: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        step, offset = steps_of(groups, dtype)
        return step[..., None], offset[..., None]


INT4 = Int4()
