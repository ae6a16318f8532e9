"""Scales of rows and of neurons, in the precision of the computation, that several formats share."""

import math

import torch
from torch import Tensor

from griffin_offload.errors import CheckpointError
from griffin_offload.formats.base import row_blocks
from griffin_offload.kernels import table


def neuron_scale(down: Tensor, dtype: torch.dtype) -> Tensor:
    """input_scale [I] of a down projection [O, I]: the norm of each neuron's column, over the root of O."""
    return finite(table.call("quantize", "column_norms", down), dtype)


def row_scale(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """scale [O] of int4 rows: the root mean square of each row of `weight` [O, I]."""
    return finite(table.call("quantize", "row_norms", weight), dtype)


def divisor(scale: Tensor) -> Tensor:
    """What is divided by; a row of zeros has scale 0, and stays zero whatever it is divided by."""
    return torch.where(scale == 0, torch.ones_like(scale), scale).float()


def finite(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` in `dtype`; CheckpointError where that holds no number."""
    rounded = scale.to(dtype)
    if not torch.isfinite(rounded).all():
        raise CheckpointError("a matrix holds infinities or NaN, it cannot be quantised: use --quantize none")
    return rounded


# torch's ways.


def _column_norms(down: Tensor) -> Tensor:
    wide, factor = _wide(down), _factor(down)
    squares = torch.zeros(down.shape[1], dtype=wide, device=down.device)
    for _, block in row_blocks(down):
        squares += block.mul_(factor).to(wide).square_().sum(0)
    return ((squares / down.shape[0]).sqrt() / factor).float()


def _row_norms(weight: Tensor) -> Tensor:
    wide, factor = _wide(weight), _factor(weight)
    squares = [block.mul_(factor).to(wide).square_().mean(1) for _, block in row_blocks(weight)]
    return (torch.cat(squares).sqrt() / factor).float()


def _largest_of_rows(weight: Tensor, divisor: Tensor | None) -> Tensor:
    if divisor is None:
        return torch.maximum(weight.amax(1), -weight.amin(1)).float()
    return torch.cat([block.div_(divisor).abs_().amax(1) for _, block in row_blocks(weight)])


def _wide(weight: Tensor) -> torch.dtype:
    """What squares are summed in: the kernels' float64, so that whoever quantises gets the same scales."""
    return torch.float32 if weight.device.type == "mps" else torch.float64  # MPS has none


def _factor(weight: Tensor) -> float:
    """A power of two that brings the largest of `weight` near one, so that squares of small ones stay numbers."""
    low, high = map(float, torch.aminmax(weight)) if weight.numel() else (0.0, 0.0)
    largest = max(-low, high)
    return 2.0 ** max(-100, min(-math.frexp(largest)[1], 100)) if math.isfinite(largest) else 1.0


table.add(
    table.Kernel("quantize", "column_norms", "by blocks", _column_norms, ours=False),
    table.Kernel("quantize", "row_norms", "by blocks", _row_norms, ours=False),
    table.Kernel("quantize", "largest_of_rows", "by blocks", _largest_of_rows, ours=False),
    last=True,
)
