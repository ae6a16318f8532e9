"""The int4 format: groups of 32 numbers with a step and an offset of 8 bits each (grouped.py has the layouts).

    number = scale * step * (code + offset),    code 0..15

- step and offset: of a group, a pair of bytes. The step byte is 2^(e - 11) * (1 + m / 16), e its upper and m its lower
  four bits, so that weights of up to 232 rms are reached; the offset byte counts signed eighths, from -8.
- codes: two a byte, byte b of a group holds number b (low) and b + 16 (high).

4.5 bits a number and one scale a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin_offload.formats.base import RowGrids, Tensors, divisor, row_blocks, row_scale
from griffin_offload.formats.compensation import Packed
from griffin_offload.formats.grouped import GROUP, Grouped
from griffin_offload.formats.translated import Grids
from griffin_offload.kernels import table

# The grid of a group: sixteen levels a step apart, as bytes, and the search for the one that misses least.

# The same as in quantize.c.
_SHARES = (1.0, 0.9, 0.8)
_FITS = 3
_REACH = 22.0
CENTRE = 8
_STEP_SHIFT, _STEP_BIAS = 19, 116 << 4


def steps_of(groups: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """step and offset [..., G] of pairs of bytes [..., G, 2]."""
    step, offset = groups.unbind(-1)
    bits = (step.to(torch.int32) + _STEP_BIAS) << _STEP_SHIFT
    # One byte after another: a view of every second one as signed is no view.
    signed = offset.contiguous().view(torch.int8)
    return bits.view(torch.float32).to(dtype), (signed.to(torch.float32) / 8 - CENTRE).to(dtype)


@dataclass
class Grid:
    """Steps and offsets [R, G, 1] as they are stored, and what they are worth."""

    step: Tensor
    offset: Tensor
    value: Tensor
    middle: Tensor

    @classmethod
    def nearest(cls, step: Tensor, offset: Tensor) -> "Grid":
        """The stored grid nearest to a step and an offset."""
        bits = step.nan_to_num(nan=0.0, posinf=32.0).clamp(0.0, 32.0).contiguous().view(torch.int32)
        stored = (((bits + (1 << (_STEP_SHIFT - 1))) >> _STEP_SHIFT) - _STEP_BIAS).clamp_(0, 255)
        value = ((stored + _STEP_BIAS) << _STEP_SHIFT).view(torch.float32)
        eighths = (offset * (1 / value) * 8).round_().nan_to_num(nan=-128.0).clamp_(-128, 127)
        return cls(stored, eighths, value, eighths / 8)

    def codes(self, numbers: Tensor) -> Tensor:
        """-8 to 7 of `numbers` [R, G, 32]."""
        return (numbers * (1 / self.value)).sub_(self.middle).round_().clamp_(-CENTRE, CENTRE - 1)

    def take(self, other: "Grid", better: Tensor) -> None:
        """Be `other` where that is `better` [R, G, 1]."""
        for name in ("step", "offset", "value", "middle"):
            setattr(self, name, torch.where(better, getattr(other, name), getattr(self, name)))


def best_grid(numbers: Tensor, importance: Tensor) -> Grid:
    """Of `numbers` [R, G, 32]: shares of their range, each fitted by least squares."""
    low, high = numbers.amin(-1, keepdim=True), numbers.amax(-1, keepdim=True)
    starts = []
    for share in _SHARES:
        step = torch.maximum((high - low) * (share / 15), torch.maximum(high, -low) * (1 / _REACH))
        # The middle of 16 levels lies half a step below level 8.
        starts.append((step, (low + high + step) / 2))
    return best_from(starts, numbers, importance)


def best_from(starts: Sequence[tuple[Tensor, Tensor]], numbers: Tensor, importance: Tensor) -> Grid:
    """Of these steps and offsets [R, G, 1], each fitted by least squares."""
    best, least = None, None
    for step, offset in starts:
        for _ in range(_FITS):
            grid = Grid.nearest(step, offset)
            error, step, offset = _missed(numbers, importance, grid)
            if best is None or least is None:
                best, least = grid, error
            else:
                best.take(grid, error < least)
                least = torch.minimum(error, least)
    assert best is not None
    return best


def _missed(numbers: Tensor, importance: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """What the grid misses [R, G, 1], and step and offset that fit its codes best."""
    codes = grid.codes(numbers)
    missed = ((codes + grid.middle) * grid.value).sub_(numbers).square_().mul_(importance)
    return missed.sum(-1, keepdim=True), *fitted(codes, numbers, importance, grid.value)


def fitted(codes: Tensor, numbers: Tensor, importance: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """By least squares the step and offset with which the `codes` of each group meet its `numbers` best; `step` is kept
    where one code alone fits none."""
    counted = codes * importance

    def total(tensor: Tensor) -> Tensor:
        return tensor.sum(-1, keepdim=True)

    sum_a, sum_av = total(importance), total(numbers * importance)
    sum_q, sum_qq, sum_qv = total(counted), total(counted * codes), total(counted * numbers)
    best = (sum_a * sum_qv - sum_q * sum_av) / (sum_a * sum_qq - sum_q.square())
    best = torch.where(best > 0, best, step)
    return best, (sum_av - best * sum_q) / sum_a


# The format.

_HALF, _HIGHEST = GROUP // 2, 15


class Int4(Grouped):
    """Codes 0..15."""

    name, bits, code_bits, version = "int4", 4.5, 4, 2  # version 1 had one scale a neuron in its down projection
    is_tier, distortion, takes_over = True, 0.013, True

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
