"""Products with matrices that are not multiplied as they rest: translated block by block into a shared scratch.

A block is a few rows of the matrix in the precision that the processor multiplies in, small enough for its cache (on
CUDA: one matrix). Scales that belong to outputs are applied to the product, not to the block.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from griffin_offload.weights.int4 import STRIP, unpack, unpack_strip


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


def multiply_int4_rows(
    x: Tensor, codes: Tensor, groups: Tensor, scratch: Scratch, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """x [M, I] times int4 rows, codes [O, I / 2], groups [O, I / 32, 2] and `scale` [O]."""
    inputs = 2 * codes.shape[1]

    def fill(start: int, end: int) -> Tensor:
        return unpack(codes[start:end], groups[start:end], scratch.block(end - start, inputs)).t()

    return _by_outputs(x, codes.shape[0], scratch.rows(inputs), scratch.dtype, fill, scale, bias)


def multiply_int4_strips(
    x: Tensor, codes: Tensor, groups: Tensor, scratch: Scratch, outputs: int, bias: Tensor | None
) -> Tensor:
    """x [M, I], which has the neurons' scale in it, times the first `outputs` outputs of int4 strips."""
    inputs, pairs = codes.shape[1], groups.view(-1, 2, *groups.shape[1:])

    def fill(start: int, _: int) -> Tensor:
        return unpack_strip(codes[start // STRIP], pairs[start // STRIP], scratch.block(inputs, STRIP))

    return _by_outputs(x, outputs, STRIP, scratch.dtype, fill, None, bias)


def multiply_int4_neurons(x: Tensor, codes: Tensor, groups: Tensor, scratch: Scratch, bias: Tensor | None) -> Tensor:
    """x [M, I], which has the neurons' scale in it, times int4 neurons, codes [I, O / 2] and groups [I, O / 32, 2]."""
    outputs = 2 * codes.shape[1]
    wide, step = x.to(scratch.dtype), scratch.rows(outputs)
    total = torch.zeros(x.shape[0], outputs, dtype=scratch.dtype, device=x.device)
    for start in range(0, codes.shape[0], step):
        part = slice(start, start + step)
        block = unpack(codes[part], groups[part], scratch.block(codes[part].shape[0], outputs))
        total.addmm_(wide[:, part], block)
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
