"""A few rows times a matrix: int8 rows, int4 tiles or 16-bit floats (few_rows.c).

torch 2.13 has its 4-bit kernel for bfloat16 and AVX-512 in the first place, and its 8-bit one for bfloat16
(benchmarks/NOTES.md has the rates).
"""

import functools

import torch
from torch import Tensor

from griffin_offload.kernels.compiled import HALVES, NUMBER_TYPES, Library, library
from griffin_offload.kernels.product import Beside, Sizes, check, run

_INT8_GROUP = 128  # inputs that share a scale, and the most that may; int8_rows.c knows it, too
_BYTE_BLOCK = 64  # outputs of int4 tiles that the kernel for 8-bit numbers takes
_LANES = 16
TYPES = frozenset(NUMBER_TYPES)
"""What x may be."""
ROWS = 32
"""Up to so many rows the kernels for quantised matrices are faster than translating the matrix."""


class Kernels:
    """The products of a library. `wide` and `ahead` are for tests: those of older processors, and as
    another processor would read."""

    def __init__(self, library: Library, *, wide: bool = True, ahead: bool | None = None) -> None:
        self._library = library
        self._ahead = library.fetches_ahead if ahead is None else ahead
        self._bytes, self._pairs = wide and library.sums_bytes, wide and library.sums_pairs

    def multiply_int8(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, input_scale: Tensor | None = None
    ) -> Tensor:
        """x [M, I], times `input_scale` [I], times int8 `weight` [O, I] and its rows' `scale` [O], plus `bias` [O]:
        [M, O] in the type of x, which is that of bias and input_scale, too."""
        (rows, inputs), outputs = x.shape, weight.shape[0]
        check(weight, (outputs, inputs), torch.int8, "the matrix")
        check(scale, (outputs,), name="the scale")
        sizes = (rows, _parts(x), outputs, outputs, inputs, _INT8_GROUP, 1)
        return self._quantised("multiply_int8", x, (input_scale, weight, scale, bias), sizes, self._bytes)

    def multiply_int4(
        self,
        x: Tensor,
        tiles: Tensor,
        scales: Tensor,
        block: int,
        bias: Tensor | None = None,
        input_scale: Tensor | None = None,
        features: int | None = None,
    ) -> Tensor:
        """x [M, I], times `input_scale` [I], times int4 tiles [O, I / 2] in blocks of `block` outputs with scales
        [G, O, 2], as in int4_tiles.py, plus `bias`: the first `features` outputs, as of `multiply_int8`."""
        (rows, inputs), outputs, groups = x.shape, tiles.shape[0], scales.shape[0]
        group = inputs // groups
        if inputs % groups or group % 4 or not 4 <= group <= _INT8_GROUP or block not in (32, 64) or outputs % block:
            raise ValueError(f"{outputs} outputs in blocks of {block}, {inputs} inputs in {groups} groups")
        check(tiles, (outputs, inputs // 2), torch.uint8)
        check(scales, (groups, outputs, 2))
        sizes = (rows, _parts(x), outputs, outputs if features is None else features, inputs, group, block)
        wide = self._bytes and block == _BYTE_BLOCK
        return self._quantised("multiply_int4", x, (input_scale, tiles, scales, bias), sizes, wide)

    def multiply_floats(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [M, I] times `weight` [O, I] plus `bias` [O], all of the same 16-bit type: [M, O] in it; sums are in
        float32."""
        if x.dtype not in HALVES:
            raise ValueError(f"x must be of 16-bit floats, and is of {x.dtype}")
        (rows, inputs), outputs, wide = x.shape, weight.shape[0], self._pairs and x.dtype == torch.bfloat16
        check(weight, (outputs, inputs), x.dtype, "the matrix")
        own = torch.empty(rows * (outputs + (0 if wide else inputs)), dtype=torch.float32, device="cpu")
        sums = own.data_ptr()
        made = (sums, sums + 4 * rows * outputs, 0, 0, 0, 0)
        sizes = (rows, 1, outputs, outputs, inputs, 1, 1)
        return run(
            self._library, "multiply_floats", x, (None, weight, None, bias), made, sizes, wide=wide, ahead=self._ahead
        )

    def _quantised(self, function: str, x: Tensor, beside: Beside, sizes: Sizes, wide: bool) -> Tensor:
        rows, parts, outputs, _, inputs, group, _ = sizes
        all_rows, groups, pairs = rows * parts, -(-inputs // group), -(-inputs // 2)
        # One allocation for all that is made on the way: sums, integers of 16 and 32 bits, and scales.
        own = torch.empty(all_rows * (outputs + pairs + (2 + _LANES) * groups), dtype=torch.float32, device="cpu")
        sums = own.data_ptr()
        numbers = sums + 4 * all_rows * outputs
        step = numbers + 4 * all_rows * pairs
        totals = step + 4 * all_rows * groups
        made = (sums, 0, numbers, step, totals, totals + 4 * all_rows * groups)
        return run(self._library, function, x, beside, made, sizes, wide=wide, ahead=self._ahead)


def _parts(x: Tensor) -> int:
    # 16 bits beside a group's largest number hold what a 16-bit float says, but for the last bits of numbers below a
    # hundredth of it; float32 takes two rows of them.
    return 2 if x.dtype == torch.float32 else 1


@functools.cache
def kernels() -> Kernels | None:
    """Ours, or None where torch's have to do."""
    loaded = library()
    return Kernels(loaded) if loaded is not None else None
