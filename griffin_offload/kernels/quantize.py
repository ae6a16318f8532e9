"""Matrices of floats quantised row by row in the cache (quantize.c), by the threads that multiply.

torch goes over a float32 copy of every number a dozen times (benchmarks/NOTES.md). formats/int8.py and int4.py
have the formulas and ask for these; whatever returns None, or False, is left to torch: other devices and processors,
float64, and matrices whose rows do not lie in one piece.
"""

import struct

import torch
from torch import Tensor

from griffin_offload.kernels.library import NUMBER_TYPES, Library, check, check_rows, library

_QUANTIZING = struct.Struct("@6P6q")
"""The struct Quantizing of quantize.c."""
_GROUP = 32
_HALF = 16  # its bytes


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


def quantize_int4_rows(weight: Tensor, scale: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Codes [O, I / 2] and groups [O, I / 32, 2] of `weight` [O, I] over `scale` [O], none of which is 0; errors count
    by the `importance` [I] of their input."""
    found = _library_for(weight)
    if found is None:
        return None
    outputs, groups = weight.shape[0], _groups(weight.shape[1])
    made = _int4_of(outputs, groups)
    _run(found, "quantize_int4_rows", weight, made[0], scale=scale, groups=made[1], importance=importance)
    return made


def quantize_int4_neurons(columns: Tensor, scale: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Codes [K, O / 2] and groups [K, O / 32, 2] of `columns` [O, K] over `scale` [K], none of which is 0; errors
    count by the `importance` [O] of their output."""
    found = _library_for(columns)
    if found is None:
        return None
    made = _int4_of(columns.shape[1], _groups(columns.shape[0]))
    _run(found, "quantize_int4_neurons", columns, made[0], scale=scale, groups=made[1], importance=importance)
    return made


def row_norms(weight: Tensor) -> Tensor | None:
    """Root mean squares of the rows of `weight` [O, I], float32 [O]."""
    found = _library_for(weight)
    if found is None:
        return None
    norms = torch.empty(weight.shape[0], dtype=torch.float32, device="cpu")
    _run(found, "quantize_row_norms", weight, norms)
    return norms


def column_norms(weight: Tensor) -> Tensor | None:
    """Root mean squares of the columns of `weight` [O, I], float32 [I]."""
    found = _library_for(weight)
    if found is None:
        return None
    norms = torch.empty(weight.shape[1], dtype=torch.float32, device="cpu")
    _run(found, "quantize_column_norms", weight, norms)
    return norms


def _library_for(weight: Tensor) -> Library | None:
    known = weight.dtype in NUMBER_TYPES and weight.device.type == "cpu" and weight.stride(1) == 1
    return library() if known else None


def _groups(numbers: int) -> int:
    if numbers % _GROUP:
        raise ValueError(f"{numbers} numbers must be whole groups of {_GROUP}")
    return numbers // _GROUP


def _int4_of(rows: int, groups: int) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, groups * _HALF, dtype=torch.uint8, device="cpu"), torch.empty(
        rows, groups, 2, dtype=torch.uint8, device="cpu"
    )


def _run(
    found: Library,
    function: str,
    weight: Tensor,
    out: Tensor,
    *,
    divisor: Tensor | None = None,
    scale: Tensor | None = None,
    groups: Tensor | None = None,
    importance: Tensor | None = None,
) -> None:
    rows, columns = weight.shape
    if divisor is not None:
        check(divisor, (columns,), name="the divisor")
        divisor = torch.nn.functional.pad(divisor.float(), (0, -columns % _GROUP), value=1)
    if scale is not None:
        check(scale, (columns if function == "quantize_int4_neurons" else rows,), name="the scale")
        scale = scale.float()
    if importance is not None:
        check(importance, (rows if function == "quantize_int4_neurons" else columns,), name="the importance")
        importance = importance.float()
    job = _QUANTIZING.pack(
        weight.data_ptr(),
        *(0 if beside is None else beside.data_ptr() for beside in (divisor, scale, importance, out, groups)),
        rows,
        columns,
        weight.stride(0),
        out.stride(0),
        NUMBER_TYPES[weight.dtype],
        torch.get_num_threads(),
    )
    found.call(function, job)
