"""Products with matrices that are not multiplied as they rest: translated block by block into a shared scratch.

A block is a few rows of the matrix in the precision that the processor multiplies in, small enough for its cache (on
CUDA: one matrix). Scales that belong to outputs are applied to the product, not to the block.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from griffin_offload.weights.int4_tiles import cpu_block, unpack_tiles
from griffin_offload.weights.quantize import GROUP, unpack_int4


class Scratch:
    """One buffer for all blocks of a model, which never compute at the same time."""

    def __init__(self, nbytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self._buffer = torch.empty(nbytes // dtype.itemsize, dtype=dtype, device=device)

    def rows(self, width: int) -> int:
        """Rows of `width` numbers that one block holds, at least one."""
        return max(self._buffer.numel() // width, 1)

    def block(self, *shape: int) -> Tensor:
        """A view of `shape`; a row longer than the scratch (the head of a tiny plan) gets memory of its own."""
        numbers = 1
        for size in shape:
            numbers *= size
        if numbers > self._buffer.numel():
            return torch.empty(shape, dtype=self.dtype, device=self._buffer.device)
        return self._buffer[:numbers].view(shape)


def multiply(x: Tensor, weight: Tensor, scratch: Scratch, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [M, I] times `weight` [O, I], of any type that converts to numbers, and its rows' `scale` [O]."""

    def fill(start: int, end: int) -> Tensor:
        part = weight[start:end]
        return scratch.block(*part.shape).copy_(part).t()

    return _by_outputs(x, weight.shape[0], scratch.rows(weight.shape[1]), scratch.dtype, fill, scale, bias)


def multiply_int4_rows(x: Tensor, packed: Tensor, scales: Tensor, scratch: Scratch, bias: Tensor | None) -> Tensor:
    """x [M, I] times int4 rows [O, I / 2] with scales [O, I / 32, 2]."""
    inputs = 2 * packed.shape[1]

    def fill(start: int, end: int) -> Tensor:
        block = unpack_int4(packed[start:end], scratch.block(end - start, inputs))
        scale, offset = scales[start:end].to(block.dtype).unbind(-1)
        block.view(end - start, -1, GROUP).mul_(scale[..., None]).add_((offset - 8 * scale)[..., None])
        return block.t()

    return _by_outputs(x, packed.shape[0], scratch.rows(inputs), scratch.dtype, fill, None, bias)


def multiply_tiles_by_blocks(
    x: Tensor, tiles: Tensor, scales: Tensor, scratch: Scratch, outputs: int, bias: Tensor | None
) -> Tensor:
    """x [M, I] times the first `outputs` rows of int4 tiles, on the CPU."""
    inputs, block = 2 * tiles.shape[1], cpu_block()

    def fill(start: int, _: int) -> Tensor:
        return unpack_tiles(tiles, scales, start, start + block, scratch.block(1, inputs, block))[0]

    # One block at a time: several would have to be copied side by side.
    return _by_outputs(x, outputs, block, scratch.dtype, fill, None, bias)


def multiply_int4_neurons(x: Tensor, packed: Tensor, scale: Tensor, scratch: Scratch, bias: Tensor | None) -> Tensor:
    """x [M, I] times int4 neurons [I, O / 2] with one scale per output [O]; x has the neurons' scale in it."""
    outputs = 2 * packed.shape[1]
    wide, step = x.to(scratch.dtype), scratch.rows(outputs)
    total = torch.zeros(x.shape[0], outputs, dtype=scratch.dtype, device=x.device)
    for start in range(0, packed.shape[0], step):
        part = packed[start : start + step]
        block = unpack_int4(part, scratch.block(part.shape[0], outputs)).sub_(7.5)
        total.addmm_(wide[:, start : start + step], block)
    total *= scale
    return (total if bias is None else total.add_(bias)).to(x.dtype)


def _by_outputs(
    x: Tensor,
    outputs: int,
    step: int,
    dtype: torch.dtype,
    fill: Callable[[int, int], Tensor],
    scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """`fill(start, end)` gives a block [I, outputs of it], at least those asked for."""
    wide = x.to(dtype)
    result = torch.empty(x.shape[0], outputs, dtype=x.dtype, device=x.device)
    for start in range(0, outputs, step):
        end = min(start + step, outputs)
        product = (wide @ fill(start, end))[:, : end - start]
        if scale is not None:
            product *= scale[start:end]
        if bias is not None:
            product += bias[start:end]
        result[:, start:end] = product
    return result
