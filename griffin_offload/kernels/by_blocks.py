"""torch's way to multiply a matrix that is not multiplied as it rests: translated block by block into a scratch."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_MAX_SCRATCH_BYTES = 16 * 2**20
_FLOAT_BYTES = 4


def scratch_bytes(width: int, rows: int, layer_bytes: int) -> int:
    """Of a scratch for matrices whose rows are up to `width` numbers, of which so many are translated together: small
    against a layer of `layer_bytes`, inside a cache."""
    return max(width * rows * _FLOAT_BYTES, min(layer_bytes // 8, _MAX_SCRATCH_BYTES))


def product_bytes(tokens: int, width: int, scratch: int) -> int:
    """Of the product of `tokens` with a block that a scratch of so many bytes holds, rows being `width` numbers."""
    return tokens * scratch // width


class Scratch:
    """One buffer for all blocks of a model, which never compute at the same time."""

    def __init__(self, nbytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.buffer = torch.empty(nbytes // dtype.itemsize, dtype=dtype, device=device)

    def rows(self, width: int) -> int:
        """Rows of `width` numbers that one block holds, at least one."""
        return max(self.buffer.numel() // width, 1)

    def block(self, *shape: int) -> Tensor:
        """A view of `shape`; a row longer than the scratch (the head of a tiny plan) gets memory of its own."""
        numbers = 1
        for size in shape:
            numbers *= size
        if numbers > self.buffer.numel():
            return torch.empty(shape, dtype=self.dtype, device=self.buffer.device)
        return self.buffer[:numbers].view(shape)


def multiply(x: Tensor, weight: Tensor, scratch: Scratch, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [M, I] times `weight` [O, I], of any type that converts to numbers, and its rows' `scale` [O]."""

    def fill(start: int, end: int) -> Tensor:
        part = weight[start:end]
        return scratch.block(*part.shape).copy_(part).t()

    return by_outputs(x, weight.shape[0], scratch.rows(weight.shape[1]), scratch.dtype, fill, scale, bias)


def by_outputs(
    x: Tensor,
    outputs: int,
    step: int,
    dtype: torch.dtype,
    fill: Callable[[int, int], Tensor],
    scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """x [M, I] times a matrix of `outputs`: `fill(start, end)` gives a block of it [I, outputs], at least those asked
    for, in `dtype`."""
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


def scaled(x: Tensor, tensors: Mapping[str, Tensor | None]) -> Tensor:
    """x [M, I] times the scale of a down projection's neurons, for kernels that do not do that themselves."""
    scale = tensors["input_scale"]
    return x if scale is None else x * scale


def typed(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`tensor` in `dtype`."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)
