"""The int4 format: groups of 32 numbers with a step and an offset of 8 bits each (grouped.py has the layouts).

    number = scale * step * (code + offset),    code 0..15

- step and offset: of a group, a pair of bytes. The step byte is 2^(e - 11) * (1 + m / 16), e its upper and m its lower
  four bits, so that weights of up to 232 rms are reached; the offset byte counts signed eighths, from -8.
- codes: two a byte, byte b of a group holds number b (low) and b + 16 (high).

4.5 bits a number and one scale a row.

Down projections of what is no copy rest in rows of outputs, too, where all neurons stay. Where a file's numbers lie on
such grids, their codes are taken over as rows; neurons that are chosen of them are made numbers, and rounded once more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin_offload.formats.base import BLOCK_NUMBERS, RowCodes, Tensors, divisor, finite
from griffin_offload.formats.grouped import GROUP, Grouped
from griffin_offload.formats.translated import Codes
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
        table.add(
            table.Kernel("quantize", "norms_of_codes", "by numbers", _norms_by_torch, ours=False),
            table.Kernel("quantize", "pairs_of_codes", "by numbers", _pairs_by_torch, ours=False),
            table.Kernel("gather", "int4_columns", "by blocks", self.columns_by_torch, ours=False),
            last=True,
        )

    def taken_over(self, codes: Codes, dtype: torch.dtype) -> Tensors:
        scale = finite(table.call("quantize", "norms_of_codes", *codes), dtype)
        groups, missed = table.call("quantize", "pairs_of_codes", *codes, divisor(scale))
        if missed.any():  # groups that lie far from 0, say
            steps, lowest = codes.steps[missed][:, None], codes.lowest[missed][:, None]
            packed = codes.packed.view(*missed.shape, -1)
            was = torch.where(steps < 0, ~packed[missed], packed[missed])
            numbers = Codes(was, steps, lowest).numbers()
            packed[missed], pairs = self.quantize_rows(numbers, scale[missed.nonzero()[:, 0]])
            groups[missed] = pairs[:, 0]
        return {"weight": codes.packed, "groups": groups, "scale": scale}

    def take_over(self, full: Tensors, codes: RowCodes, chosen: Tensor, out: Tensors, *, parts: int = 1) -> bool:
        piece = max(4 * BLOCK_NUMBERS // max(full["weight"].shape[1], 1), 1)
        for chunk, start in self.row_chunks(full, chosen, out, parts):
            for rows in chunk.split(piece):
                own = codes(rows)
                if own is None:
                    return False
                for name, tensor in self.taken_over(own, out["scale"].dtype).items():
                    out[name][start : start + rows.numel()] = tensor
                start += rows.numel()
        return True

    def chosen_floats(self, full: Tensors, index: Tensor, dtype: torch.dtype, *, is_down: bool) -> Tensor:
        """Of a down projection in rows, too."""
        if not is_down or "input_scale" in full:
            return super().chosen_floats(full, index, dtype, is_down=is_down)
        out = torch.empty(full["scale"].shape[0], index.numel(), dtype=dtype, device=index.device)
        table.call("gather", "int4_columns", full["weight"], full["groups"], full["scale"].float(), index, out)
        return out

    def column_norms(self, full: Tensors) -> Tensor:
        if "input_scale" in full:
            return super().column_norms(full)
        neurons = torch.arange(full["groups"].shape[1] * GROUP, dtype=torch.long, device=full["groups"].device)
        parts = (self.chosen_floats(full, part, torch.float32, is_down=True) for part in neurons.split(self.chunk))
        return torch.cat([torch.linalg.vector_norm(part, dim=0) for part in parts])

    def columns_by_torch(self, codes: Tensor, groups: Tensor, scale: Tensor, chosen: Tensor, out: Tensor) -> None:
        """Write columns `chosen` [K] of rows of a `scale` [O] into `out` [O, K]: some rows at a time, of the groups
        that hold them."""
        first, end = int(chosen.min()) // GROUP, int(chosen.max()) // GROUP + 1
        step = max(BLOCK_NUMBERS // ((end - first) * GROUP), 1)
        for start in range(0, len(scale), step):
            rows, own = slice(start, start + step), slice(first * self.group_bytes, end * self.group_bytes)
            numbers = torch.empty(len(scale[rows]), (end - first) * GROUP, dtype=torch.float32, device=scale.device)
            self.unpack(codes[rows, own].contiguous(), groups[rows, first:end], numbers)
            out[rows] = numbers.mul_(scale[rows, None]).index_select(1, chosen - first * GROUP)

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


# torch's ways.

_MOST_MISSED = 2.0  # of a group, in squares of its step: as in int4_codes.c


def _norms_by_torch(packed: Tensor, steps: Tensor, lowest: Tensor) -> Tensor:
    return Codes(packed, steps, lowest).numbers().double().square_().mean(1).sqrt_().float()


def _pairs_by_torch(packed: Tensor, steps: Tensor, lowest: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    steps, lowest = steps / scale[:, None], lowest / scale[:, None]
    groups = packed.view(*steps.shape, -1)
    groups[steps < 0] = ~groups[steps < 0]
    steps, lowest = steps.abs(), torch.where(steps < 0, lowest + _HIGHEST * steps, lowest)
    # Codes of a group whose numbers are all the same: the outermost ones, on the far side of 0.
    alike, above = steps == 0, lowest > 0
    groups[alike] = torch.where(above[alike], 255, 0).to(torch.uint8)[:, None]
    steps = torch.where(alike, lowest.abs() / CENTRE, steps)
    lowest = torch.where(alike & above, lowest - _HIGHEST * steps, lowest)
    codes = torch.cat([groups & 15, groups >> 4], dim=-1).float()
    mean, nearest = codes.mean(-1), Grid.nearest(steps, lowest).step
    best: Tensor | None = None
    least, unit = torch.full_like(steps, torch.inf), torch.zeros_like(steps)
    for beside in (0, -1, 1):
        byte = (nearest + beside).clamp_(0, 255)
        own = steps_of(torch.stack([byte, torch.zeros_like(byte)], dim=-1).to(torch.uint8), torch.float32)[0]
        eighths = ((lowest - (own - steps) * mean) / own + CENTRE).mul_(8).round_().nan_to_num_(-128).clamp_(-128, 127)
        missed = (own[..., None] * codes + (own * (eighths / 8 - CENTRE))[..., None]) - (
            steps[..., None] * codes + lowest[..., None]
        )
        error = missed.square_().sum(-1)
        better = error < least
        pair = torch.stack([byte.to(torch.uint8), eighths.to(torch.int8).view(torch.uint8)], dim=-1)
        best = pair if best is None else torch.where(better[..., None], pair, best)
        least, unit = torch.where(better, error, least), torch.where(better, own, unit)
    assert best is not None
    return best, ~(least <= _MOST_MISSED * unit.square())


INT4 = Int4()
