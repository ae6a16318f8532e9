"""The int4 format: groups of 32 numbers with a step and an offset of 8 bits each (grouped.py has the layouts).

    number = scale * step * (code + offset),    code 0..15

- step and offset: of a group, a pair of bytes. The step byte is 2^(e - 11) * (1 + m / 16), e its upper and m its lower
  four bits, so that weights of up to 232 rms are reached; the offset byte counts signed eighths, from -8.
- codes: two a byte, byte b of a group holds number b (low) and b + 16 (high).

4.5 bits a number and one scale a row.
"""

import torch
from torch import Tensor

from griffin_offload.formats.base import RowGrids, Tensors, divisor, row_blocks, row_scale
from griffin_offload.formats.compensation import Packed
from griffin_offload.formats.grouped import GROUP, Grouped
from griffin_offload.formats.int4_grid import CENTRE, Grid, best_from, best_grid, steps_of
from griffin_offload.formats.translated import Grids
from griffin_offload.kernels import table

_HALF, _HIGHEST = GROUP // 2, 15


class Int4(Grouped):
    """Codes 0..15."""

    name, bits, code_bits, version = "int4", 4.5, 4, 2  # version 1 had one scale a neuron in its down projection
    is_tier, distortion = True, 0.013

    def levels_of(self, numbers: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        grid = best_grid(numbers, importance)
        return _codes(grid, numbers), _bytes(grid)

    def __init__(self) -> None:
        super().__init__()
        on_grids = table.Kernel("quantize", "int4_on_grids", "by blocks", self._on_grids_by_torch, ours=False)
        table.add(on_grids, last=True)

    def taken_over(self, weight: Tensor, dtype: torch.dtype, grids: Grids) -> Tensors:
        scale = row_scale(weight, dtype)
        steps, lowest = (part.to(scale.device) / divisor(scale)[:, None] for part in grids)
        lowest = torch.minimum(lowest, lowest + _HIGHEST * steps)  # steps below 0 count downwards
        steps = steps.abs()
        found = table.call("quantize", "int4_on_grids", weight, divisor(scale), steps, lowest + CENTRE * steps)
        return {"weight": found[0], "groups": found[1], "scale": scale}

    def take_over(self, full: Tensors, grids: RowGrids, chosen: Tensor, out: Tensors, *, parts: int = 1) -> bool:
        for rows, start in self.row_chunks(full, chosen, out, parts):
            own = grids(rows)
            if own is None:
                return False
            found = self.taken_over(full["weight"].index_select(0, rows), out["scale"].dtype, own)
            for name, tensor in found.items():
                out[name][start : start + rows.numel()] = tensor
        return True

    def _on_grids_by_torch(self, weight: Tensor, divisor: Tensor, steps: Tensor, middles: Tensor) -> Packed:
        codes, groups = [], []
        for start, block in row_blocks(weight):
            part = slice(start, start + block.shape[0])
            numbers = block.mul_(1 / divisor[part, None]).view(block.shape[0], -1, GROUP)
            ones = numbers.new_ones(numbers.shape[1:])
            grid = best_from([(steps[part, :, None], middles[part, :, None])], numbers, ones)
            codes.append(self.pack(_codes(grid, numbers).flatten(1)))
            groups.append(_bytes(grid))
        return torch.cat(codes), torch.cat(groups)

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
