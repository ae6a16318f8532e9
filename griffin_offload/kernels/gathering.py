"""Chosen neurons moved into the form that they rest in (gathering.c), by the threads that multiply.

torch and numpy take every number by its index, and turn int4 around in several passes over copies; here bits say which
columns stay, and rows become tiles in registers (benchmarks/NOTES.md has the rates).
"""

import struct

import numpy as np
import torch
from torch import Tensor

from griffin_offload.kernels.compiled import HALVES, Library, library
from griffin_offload.kernels.handed import check, check_rows

_GATHERING = struct.Struct("@7P11q")
"""The struct Gathering of gathering.c."""
_MASK_BITS = 64
_HALF = 16  # bytes of a group of 32 numbers of 4 bits


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
    addresses = (source.data_ptr(), 0, 0, taken.ctypes.data, 0, out.data_ptr(), 0)
    sizes = (kept, rows, columns * item, source.stride(0) * item, out.stride(0) * item, item, 0, 0, 0, 0)
    _run(found, "gather_columns", addresses, sizes)
    return True


def gather_rows_to_tiles(
    rows: tuple[Tensor, Tensor], chosen: Tensor, tiles: tuple[Tensor, Tensor], start: int, filled: int, block: int
) -> bool:
    """Make int4 rows `chosen` [K] outputs start.. of tiles in blocks of `block`, and zeros of what follows up to a
    multiple of `filled`. Both are bytes and scales on the CPU, as int4_tiles.py describes them. False where torch has
    to."""
    (packed, scales), (target, tile_scales) = rows, tiles
    found = library()
    known = scales.dtype == tile_scales.dtype and scales.dtype in (*HALVES, torch.float32) and scales.is_contiguous()
    if found is None or not known or not packed.is_contiguous():
        return False
    (stored, row_bytes), outputs, groups = packed.shape, target.shape[0], packed.shape[1] // _HALF
    check(packed, (stored, groups * _HALF), torch.uint8)
    check(scales, (stored, groups, 2))
    check(target, (outputs, row_bytes), torch.uint8)
    check(tile_scales, (groups, outputs, 2))
    chosen, count = _inside(chosen, stored), chosen.numel()
    made = -(-count // filled) * filled
    if start % block or filled % block or start + made > outputs:
        raise ValueError(f"{made} outputs from {start} on do not fit {outputs} in blocks of {block}")
    zeros = np.zeros(row_bytes, dtype=np.uint8)
    addresses = (packed.data_ptr(), scales.data_ptr(), chosen.data_ptr(), 0, zeros.ctypes.data, target.data_ptr())
    sizes = (count, made, row_bytes, 0, 0, 2 * scales.element_size(), start, outputs, 0, block)
    _run(found, "gather_rows_to_tiles", (*addresses, tile_scales.data_ptr()), sizes)
    return True


def gather_neurons_to_tiles(packed: Tensor, chosen: Tensor, tiles: Tensor, start: int, block: int) -> bool:
    """Make neurons `chosen` [K] of int4 neurons [R, O / 2], on the CPU, inputs start.. of `tiles` [O', I / 2];
    int4_tiles.py describes both. False where torch has to."""
    found = library()
    if found is None or not packed.is_contiguous():
        return False
    (stored, row_bytes), (outputs, pairs) = packed.shape, tiles.shape
    check(packed, (stored, row_bytes // _HALF * _HALF), torch.uint8)
    check(tiles, (outputs, pairs), torch.uint8)
    chosen, count = _inside(chosen, stored), chosen.numel()
    if start + count > 2 * pairs or 2 * row_bytes > outputs or outputs % block:
        raise ValueError(f"{count} neurons of {2 * row_bytes} outputs do not fit {tuple(tiles.shape)} from {start} on")
    addresses = (packed.data_ptr(), 0, chosen.data_ptr(), 0, 0, tiles.data_ptr(), 0)
    _run(found, "gather_neurons_to_tiles", addresses, (count, 0, row_bytes, 0, 0, 0, start, outputs, 2 * pairs, block))
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
