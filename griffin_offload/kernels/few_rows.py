"""A few rows times a matrix: int8 rows, int4 tiles or 16-bit floats (few_rows.c).

torch 2.13 has its 4-bit kernel for bfloat16 and AVX-512 in the first place, and its 8-bit one for bfloat16
(benchmarks/NOTES.md has the rates).
"""

import ctypes
import functools

import torch
from torch import Tensor

from griffin_offload.kernels.library import NUMBER_TYPES, Library, library

_INT8_GROUP = 128  # inputs that share a scale, and the most that may
_BYTE_BLOCK = 64  # outputs of int4 tiles that the kernel for 8-bit numbers takes
_LANES = 16
ROWS = 32
"""Up to so many rows the kernels for quantised matrices are faster than translating the matrix."""
_POINTERS = ("x", "weight", "scale", "product", "numbers", "step", "sum", "lanes")
_SIZES = ("rows", "parts", "outputs", "inputs", "group", "block", "type", "threads", "wide")


class _Product(ctypes.Structure):
    """The struct of the same name in few_rows.h."""

    _fields_ = (*((name, ctypes.c_void_p) for name in _POINTERS), *((name, ctypes.c_int64) for name in _SIZES))


class Kernels:
    """The products of a library. `wide` is for tests: False takes the kernels of older processors."""

    def __init__(self, library: Library, *, wide: bool = True) -> None:
        self._library = library
        self._bytes, self._pairs = wide and library.sums_bytes, wide and library.sums_pairs

    def multiply_int8(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """x [M, I] times int8 `weight` [O, I] and its rows' `scale` [O]: [M, O] in the type of x."""
        return self._quantised("multiply_int8", x, weight, scale, weight.shape[0], _INT8_GROUP, 1, self._bytes)

    def multiply_int4(self, x: Tensor, tiles: Tensor, scales: Tensor, block: int) -> Tensor:
        """x [M, I] times int4 tiles [O, I / 2] in blocks of `block` outputs with scales [G, O, 2], as in
        int4_tiles.py: [M, O] in the type of x."""
        group, wide = 2 * tiles.shape[1] // scales.shape[0], self._bytes and block == _BYTE_BLOCK
        return self._quantised("multiply_int4", x, tiles, scales, tiles.shape[0], group, block, wide)

    def multiply_floats(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [M, I] times `weight` [O, I], both of the same 16-bit type: [M, O] in it; sums are in float32."""
        if not weight.is_contiguous() or weight.dtype != x.dtype or x.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"weight {tuple(weight.shape)} of {weight.dtype} must be contiguous and as x, {x.dtype}")
        (rows, inputs), outputs = x.shape, weight.shape[0]
        pairs = self._pairs and x.dtype == torch.bfloat16
        numbers, product = (x if pairs else x.float()).contiguous(), torch.empty(rows, outputs)
        where = (numbers.data_ptr(), weight.data_ptr(), None, product.data_ptr(), None, None, None, None)
        sizes = (rows, 1, outputs, inputs, 1, 1, NUMBER_TYPES[x.dtype], torch.get_num_threads(), pairs)
        self._library.call("multiply_floats", _Product(*where, *sizes))
        return product.to(x.dtype)

    def _quantised(
        self,
        function: str,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        outputs: int,
        group: int,
        block: int,
        wide: bool,
    ) -> Tensor:
        rows, inputs = x.shape
        if not (weight.is_contiguous() and scale.is_contiguous()):
            raise ValueError(f"weight {tuple(weight.shape)} and scale {tuple(scale.shape)} must be contiguous")
        if group > _INT8_GROUP or outputs % block or (block > 1 and inputs % group):
            raise ValueError(f"{outputs} outputs in blocks of {block}, {inputs} inputs in groups of {group}")
        floats = x.float().contiguous()
        # 16 bits hold what a 16-bit float says; float32 takes two rows of them.
        parts = 2 if x.dtype == torch.float32 else 1
        numbers, groups = rows * parts, -(-inputs // group)
        product = torch.empty(numbers, outputs)
        # One allocation for all that is made of x: integers of 16 and 32 bits, and scales.
        own = torch.empty(numbers * (-(-inputs // 2) + (2 + _LANES) * groups))
        at = own.data_ptr()
        step = at + 4 * numbers * -(-inputs // 2)
        sums, lanes = step + 4 * numbers * groups, step + 8 * numbers * groups
        where = (floats.data_ptr(), weight.data_ptr(), scale.data_ptr(), product.data_ptr(), at, step, sums, lanes)
        sizes = (rows, parts, outputs, inputs, group, block)
        last = (NUMBER_TYPES[scale.dtype], torch.get_num_threads(), wide)
        self._library.call(function, _Product(*where, *sizes, *last))
        return product.to(x.dtype) if parts == 1 else product.view(rows, parts, outputs).sum(1)


@functools.cache
def kernels() -> Kernels | None:
    """Ours, or None where torch's have to do."""
    loaded = library()
    return Kernels(loaded) if loaded is not None else None
