"""Matrices of floats quantised row by row in the cache (quantizing.c), by the threads that multiply.

torch goes over a float32 copy of every number a dozen times (benchmarks/NOTES.md). weights/quantize.py has the formulas
and asks for these; whatever returns None, or False, is left to torch: other devices and processors, float64, and
matrices whose rows do not lie in one piece.
"""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from griffin_offload.kernels.compiled import NUMBER_TYPES, Library, library
from griffin_offload.kernels.handed import check, check_rows

_QUANTIZING = struct.Struct("@6P9q")
"""The struct Quantizing of quantizing.c."""
_GROUP = 32
_HALF = 16  # its bytes
_SAMPLED = 1024
"""Numbers of a row that quantizing.c has room for."""


def largest_of_rows(weight: Tensor, divisor: Tensor | None) -> Tensor | None:
    """The largest magnitude of each row of `weight` [O, I], float32 [O], of its columns over `divisor` [I]; NaN where
    there is one."""
    found = _library_for(weight)
    if found is None:
        return None
    largest = torch.empty(weight.shape[0], dtype=torch.float32, device="cpu")
    _run(found, "quantize_largest", weight, largest, divisor=divisor)
    return largest


def quantize_int8(weight: Tensor, scale: Tensor, out: Tensor, divisor: Tensor | None) -> bool:
    """`weight` [O, I] over `scale` [O] and `divisor` [I], whole numbers within 127, to `out` int8 [O, I], whose rows
    may lie apart."""
    found = _library_for(weight)
    if found is None:
        return False
    check_rows(out, (weight.shape[0], weight.shape[1]), torch.int8, "the numbers", written=True)
    _run(found, "quantize_int8", weight, out, divisor=divisor, scale=scale)
    return True


def quantize_int4_rows(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Bytes [O, I / 2] and scales [O, I / 32, 2] of `dtype`; a scale is NaN where its group has infinities or NaN."""
    found = _library_for(weight)
    if found is None or dtype not in NUMBER_TYPES:
        return None
    outputs, groups = weight.shape[0], _groups(weight.shape[1])
    packed = torch.empty(outputs, groups * _HALF, dtype=torch.uint8, device="cpu")
    scales = torch.empty(outputs, groups, 2, dtype=dtype, device="cpu")
    _run(found, "quantize_int4_rows", weight, packed, scales=scales)
    return packed, scales


def quantize_int4_neurons(columns: Tensor, divisor: Tensor, scale: Tensor) -> Tensor | None:
    """Bytes [K, O / 2] of `columns` [O, K] over `scale` [O] and `divisor` [K]."""
    found = _library_for(columns)
    if found is None:
        return None
    packed = torch.empty(columns.shape[1], _groups(columns.shape[0]) * _HALF, dtype=torch.uint8, device="cpu")
    _run(found, "quantize_int4_neurons", columns, packed, divisor=divisor, scale=scale)
    return packed


def column_norms(weight: Tensor) -> Tensor | None:
    """Root mean squares of the columns of `weight` [O, I], float32 [I]."""
    found = _library_for(weight)
    if found is None:
        return None
    norms = torch.empty(weight.shape[1], dtype=torch.float32, device="cpu")
    _run(found, "quantize_column_norms", weight, norms)
    return norms


def int4_scales(weight: Tensor, divisor: Tensor, steps: Sequence[float], stride: int) -> Tensor | None:
    """float32 [O]: the norm of every `stride`-th number of a row of `weight` [O, I] over `divisor` [I], times that of
    `steps` which misses them least."""
    found = _library_for(weight)
    if found is None:
        return None
    if not 1 <= -(-weight.shape[1] // stride) <= _SAMPLED:
        raise ValueError(f"every {stride}th of {weight.shape[1]} numbers: 1 to {_SAMPLED} are known here")
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device="cpu")
    candidates = torch.tensor(steps, dtype=torch.float64, device="cpu")
    _run(found, "quantize_int4_scales", weight, scales, divisor=divisor, steps=candidates, stride=stride)
    return scales


def _library_for(weight: Tensor) -> Library | None:
    known = weight.dtype in NUMBER_TYPES and weight.device.type == "cpu" and weight.stride(1) == 1
    return library() if known else None


def _groups(numbers: int) -> int:
    if numbers % _GROUP:
        raise ValueError(f"{numbers} numbers must be whole groups of {_GROUP}")
    return numbers // _GROUP


def _run(
    found: Library,
    function: str,
    weight: Tensor,
    out: Tensor,
    *,
    divisor: Tensor | None = None,
    scale: Tensor | None = None,
    steps: Tensor | None = None,
    scales: Tensor | None = None,
    stride: int = 0,
) -> None:
    rows, columns = weight.shape
    if divisor is not None:
        check(divisor, (columns,), name="the divisor")
        divisor = torch.nn.functional.pad(divisor.float(), (0, -columns % _GROUP), value=1)
    if scale is not None:
        check(scale, (rows,), name="the scale")
        scale = scale.float()
    job = _QUANTIZING.pack(
        weight.data_ptr(),
        *(0 if beside is None else beside.data_ptr() for beside in (divisor, scale, steps)),
        out.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        rows,
        columns,
        weight.stride(0),
        out.stride(0),
        NUMBER_TYPES[weight.dtype],
        NUMBER_TYPES[torch.float32 if scales is None else scales.dtype],
        stride,
        0 if steps is None else steps.numel(),
        torch.get_num_threads(),
    )
    found.call(function, job)
