"""Products where the library has no kernel: of a matrix that is translated block by block into a scratch; and of a few
rows with int8 rows, on CUDA by ours (triton_gemv.py), else by torch's kernel."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from griffin_offload.errors import one_line

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


# A few rows times int8 rows.

PACK_ROWS = 4
"""Up to so many torch's kernel is faster than translating the matrix (benchmarks/NOTES.md)."""
# With other widths torch's int8 kernel reads past the end of a bfloat16 row and returns garbage (torch 2.13).
_MULTIPLE = 32
# It loads inputs, and with four of them weights, as if they were aligned, and crashes where they are not: weights in
# a mapped file, rows in the middle of a tensor (torch 2.13).
_ALIGNMENT = 64


def pack_takes(x: Tensor, tensors: Mapping[str, Tensor | None]) -> bool:
    """Whether torch's kernel can multiply them, and is worth it. This build may have none: CUDA's came later."""
    device, weight = x.device.type, tensors["weight"]
    assert weight is not None
    if device == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2" and x.dtype != torch.bfloat16:
        return False  # it has vectors for bfloat16 alone: others take four times as long as a translated matrix
    known = weight.data_ptr() % _ALIGNMENT == 0 and x.shape[1] % _MULTIPLE == 0
    return known and bool(torch._C._dispatch_has_kernel_for_dispatch_key("aten::_weight_int8pack_mm", device.upper()))


def pack_product(x: Tensor, tensors: Mapping[str, Tensor | None], outputs: int, scratch: Any) -> Tensor:
    """By torch's."""
    x, weight, scale = scaled(x, tensors), tensors["weight"], tensors["scale"]
    assert weight is not None
    assert scale is not None
    aligned = x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()
    return _biased(torch._weight_int8pack_mm(aligned.contiguous(), weight, scale), tensors)


@functools.cache
def triton_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ours can be compiled for rows of `dtype`, and is right: the first call compiles it."""
    try:
        from griffin_offload.kernels.triton_gemv import check_kernel

        check_kernel(device, dtype)
    except Exception as error:  # no Triton, no compiler for its launcher, a device it does not know
        warnings.warn(f"int8 is multiplied by torch's slower kernel: {one_line(error)}", stacklevel=2)
        return False
    return True


def triton_takes(x: Tensor, tensors: Mapping[str, Tensor | None]) -> bool:
    """The same of ours."""
    return pack_takes(x, tensors) and triton_works(x.device, x.dtype)


def triton_product(x: Tensor, tensors: Mapping[str, Tensor | None], outputs: int, scratch: Any) -> Tensor:
    """By ours."""
    from griffin_offload.kernels.triton_gemv import multiply_int8

    weight, scale = tensors["weight"], tensors["scale"]
    assert weight is not None
    assert scale is not None
    return _biased(multiply_int8(scaled(x, tensors).contiguous(), weight, scale), tensors)


def _biased(product: Tensor, tensors: Mapping[str, Tensor | None]) -> Tensor:
    bias = tensors["bias"]
    return product if bias is None else product + bias
