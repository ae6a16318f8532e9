"""Matrices of floats quantised row by row in the cache (quantize.c), by the threads that multiply.

torch goes over a float32 copy of every number a dozen times (benchmarks/NOTES.md). formats/ has the formulas, and
torch's way for what these do not take: other devices and processors, float64, and rows that do not lie in one piece.
"""

import struct

import torch
from torch import Tensor

from griffin_offload.kernels.library import NUMBER_TYPES, check, check_rows, library

_QUANTIZING = struct.Struct("@9P7q")
"""The struct Quantizing of quantize.c."""
_CODES = struct.Struct("@7P3q")
"""The struct Codes of int4_codes.c."""
_GROUP = 32


def takes(weight: Tensor, *beside: object) -> bool:
    """Whether these take `weight`, of one of NUMBER_TYPES on the CPU."""
    return weight.stride(1) == 1


def largest_of_rows(weight: Tensor, divisor: Tensor | None) -> Tensor:
    """The largest magnitude of each row of `weight` [O, I], float32 [O], of its columns over `divisor` [I]; NaN where
    there is one."""
    largest = torch.empty(weight.shape[0], dtype=torch.float32, device="cpu")
    run("quantize_largest", weight, largest, divisor=divisor)
    return largest


def quantize_int8(weight: Tensor, scale: Tensor, out: Tensor, divisor: Tensor | None) -> None:
    """`weight` [O, I] over `scale` [O] and `divisor` [I], whole numbers within 127, to `out` int8 [O, I], whose rows
    may lie apart."""
    check_rows(out, (weight.shape[0], weight.shape[1]), torch.int8, "the numbers", written=True)
    run("quantize_int8", weight, out, divisor=divisor, scale=scale)


