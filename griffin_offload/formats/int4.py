"""The int4 format: groups of 32 numbers with a step and an offset of 8 bits each (grouped.py has the layouts).

    number = scale * step * (code + offset),    code 0..15

- step and offset: of a group, a pair of bytes. The step byte is 2^(e - 11) * (1 + m / 16), e its upper and m its lower
  four bits, so that weights of up to 232 rms are reached; the offset byte counts signed eighths, from -8.
- codes: two a byte, byte b of a group holds number b (low) and b + 16 (high).

4.5 bits a number and one scale a row.
"""

import torch
from torch import Tensor

from griffin_offload.formats.base import Tensors, divisor, row_blocks, row_scale
from griffin_offload.formats.grouped import GROUP, Grouped
from griffin_offload.formats.int4_grid import CENTRE, Grid, best_from, best_grid, steps_of
from griffin_offload.formats.translated import Grids

_HALF, _HIGHEST = GROUP // 2, 15


class Int4(Grouped):
    """Codes 0..15."""

    name, bits, code_bits, version = "int4", 4.5, 4, 2  # version 1 had one scale a neuron in its down projection
    is_tier, distortion = True, 0.013

    def levels_of(self, numbers: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        grid = best_grid(numbers, importance)
        return _codes(grid, numbers), _bytes(grid)

    def taken_over(self, weight: Tensor, dtype: torch.dtype, grids: Grids) -> Tensors:
        scale = row_scale(weight, dtype)
        steps, lowest = (part / divisor(scale).float()[:, None] for part in grids)
        lowest = torch.minimum(lowest, lowest + _HIGHEST * steps)  # steps below 0 count downwards
        steps = steps.abs()
        codes, groups = [], []
        for start, block in row_blocks(weight):
            part = slice(start, start + block.shape[0])
            numbers = block.div_(divisor(scale)[part, None]).view(block.shape[0], -1, GROUP)
            step = steps[part, :, None]
            ones = numbers.new_ones(numbers.shape[1:])
            grid = best_from([(step, lowest[part, :, None] + CENTRE * step)], numbers, ones)
            codes.append(self.pack(_codes(grid, numbers).flatten(1)))
            groups.append(_bytes(grid))
        return {"weight": torch.cat(codes), "groups": torch.cat(groups), "scale": scale}

    def pack(self, levels: Tensor) -> Tensor:
        groups = levels.reshape(levels.shape[0], levels.shape[1] // GROUP, 2, _HALF)
        return (groups[:, :, 0] | (groups[:, :, 1] << 4)).flatten(1)

    def read_codes(self, codes: Tensor, out: Tensor) -> None:
        out[..., :_HALF] = codes & 15
        out[..., _HALF:] = codes >> 4

    def steps_of(self, groups: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        step, offset = steps_of(groups, dtype)
        return step[..., None], offset[..., None]


def _codes(grid: Grid, numbers: Tensor) -> Tensor:
    return grid.codes(numbers).add_(CENTRE).to(torch.uint8)


def _bytes(grid: Grid) -> Tensor:
    return torch.cat([grid.step.to(torch.uint8), grid.offset.to(torch.int8).view(torch.uint8)], dim=-1)


INT4 = Int4()
