"""A matrix product as the kernels are asked for it: the struct of product.h, and what has to be true of it."""

import struct

import torch
from torch import Tensor

from griffin_offload.kernels.compiled import NUMBER_TYPES, Library

Sizes = tuple[int, int, int, int, int, int]
"""Rows, parts, outputs, features, inputs, group."""
Beside = tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""Input scale, weight, groups, scale, bias."""
_PRODUCT = struct.Struct("@13P11q")  # built for every product, so it is packed at once and not field by field
NOTHING_MADE = (0, 0, 0, 0, 0, 0)
"""For kernels that need no memory for sums, floats, numbers, step, totals and lanes."""


def run(
    library: Library,
    function: str,
    x: Tensor,
    beside: Beside,
    made: tuple[int, ...],
    sizes: Sizes,
    *,
    wide: int,
    ahead: bool,
) -> Tensor:
    """The product [rows, features] in the type of x, made by `function` of the library; `made` are addresses."""
    (input_scale, weight, groups, scale, bias), dtype = beside, x.dtype
    if input_scale is not None:
        check(input_scale, (sizes[4],), dtype)
    if bias is not None:
        check(bias, (sizes[3],), dtype)
    x, product = x.contiguous(), x.new_empty(sizes[0], sizes[3])
    job = _PRODUCT.pack(
        x.data_ptr(),
        0 if input_scale is None else input_scale.data_ptr(),
        weight.data_ptr(),
        0 if groups is None else groups.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        product.data_ptr(),
        *made,
        *sizes,
        NUMBER_TYPES[dtype],
        0 if scale is None else NUMBER_TYPES[scale.dtype],
        torch.get_num_threads(),
        wide,
        ahead,
    )
    library.call(function, job)
    return product


def check(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """ValueError for what would be read past its end."""
    if tensor.shape != shape or not tensor.is_contiguous() or tensor.dtype != (dtype or tensor.dtype):
        kind = f" of {dtype}" if dtype else ""
        raise ValueError(f"{tuple(tensor.shape)} of {tensor.dtype} must be {shape}{kind}, and contiguous")
