"""A matrix product as the kernels are asked for it: the struct of product.h, and what has to be true of it."""

import struct

import torch
from torch import Tensor

from griffin_offload.kernels.compiled import Library
from griffin_offload.kernels.handed import check as check
from griffin_offload.kernels.handed import number_type

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
    if not 0 <= sizes[3] <= sizes[2]:
        raise ValueError(f"features, {sizes[3]}, must be some of {sizes[2]} outputs")
    x_type, x = number_type(x, "x"), x.contiguous()
    check(x, (sizes[0], sizes[4]), dtype, "x")
    if input_scale is not None:
        check(input_scale, (sizes[4],), dtype, "the inputs' scale")
    if bias is not None:
        check(bias, (sizes[3],), dtype, "the bias")
    product = x.new_empty(sizes[0], sizes[3])
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
        x_type,
        0 if scale is None else number_type(scale, "the scale"),
        torch.get_num_threads(),
        wide,
        ahead,
    )
    library.call(function, job)
    return product
