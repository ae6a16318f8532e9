"""Chosen neurons moved into the form that they rest in (gather.c), by the threads that multiply.

torch and numpy take every number by its index; here bits say which columns stay (benchmarks/NOTES.md has the rates).
"""

import struct

import numpy as np
import torch
from torch import Tensor

from griffin_offload.kernels.library import Library, check, check_rows, library

_GATHERING = struct.Struct("@6P9q")
"""The struct Gathering of gather.c."""
_MASK_BITS = 64
_HALF = 16  # bytes of a group of 32 codes


def gather_columns(source: Tensor, chosen: Tensor, out: Tensor) -> bool:
    """Copy columns `chosen` [K] of `source` [R, C], of 8 or 16 bits, to `out` [R, K], whose rows may lie apart. False
    where torch has to: another processor, or columns that are not in order."""
    rows, columns = source.shape
    plain = source.stride(1) == 1 and out.stride(1) == 1 and out.stride(0) >= out.shape[1]
    if not plain or source.element_size() > 2:
        return False  # before the library is asked for: where there is none it warns, and nothing needs it here
    found = library()
    if found is None or not found.leaves_out or not _in_order(chosen):
        return False
    kept = chosen.numel()
    check_rows(source, (rows, columns), source.dtype, "the matrix")
    if out.shape != (rows, kept) or out.dtype != source.dtype or (kept and int(chosen[-1]) >= columns):
        raise ValueError(f"{kept} of {columns} columns of {source.dtype} do not make {tuple(out.shape)} of {out.dtype}")
    check_rows(out, (rows, kept), source.dtype, "what columns are copied to", written=True)
    if kept:  # the rest need not be read
        first, columns = int(chosen[0]), int(chosen[-1]) - int(chosen[0]) + 1
        source, chosen = source[:, first : first + columns], chosen - first
    wanted = np.zeros(-(-columns // _MASK_BITS) * _MASK_BITS, dtype=bool)
    wanted[chosen.numpy()] = True
    taken = np.packbits(wanted, bitorder="little")
    item = source.element_size()
    addresses = (source.data_ptr(), 0, 0, taken.ctypes.data, out.data_ptr(), 0)
    sizes = (kept, rows, columns * item, source.stride(0) * item, out.stride(0) * item, item, 0, 0)
    _run(found, "gather_columns", addresses, sizes)
    return True


def gather_neurons_to_strips(
    neurons: tuple[Tensor, Tensor], chosen: Tensor, strips: tuple[Tensor, Tensor], start: int
) -> bool:
    """Make neurons `chosen` [K] of int4 neurons, codes [R, O / 2] and groups [R, O / 32, 2] on the CPU, inputs start..
    of `strips`; formats/int4.py describes both. False where torch has to."""
    (codes, groups), (target, target_groups) = neurons, strips
    found = library()
    if found is None or not codes.is_contiguous():
        return False
    (stored, row_bytes), count = codes.shape, chosen.numel()
    per_neuron, kept = row_bytes // _HALF, target.shape[1]
    check(codes, (stored, per_neuron * _HALF), torch.uint8)
    check(groups, (stored, per_neuron, 2), torch.uint8)
    check(target, (-(-per_neuron // 2), kept, 2 * _HALF), torch.uint8)
    check(target_groups, (2 * target.shape[0], kept, 2), torch.uint8)
    if start + count > kept:
        raise ValueError(f"{count} neurons do not fit strips of {kept} from {start} on")
    chosen = _inside(chosen, stored)
    addresses = (codes.data_ptr(), groups.data_ptr(), chosen.data_ptr(), 0, target.data_ptr(), target_groups.data_ptr())
    _run(found, "gather_neurons_to_strips", addresses, (count, 0, row_bytes, 0, 0, 0, start, kept))
    return True


def _run(found: Library, function: str, addresses: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    found.call(function, _GATHERING.pack(*addresses, *sizes, torch.get_num_threads()))


def _in_order(chosen: Tensor) -> bool:
    return chosen.numel() == 0 or (int(chosen[0]) >= 0 and bool((chosen[1:] > chosen[:-1]).all()))


def _inside(chosen: Tensor, stored: int) -> Tensor:
    """Contiguous indices; ValueError for what would be read outside."""
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < stored:
        raise ValueError(f"of {stored} rows one is asked for that is not there")
    return chosen.to(torch.int64).contiguous()