def quantize_rows(
    bits: int,
    weight: Tensor,
    scale: Tensor,
    importance: Tensor | None,
    feedback: Tensor | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes [O, I bits / 8] and groups [O, I / 32, 2] of `weight` [O, I] over `scale` [O], none of which is 0, in 2 to
    4 bits; errors count by the `importance` [I] of their input. `feedback` [2, I]: what each input takes of the errors
    before it, and gives of its own; groups pass in `order`, int32 [I / 32]."""
    outputs, groups = weight.shape[0], _groups(weight.shape[1])
    made = _packed_of(bits, outputs, groups)
    known = {"importance": importance, "feedback": feedback, "order": order}
    run(f"quantize_int{bits}_rows", weight, made[0], scale=scale, groups=made[1], by_columns=False, **known)
    return made


def norms_of_codes(codes: Tensor, steps: Tensor, lowest: Tensor) -> Tensor:
    """Root mean squares float32 [O] of rows of codes [O, I / 2], of each 32 of which a step and the lowest level are
    known, [O, I / 32]."""
    norms = torch.empty(codes.shape[0], dtype=torch.float32, device="cpu")
    _of_codes("norms_of_codes", codes, steps, lowest, norms=norms)
    return norms


def pairs_of_codes(codes: Tensor, steps: Tensor, lowest: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of int4's grids nearest to these, over `scale` [O], none of which is 0: groups [O, I / 32, 2]. `codes`
    are turned around where a step is below 0. And which are out of reach, bool [O, I / 32]."""
    groups = torch.empty(*steps.shape, 2, dtype=torch.uint8, device="cpu")
    missed = torch.empty(steps.shape, dtype=torch.bool, device="cpu")
    check(scale, (codes.shape[0],), torch.float32, "the scale")
    _of_codes("pairs_of_codes", codes, steps, lowest, scale=scale, pairs=groups, missed=missed)
    return groups, missed


def _of_codes(function: str, codes: Tensor, steps: Tensor, lowest: Tensor, **beside: Tensor) -> None:
    found, (rows, groups) = library(), steps.shape
    assert found is not None, "the table was not asked"
    check(codes, (rows, groups * _GROUP // 2), torch.uint8, "the codes")
    for grid in (steps, lowest):
        check(grid, (rows, groups), torch.float32, "the grids")
    made = (beside.get(name) for name in ("scale", "norms", "pairs", "missed"))
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in (codes, steps, lowest, *made))
    found.call(function, _CODES.pack(*addresses, rows, groups, torch.get_num_threads()))


def quantize_neurons(
    bits: int,
    columns: Tensor,
    scale: Tensor,
    importance: Tensor | None,
    feedback: Tensor | None = None,
    order: Tensor | None = None,
    carried: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes [K, O bits / 8] and groups [K, O / 32, 2] of `columns` [O, K] over `scale` [K], none of which is 0; errors
    count by the `importance` [O] of their output. `feedback` [2, K] and `order` as of rows; what those before them have
    missed is `carried` [O], to which theirs is added."""
    made = _packed_of(bits, columns.shape[1], _groups(columns.shape[0]))
    function = f"quantize_int{bits}_neurons"
    known = {"importance": importance, "feedback": feedback, "order": order, "carried": carried}
    run(function, columns, made[0], scale=scale, groups=made[1], by_columns=True, **known)
    return made


def of_int4(
    bits: int, codes: Tensor, groups: Tensor, importance: Tensor | None, stored: object
) -> tuple[Tensor, Tensor]:
    """Codes and groups in 2 or 3 bits of rows that are int4 codes [O, I / 2] and groups [O, I / 32, 2], by the same
    scales; errors count by the `importance` [I] of their input."""
    (rows, count), found = groups.shape[:2], library()
    check(codes, (rows, count * _GROUP // 2), torch.uint8, "the codes")
    check(groups, (rows, count, 2), torch.uint8, "the groups")
    made = _packed_of(bits, rows, count)
    if importance is not None:
        check(importance, (count * _GROUP,), name="the importance")
        importance = importance.float()
    addresses = (codes, groups, None, importance, None, None, None, *made)
    job = _QUANTIZING.pack(
        *(0 if tensor is None else tensor.data_ptr() for tensor in addresses),
        *(rows, count * _GROUP, 0, 0, 0, torch.get_num_threads(), found is not None and found.sums_bytes),
    )
    assert found is not None, "the table was not asked"
    found.call(f"quantize_int{bits}_of_int4", job)
    return made


def row_norms(weight: Tensor) -> Tensor:
    """Root mean squares of the rows of `weight` [O, I], float32 [O]."""
    norms = torch.empty(weight.shape[0], dtype=torch.float32, device="cpu")
    run("quantize_row_norms", weight, norms)
    return norms


def column_norms(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Root mean squares of the columns of `weight` [O, I], over `scale` [O] if there is one, float32 [I]."""
    norms = torch.empty(weight.shape[1], dtype=torch.float32, device="cpu")
    run("quantize_column_norms", weight, norms, scale=scale)
    return norms


def _groups(numbers: int) -> int:
    if numbers % _GROUP:
        raise ValueError(f"{numbers} numbers must be whole groups of {_GROUP}")
    return numbers // _GROUP


def _packed_of(bits: int, rows: int, groups: int) -> tuple[Tensor, Tensor]:
    codes = torch.empty(rows, groups * _GROUP * bits // 8, dtype=torch.uint8, device="cpu")
    return codes, torch.empty(rows, groups, 2, dtype=torch.uint8, device="cpu")


def run(
    function: str,
    weight: Tensor,
    out: Tensor,
    *,
    divisor: Tensor | None = None,
    scale: Tensor | None = None,
    groups: Tensor | None = None,
    importance: Tensor | None = None,
    feedback: Tensor | None = None,
    order: Tensor | None = None,
    carried: Tensor | None = None,
    by_columns: bool = False,
) -> None:
    found, (rows, columns) = library(), weight.shape
    assert found is not None, "the table was not asked"
    if divisor is not None:
        check(divisor, (columns,), name="the divisor")
        divisor = torch.nn.functional.pad(divisor.float(), (0, -columns % _GROUP), value=1)
    if scale is not None:
        check(scale, (columns if by_columns else rows,), name="the scale")
        scale = scale.float()
    if importance is not None:
        check(importance, (rows if by_columns else columns,), name="the importance")
        importance = importance.float()
    if feedback is not None:
        check(feedback, (2, columns), torch.float32, "the feedback")
    if order is not None:
        groups_of = -(-columns // _GROUP)
        check(order, (groups_of,), torch.int32, "the order")
        if groups_of and not 0 <= int(order.min()) <= int(order.max()) < groups_of:
            raise ValueError(f"the order must be of {groups_of} groups, counted from 0")
    if carried is not None:
        check(carried, (rows,), torch.float32, "what is carried")
    beside = (divisor, scale, importance, feedback, order, carried, out, groups)
    job = _QUANTIZING.pack(
        weight.data_ptr(),
        *(0 if tensor is None else tensor.data_ptr() for tensor in beside),
        rows,
        columns,
        weight.stride(0),
        out.stride(0),
        NUMBER_TYPES[weight.dtype],
        torch.get_num_threads(),
        found.sums_bytes,
    )
    found.call(function, job)
