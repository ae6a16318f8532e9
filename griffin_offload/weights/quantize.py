"""Quantised matrices: 8 and 4 bit, in layouts that are closed under gathering neurons.

A gathered neuron takes its numbers and scales along and changes nothing else, so weights are quantised once.
Three layouts, all little more than their bits:

- int8: symmetric, one scale per output row. q [O, I] int8, scale [O].
- int4 rows: groups of 32 along a row, each with a scale and an offset. w = (q - 8) * scale + offset, q in 0..15.
  Two numbers a byte, [O, I / 2]: byte b of a group holds number b (low) and b + 16 (high). scale [O, I / 32, 2].
- int4 neurons, for the down projection, whose rows run over neurons: groups along a row would not survive a
  selection. Instead one scale per output and one per neuron: w[h, j] = (q - 7.5) * scale[h] * input_scale[j].
  Stored neuron by neuron, [I, O / 2], paired like rows.

The down projection has an input_scale [I] in 8 bit, too: norms of neurons differ, and it costs one multiplication
per activation. Scales are kept in the precision of the computation; numbers are rounded against the rounded scale.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from griffin_offload.errors import CheckpointError
from griffin_offload.kernels import quantizing

GROUP = 32
_HALF = GROUP // 2
_INT8_MAX = 127
# Steps of a 16-level quantiser of numbers with norm 1, the usual one first; heavy tails want wider ones.
_STEPS = (0.34, 0.28, 0.30, 0.32, 0.37, 0.40, 0.45)
_SAMPLED_COLUMNS = 512  # are enough to choose a row's step
BLOCK_NUMBERS = 2**20  # float32 copies of a block stay in the cache

Int4 = tuple[Tensor, Tensor]
"""Bytes and scales."""


def quantize_int8(weight: Tensor, scale: Tensor, out: Tensor, input_scale: Tensor | None = None) -> None:
    """Write `weight` [O, I] over its rows' `scale` [O], and its columns' `input_scale` [I], into `out`, int8 [O, I]."""
    columns, rows = None if input_scale is None else _divisor(input_scale), _divisor(scale)
    if quantizing.quantize_int8(weight, rows, out, columns):
        return
    for start, block in _row_blocks(weight):
        part = slice(start, start + block.shape[0])
        if columns is not None:
            block.div_(columns)
        block.div_(rows[part, None]).round_().clamp_(-_INT8_MAX, _INT8_MAX)
        out[part] = block


def int8_scale(weight: Tensor, dtype: torch.dtype, input_scale: Tensor | None = None) -> Tensor:
    """scale [O] of `weight` [O, I], of its columns divided by `input_scale` [I] where one is given."""
    divisor = None if input_scale is None else _divisor(input_scale)
    largest = quantizing.largest_of_rows(weight, divisor)
    if largest is None:
        blocks = (block if divisor is None else block.div_(divisor) for _, block in _row_blocks(weight))
        largest = torch.cat([block.abs_().amax(1) for block in blocks])
    return _finite(largest / _INT8_MAX, dtype)


def neuron_scale(down: Tensor, dtype: torch.dtype) -> Tensor:
    """input_scale [I] of a down projection [O, I]: the norm of each neuron's column, over the root of O."""
    norms = quantizing.column_norms(down)
    if norms is None:
        wide, factor = _wide(down), _factor(down)
        squares = torch.zeros(down.shape[1], dtype=wide, device=down.device)
        for _, block in _row_blocks(down):
            squares += block.mul_(factor).to(wide).square_().sum(0)
        norms = ((squares / down.shape[0]).sqrt() / factor).float()
    return _finite(norms, dtype)


def _wide(weight: Tensor) -> torch.dtype:
    """What squares are summed in: the kernels' float64, so that whoever quantises gets the same scales."""
    return torch.float32 if weight.device.type == "mps" else torch.float64  # MPS has none


def _factor(weight: Tensor) -> float:
    """A power of two that brings the largest of `weight` near one, so that squares of small ones stay numbers."""
    low, high = map(float, torch.aminmax(weight)) if weight.numel() else (0.0, 0.0)
    largest = max(-low, high)
    return 2.0 ** max(-100, min(-math.frexp(largest)[1], 100)) if math.isfinite(largest) else 1.0


