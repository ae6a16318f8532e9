"""A few rows times int8 rows where the library has no kernel: on CUDA by ours (triton_gemv.py), else by torch's."""

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from griffin_offload.errors import one_line
from griffin_offload.kernels.by_blocks import scaled

ROWS = 4
"""Up to so many torch's kernel is faster than translating the matrix (benchmarks/NOTES.md)."""
# With other widths torch's int8 kernel reads past the end of a bfloat16 row and returns garbage (torch 2.13).
_MULTIPLE = 32
# It loads inputs, and with four of them weights, as if they were aligned, and crashes where they are not: weights in
# a mapped file, rows in the middle of a tensor (torch 2.13).
_ALIGNMENT = 64


def takes(x: Tensor, tensors: Mapping[str, Tensor | None]) -> bool:
    """Whether torch's kernel can multiply them, and is worth it. This build may have none: CUDA's came later."""
    device, weight = x.device.type, tensors["weight"]
    assert weight is not None
    if device == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2" and x.dtype != torch.bfloat16:
        return False  # it has vectors for bfloat16 alone: others take four times as long as a translated matrix
    known = weight.data_ptr() % _ALIGNMENT == 0 and x.shape[1] % _MULTIPLE == 0
    return known and bool(torch._C._dispatch_has_kernel_for_dispatch_key("aten::_weight_int8pack_mm", device.upper()))


def product(x: Tensor, tensors: Mapping[str, Tensor | None], outputs: int, scratch: Any) -> Tensor:
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
    return takes(x, tensors) and triton_works(x.device, x.dtype)


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
