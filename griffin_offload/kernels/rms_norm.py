"""Root mean square norm of a few 16-bit rows (rms_norm.c): one call in place of eight small ones."""

import struct

import torch
from torch import Tensor

from griffin_offload.kernels.library import HALVES, NUMBER_TYPES, check, library, needs_gradient

ROWS = 32
"""Up to so many rows one thread is faster than torch's operators."""
_NORM = struct.Struct("@3P3qf")
"""The struct Norm of rms_norm.c."""


def takes(x: Tensor, weight: Tensor, *beside: object) -> bool:
    """Whether `rms_norm` takes these: a few rows of 16 bits on the CPU."""
    alike = x.dtype == weight.dtype and weight.is_contiguous() and x.is_contiguous()
    few = 0 < x.numel() <= ROWS * weight.numel() and x.shape[-1:] == weight.shape
    return alike and few and not needs_gradient(x)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *beside: object) -> Tensor:
    """x [..., H] over the root of its mean square and `epsilon`, rounded, times `weight` [H]: as x."""
    found = library()
    assert found is not None, "the table was not asked"
    if x.dtype not in HALVES or x.shape[-1:] != weight.shape:
        raise ValueError(f"x, {tuple(x.shape)} of {x.dtype}, must be of 16-bit rows of {weight.numel()}")
    check(x, x.shape, name="x")
    check(weight, weight.shape, x.dtype, "the weight")
    normed, size = torch.empty_like(x), weight.numel()
    where = (x.data_ptr(), weight.data_ptr(), normed.data_ptr())
    found.call("rms_norm", _NORM.pack(*where, x.numel() // size, size, NUMBER_TYPES[x.dtype], epsilon))
    return normed
