"""Chosen neurons moved into the form that they rest in (gather.c), by the threads that multiply.

torch and numpy take every number by its index; here bits say which columns stay (benchmarks/NOTES.md has the rates).
"""

import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from griffin_offload.kernels.library import NUMBER_TYPES, check, check_rows, library

_GATHERING = struct.Struct("@6P9q")
"""The struct Gathering of gather.c."""
_COLUMNS = struct.Struct("@5P5q")
"""The struct Columns of it."""
_MASK_BITS = 64
# One thread is done with less than that before a second one has begun.
SHARED_BYTES = 2**20
# numpy copies what does not lie in one piece to a buffer of such rows.
_COPIED_ROWS = 1024
_GROUP = 32
_CODE_BYTES = (8, 12, 16)  # of a group, by bits


def takes_columns(source: Tensor, chosen: Tensor, out: Tensor) -> bool:
    """Whether `gather_columns` takes these: rows in one piece, columns in order."""
    plain = source.stride(1) == 1 and out.stride(1) == 1 and out.stride(0) >= out.shape[1]
    return plain and _in_order(chosen)


def gather_columns(source: Tensor, chosen: Tensor, out: Tensor) -> None:
    """Copy columns `chosen` [K] of `source` [R, C], of 8 or 16 bits, to `out` [R, K], whose rows may lie apart."""
    (rows, columns), kept = source.shape, chosen.numel()
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
    _run("gather_columns", addresses, sizes)


def columns_by_numpy(source: Tensor, chosen: Tensor, out: Tensor) -> None:
    """The same on other processors, of other numbers, and in any order: numpy's take is 4x torch's index_select
    (benchmarks/NOTES.md), and one thread's work, so each of torch's takes a share of the rows."""
    # It knows no bfloat16: bits are moved as integers. Mode "wrap" because "raise" would buffer the whole output.
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[source.element_size()]
    columns, target, indices = source.view(bits).numpy(), out.view(bits).numpy(), chosen.numpy()

    def take_rows(rows: slice) -> None:
        np.take(columns[rows], indices, axis=1, out=target[rows], mode="wrap")

    threads = torch.get_num_threads() if out.nbytes >= SHARED_BYTES else 1
    step = -(-source.shape[0] // threads)
    if not out.is_contiguous():
        step = min(step, _COPIED_ROWS)
    parts = [slice(start, start + step) for start in range(0, source.shape[0], step)]
    if len(parts) == 1:
        take_rows(parts[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(take_rows, parts))


def columns_by_torch(source: Tensor, chosen: Tensor, out: Tensor) -> None:
    """The same on other devices."""
    torch.index_select(source, 1, chosen, out=out)


def takes_neurons(neurons: tuple[Tensor, Tensor], *beside: object) -> bool:
    """Whether `gather_neurons_to_strips` takes these."""
    return neurons[0].is_contiguous()


def gather_neurons_to_strips(
    neurons: tuple[Tensor, Tensor], chosen: Tensor, strips: tuple[Tensor, Tensor], start: int
) -> None:
    """Make neurons `chosen` [K] of neurons of 2 to 4 bits, codes [R, O bits / 8] and groups [R, O / 32, 2] on the CPU,
    inputs start.. of `strips`; formats/grouped.py describes both."""
    (codes, groups), (target, target_groups) = neurons, strips
    (stored, row_bytes), count = codes.shape, chosen.numel()
    (per_neuron, own), kept = (groups.shape[1], target.shape[2] // 2), target.shape[1]
    if own not in _CODE_BYTES:
        raise ValueError(f"codes of a group must be of one of {_CODE_BYTES} bytes, and are of {own}")
    check(codes, (stored, per_neuron * own), torch.uint8)
    check(groups, (stored, per_neuron, 2), torch.uint8)
    check(target, (-(-per_neuron // 2), kept, 2 * own), torch.uint8)
    check(target_groups, (2 * target.shape[0], kept, 2), torch.uint8)
    if start + count > kept:
        raise ValueError(f"{count} neurons do not fit strips of {kept} from {start} on")
    chosen = _inside(chosen, stored)
    addresses = (codes.data_ptr(), groups.data_ptr(), chosen.data_ptr(), 0, target.data_ptr(), target_groups.data_ptr())
    _run("gather_neurons_to_strips", addresses, (count, 0, row_bytes, 0, 0, own, start, kept))


def takes_int4(codes: Tensor, groups: Tensor, scale: Tensor, chosen: Tensor, out: Tensor) -> bool:
    """Whether `columns_of_int4` takes these."""
    return out.dtype in NUMBER_TYPES and all(own.is_contiguous() for own in (codes, groups, scale, out))


def columns_of_int4(codes: Tensor, groups: Tensor, scale: Tensor, chosen: Tensor, out: Tensor) -> None:
    """Write columns `chosen` [K] of rows of 4 bits, codes [O, I / 2], groups [O, I / 32, 2] and `scale` float32 [O],
    into `out` [O, K], as floats."""
    (rows, count), kept = groups.shape[:2], chosen.numel()
    check(codes, (rows, count * _CODE_BYTES[-1]), torch.uint8, "the codes")
    check(groups, (rows, count, 2), torch.uint8, "the groups")
    check(scale, (rows,), torch.float32, "the scale")
    check(out, (rows, kept), name="the numbers")
    chosen, found = _inside(chosen, count * _GROUP), library()
    addresses = (own.data_ptr() for own in (codes, groups, scale, chosen, out))
    assert found is not None, "the table was not asked"
    sizes = (rows, count, kept, NUMBER_TYPES[out.dtype], torch.get_num_threads())
    found.call("columns_of_int4", _COLUMNS.pack(*addresses, *sizes))


def _run(function: str, addresses: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    found = library()
    assert found is not None, "the table was not asked"
    found.call(function, _GATHERING.pack(*addresses, *sizes, torch.get_num_threads()))


def _in_order(chosen: Tensor) -> bool:
    return chosen.numel() == 0 or (int(chosen[0]) >= 0 and bool((chosen[1:] > chosen[:-1]).all()))


def _inside(chosen: Tensor, stored: int) -> Tensor:
    """Contiguous indices; ValueError for what would be read outside."""
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < stored:
        raise ValueError(f"of {stored} rows one is asked for that is not there")
    return chosen.to(torch.int64).contiguous()
