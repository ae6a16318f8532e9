"""Quantised matrices: 8 bit here, 4 bit in int4.py, in layouts that are closed under gathering neurons.

A gathered neuron takes its numbers and scales along and changes nothing else, so weights are quantised once.

int8 is symmetric, one scale per output row: q [O, I] int8, scale [O]. The down projection has an input_scale [I], too:
norms of neurons differ, and it costs one multiplication per activation. Scales are kept in the precision of the
computation; numbers are rounded against the rounded scale.
"""

import math

import torch
from torch import Tensor

from griffin_offload.errors import CheckpointError
from griffin_offload.formats.base import row_blocks
from griffin_offload.kernels import quantize

_INT8_MAX = 127


def quantize_int8(weight: Tensor, scale: Tensor, out: Tensor, input_scale: Tensor | None = None) -> None:
    """Write `weight` [O, I] over its rows' `scale` [O], and its columns' `input_scale` [I], into `out`, int8 [O, I]."""
    columns, rows = None if input_scale is None else _divisor(input_scale), _divisor(scale)
    if quantize.quantize_int8(weight, rows, out, columns):
        return
    for start, block in row_blocks(weight):
        part = slice(start, start + block.shape[0])
        if columns is not None:
            block.div_(columns)
        block.div_(rows[part, None]).round_().clamp_(-_INT8_MAX, _INT8_MAX)
        out[part] = block


def int8_scale(weight: Tensor, dtype: torch.dtype, input_scale: Tensor | None = None) -> Tensor:
    """scale [O] of `weight` [O, I], of its columns divided by `input_scale` [I] where one is given."""
    divisor = None if input_scale is None else _divisor(input_scale)
    largest = quantize.largest_of_rows(weight, divisor)
    if largest is None:
        blocks = (block if divisor is None else block.div_(divisor) for _, block in row_blocks(weight))
        largest = torch.cat([block.abs_().amax(1) for block in blocks])
    return _finite(largest / _INT8_MAX, dtype)


def neuron_scale(down: Tensor, dtype: torch.dtype) -> Tensor:
    """input_scale [I] of a down projection [O, I]: the norm of each neuron's column, over the root of O."""
    norms = quantize.column_norms(down)
    if norms is None:
        wide, factor = _wide(down), _factor(down)
        squares = torch.zeros(down.shape[1], dtype=wide, device=down.device)
        for _, block in row_blocks(down):
            squares += block.mul_(factor).to(wide).square_().sum(0)
        norms = ((squares / down.shape[0]).sqrt() / factor).float()
    return _finite(norms, dtype)


def row_scale(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """scale [O] of int4 rows: the root mean square of each row of `weight` [O, I]."""
    norms = quantize.row_norms(weight)
    if norms is None:
        wide, factor = _wide(weight), _factor(weight)
        squares = [block.mul_(factor).to(wide).square_().mean(1) for _, block in row_blocks(weight)]
        norms = (torch.cat(squares).sqrt() / factor).float()
    return _finite(norms, dtype)


def _wide(weight: Tensor) -> torch.dtype:
    """What squares are summed in: the kernels' float64, so that whoever quantises gets the same scales."""
    return torch.float32 if weight.device.type == "mps" else torch.float64  # MPS has none


def _factor(weight: Tensor) -> float:
    """A power of two that brings the largest of `weight` near one, so that squares of small ones stay numbers."""
    low, high = map(float, torch.aminmax(weight)) if weight.numel() else (0.0, 0.0)
    largest = max(-low, high)
    return 2.0 ** max(-100, min(-math.frexp(largest)[1], 100)) if math.isfinite(largest) else 1.0


def _divisor(scale: Tensor) -> Tensor:
    # A row of zeros has scale 0, and stays zero whatever it is divided by.
    return torch.where(scale == 0, torch.ones_like(scale), scale).float()


def _finite(scale: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = scale.to(dtype)
    if not torch.isfinite(rounded).all():
        raise CheckpointError("a matrix holds infinities or NaN, it cannot be quantised: use --quantize none")
    return rounded
