"""Matrices of floats quantised row by row in the cache (quantizing.c), by the threads that multiply.

torch goes over a float32 copy of every number a dozen times (benchmarks/NOTES.md). weights/quantize.py has the formulas
and asks for these; whatever returns None, or False, is left to torch: other devices and processors, float64, and
matrices whose rows do not lie in one piece.
"""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from griffin_offload.kernels.compiled import NUMBER_TYPES, library
from griffin_offload.kernels.product import check

_QUANTIZING = struct.Struct("@6P9q")
"""The struct Quantizing of quantizing.c."""
_GROUP = 32
_HALF = 16  # its bytes
_SAMPLED = 1024
"""Numbers of a row that quantizing.c has room for."""


def largest_of_rows(weight: Tensor, divisor: Tensor | None) -> Tensor | None:
    """The largest magnitude of each row of `weight` [O, I], float32 [O], of its columns over `divisor` [I]; NaN where
    there is one."""
    out = torch.empty(weight.shape[0])
    return out if _run("quantize_largest", weight, out, divisor=divisor) else None


def quantize_int8(weight: Tensor, scale: Tensor, out: Tensor, divisor: Tensor | None) -> bool:
    """`weight` [O, I] over `scale` [O] and `divisor` [I], whole numbers within 127, to `out` int8 [O, I], whose rows
    may lie apart."""
    if out.shape != weight.shape or out.dtype != torch.int8 or out.stride(1) != 1:
        wanted = f"{tuple(weight.shape)} of int8, each row in one piece"
        raise ValueError(f"{tuple(out.shape)} of {out.dtype} must be {wanted}")
    return _run("quantize_int8", weight, out, divisor=divisor, scale=scale)


def quantize_int4_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Bytes [O, I / 2] and scales [O, I / 32, 2] of `dtype`; a scale is NaN where its group has infinities or NaN."""
    outputs, inputs = weight.shape
    if dtype not in NUMBER_TYPES:
        return None
    packed = torch.empty(outputs, inputs // 2, dtype=torch.uint8)
    scales = torch.empty(outputs, inputs // _GROUP, 2, dtype=dtype)
    check(packed, (outputs, inputs // _GROUP * _HALF))
    return (packed, scales) if _run("quantize_int4_rows", weight, packed, scales=scales) else None


def quantize_int4_neurons(columns: Tensor, divisor: Tensor, scale: Tensor) -> Tensor | None:
    """Bytes [K, O / 2] of `columns` [O, K] over `scale` [O] and `divisor` [K]."""
    outputs, neurons = columns.shape
    packed = torch.empty(neurons, outputs // 2, dtype=torch.uint8)
    check(packed, (neurons, outputs // _GROUP * _HALF))
    return packed if _run("quantize_int4_neurons", columns, packed, divisor=divisor, scale=scale) else None


def column_norms(weight: Tensor) -> Tensor | None:
    """Root mean squares of the columns of `weight` [O, I], float32 [I]."""
    out = torch.empty(weight.shape[1])
    return out if _run("quantize_column_norms", weight, out) else None


def int4_scales(weight: Tensor, divisor: Tensor, steps: Sequence[float], stride: int) -> Tensor | None:
    """float32 [O]: the norm of every `stride`-th number of a row of `weight` [O, I] over `divisor` [I], times that of
    `steps` which misses them least."""
    if -(-weight.shape[1] // stride) > _SAMPLED or not weight.shape[1]:
        raise ValueError(f"every {stride}th of {weight.shape[1]} numbers: 1 to {_SAMPLED} are known here")
    out, candidates = torch.empty(weight.shape[0]), torch.tensor(steps, dtype=torch.float64)
    done = _run("quantize_int4_scales", weight, out, divisor=divisor, steps=candidates, stride=stride)
    return out if done else None


def _run(
    function: str,
    weight: Tensor,
    out: Tensor,
    *,
    divisor: Tensor | None = None,
    scale: Tensor | None = None,
    steps: Tensor | None = None,
    scales: Tensor | None = None,
    stride: int = 0,
) -> bool:
    """False where the library, or what it wants of `weight`, is not there."""
    (rows, columns), kind = weight.shape, NUMBER_TYPES.get(weight.dtype)
    if kind is None or weight.device.type != "cpu" or weight.stride(1) != 1:
        return False
    found = library()
    if found is None:
        return False
    if divisor is not None:
        check(divisor, (columns,))
        divisor = torch.nn.functional.pad(divisor.float(), (0, -columns % _GROUP), value=1)
    if scale is not None:
        check(scale, (rows,))
        scale = scale.float()
    job = _QUANTIZING.pack(
        weight.data_ptr(),
        0 if divisor is None else divisor.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if steps is None else steps.data_ptr(),
        out.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        rows,
        columns,
        weight.stride(0),
        out.stride(0),
        kind,
        NUMBER_TYPES[torch.float32 if scales is None else scales.dtype],
        stride,
        0 if steps is None else steps.numel(),
        torch.get_num_threads(),
    )
    found.call(function, job)
    return True