def quantize_int4_rows(weight: Tensor, dtype: torch.dtype) -> Int4:
    """Bytes [O, I / 2] and scales [O, I / 32, 2] of `weight` [O, I]."""
    found = quantizing.quantize_int4_rows(weight, dtype)
    if found is not None:
        _finite(found[1], dtype)
        return found
    outputs, inputs = weight.shape
    packed = torch.empty(outputs, inputs // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(outputs, inputs // GROUP, 2, dtype=dtype, device=weight.device)
    for start, block in _row_blocks(weight):
        part = slice(start, start + block.shape[0])
        groups = block.view(block.shape[0], -1, GROUP)
        low, high = groups.amin(-1), groups.amax(-1)  # aminmax is 5x slower
        step = _finite((high - low) / 15, dtype)
        # The middle of 16 levels lies half a step above level 8's left neighbour.
        offset = _finite((low + high + step.float()) / 2, dtype)
        scales[part, :, 0], scales[part, :, 1] = step, offset
        levels = groups.sub_(offset.float()[..., None]).div_(_divisor(step)[..., None]).add_(8).round_().clamp_(0, 15)
        packed[part] = _pack(levels.to(torch.uint8)).view(block.shape[0], -1)
    return packed, scales


def int4_scale(down: Tensor, dtype: torch.dtype, input_scale: Tensor) -> Tensor:
    """scale [O] of a down projection [O, I] whose columns are divided by `input_scale`: the step that errs least."""
    stride, divisor = max(1, down.shape[1] // _SAMPLED_COLUMNS), _divisor(input_scale)
    found = quantizing.int4_scales(down, divisor, _STEPS, stride)
    if found is None:
        wide = _wide(down)
        sample = down[:, ::stride].to(wide) / divisor[::stride]
        norms = sample.square().mean(1).sqrt()
        sample = (sample / torch.where(norms > 0, norms, 1)[:, None]).float()
        errors = [_levels(sample / step).sub_(7.5).mul_(step).sub_(sample).square_().sum(1) for step in _STEPS]
        found = norms * torch.tensor(_STEPS, dtype=wide, device=down.device)[torch.stack(errors).argmin(0)]
    return _finite(found.float(), dtype)


def quantize_int4_neurons(columns: Tensor, input_scale: Tensor, scale: Tensor) -> Tensor:
    """Bytes [K, O / 2] of K neurons' columns [O, K] of a down projection."""
    divisor, rows = _divisor(input_scale), _divisor(scale)
    found = quantizing.quantize_int4_neurons(columns, divisor, rows)
    if found is not None:
        return found
    packed = torch.empty(columns.shape[1], columns.shape[0] // 2, dtype=torch.uint8, device=columns.device)
    for start, block in _row_blocks(columns.t()):  # a strided view: copied block by block
        part = slice(start, start + block.shape[0])
        block.div_(divisor[part, None]).div_(rows)
        groups = _levels(block).to(torch.uint8).view(block.shape[0], -1, GROUP)
        packed[part] = _pack(groups).view(block.shape[0], -1)
    return packed


def unpack_int4(packed: Tensor, out: Tensor) -> Tensor:
    """The numbers 0..15 of `packed` [R, C / 2], written as floats into `out` [R, C]."""
    low, high = out.view(packed.shape[0], -1, 2, _HALF).unbind(2)
    pairs = packed.view(packed.shape[0], -1, _HALF)
    low.copy_(pairs & 15)
    high.copy_(pairs >> 4)
    return out


def _pack(levels: Tensor) -> Tensor:
    """Two numbers a byte: levels uint8 [R, G, 32] to [R, G, 16]."""
    return levels[..., :_HALF] | (levels[..., _HALF:] << 4)


def _levels(scaled: Tensor) -> Tensor:
    # Level q stands for q - 7.5: sixteen levels, as many above zero as below.
    return scaled.add_(7.5).round_().clamp_(0, 15)


def _row_blocks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, float32 copy) of each block of rows."""
    rows = max(1, BLOCK_NUMBERS // max(weight.shape[1], 1))
    for start in range(0, weight.shape[0], rows):
        yield start, weight[start : start + rows].to(torch.float32, copy=True).contiguous()


def _divisor(scale: Tensor) -> Tensor:
    # A row of zeros has scale 0, and stays zero whatever it is divided by.
    return torch.where(scale == 0, torch.ones_like(scale), scale).float()


def _finite(scale: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = scale.to(dtype)
    if not torch.isfinite(rounded).all():
        raise CheckpointError("a matrix holds infinities or NaN, it cannot be quantised: use --quantize none")
    return rounded
