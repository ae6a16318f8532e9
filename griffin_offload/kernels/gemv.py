"""A few rows times a matrix: int8 rows, rows and strips of 2 to 4 bits, or 16-bit floats (gemv.c).

torch 2.13 has its 8-bit kernel for bfloat16 in the first place, and none for forms like these of int4 or less
(benchmarks/NOTES.md has the rates).
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from griffin_offload.kernels.by_blocks import typed
from griffin_offload.kernels.library import HALVES, Beside, Library, Sizes, check, library, run

_INT8_GROUP = 128  # inputs that share a scale, and the most that may; gemv_int8.c knows it, too
_GROUP = 32
_HALF = 16
_STRIP = 64  # outputs
_FILLED = 256  # inputs of rows in groups are filled up to a multiple of it at most, as gemv.h says
_LANES = 16
ROWS = 32
"""Up to so many rows the kernels for quantised matrices are faster than translating the matrix."""


class GemvKernels:
    """The products of a library. `wide` and `ahead` are for tests: those of older processors, and as
    another processor would read."""

    def __init__(self, library: Library, *, wide: bool = True, ahead: bool | None = None) -> None:
        self._library = library
        self._ahead = library.fetches_ahead if ahead is None else ahead
        self.uses_bytes, self._pairs = wide and library.sums_bytes, wide and library.sums_pairs

    def multiply_int8(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, input_scale: Tensor | None = None
    ) -> Tensor:
        """x [M, I], times `input_scale` [I], times int8 `weight` [O, I] and its rows' `scale` [O], plus `bias` [O]:
        [M, O] in the type of x, which is that of bias and input_scale, too."""
        (rows, inputs), outputs = x.shape, weight.shape[0]
        check(weight, (outputs, inputs), torch.int8, "the matrix")
        check(scale, (outputs,), name="the scale")
        sizes = (rows, _parts(x), outputs, outputs, inputs, _INT8_GROUP)
        beside = (input_scale, weight, None, scale, bias)
        return self._quantised("multiply_int8", x, beside, sizes, self.uses_bytes)

    def multiply_rows(
        self, x: Tensor, codes: Tensor, groups: Tensor, scale: Tensor, bias: Tensor | None = None, *, bits: int = 4
    ) -> Tensor:
        """x [M, I] times rows of 2 to 4 `bits`, codes [O, I bits / 8], groups [O, I / 32, 2] and `scale` [O], plus
        `bias` [O]: as of `multiply_int8`."""
        (rows, inputs), outputs = x.shape, codes.shape[0]
        per_row = inputs // _GROUP
        check(codes, (outputs, per_row * 4 * bits), torch.uint8, "the codes")
        check(groups, (outputs, per_row, 2), torch.uint8, "the groups")
        check(scale, (outputs,), name="the scale")
        if inputs % _GROUP:
            raise ValueError(f"{inputs} inputs must be whole groups of {_GROUP}")
        sizes = (rows, _parts(x), outputs, outputs, inputs, _GROUP if bits == 4 else _HALF)
        beside = (None, codes, groups, scale, bias)
        return self._quantised(f"multiply_int{bits}_rows", x, beside, sizes, self.uses_bytes)

    def multiply_strips(
        self,
        x: Tensor,
        codes: Tensor,
        groups: Tensor,
        input_scale: Tensor,
        bias: Tensor | None = None,
        features: int | None = None,
        *,
        bits: int = 4,
    ) -> Tensor:
        """x [M, I] times `input_scale` [I] times strips of 2 to 4 `bits`, codes [O / 64, I, 8 bits] and groups
        [O / 32, I, 2], plus `bias`: the first `features` outputs, as of `multiply_int8`. M is at most ROWS, I a
        multiple of 16."""
        (rows, inputs), outputs = x.shape, codes.shape[0] * _STRIP
        check(codes, (outputs // _STRIP, inputs, _STRIP * bits // 8), torch.uint8, "the codes")
        check(groups, (outputs // _GROUP, inputs, 2), torch.uint8, "the groups")
        if inputs % _LANES or rows > ROWS:
            raise ValueError(f"{rows} rows of {inputs} inputs: up to {ROWS} of a multiple of {_LANES} are known")
        parts = _parts(x)
        wanted = outputs if features is None else features
        own = torch.empty(rows * (parts * outputs + inputs), dtype=torch.float32, device="cpu")
        made = (own.data_ptr(), own.data_ptr() + 4 * rows * parts * outputs, 0, 0, 0, 0)
        beside, function = (input_scale, codes, groups, None, bias), f"multiply_int{bits}_strips"
        sizes = (rows, parts, outputs, wanted, inputs, _GROUP)
        # Bytes are too few for float32, where int4's kernel has two of each input.
        wide = self.uses_bytes and (bits == 4 or parts == 1)
        return run(self._library, function, x, beside, made, sizes, wide=wide, ahead=self._ahead)

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
        sizes = (rows, 1, outputs, outputs, inputs, 1)
        beside = (None, weight, None, None, bias)
        return run(self._library, "multiply_floats", x, beside, made, sizes, wide=wide, ahead=self._ahead)

    def _quantised(self, function: str, x: Tensor, beside: Beside, sizes: Sizes, wide: bool) -> Tensor:
        rows, parts, outputs, _, inputs, group = sizes
        all_rows, groups, pairs = rows * parts, -(-inputs // group), -(-inputs // _FILLED) * _FILLED // 2
        # One allocation for all that is made on the way: sums, integers of 16 and 32 bits, and scales.
        own = torch.empty(all_rows * (outputs + pairs + (3 + _LANES) * groups), dtype=torch.float32, device="cpu")
        sums = own.data_ptr()
        numbers = sums + 4 * all_rows * outputs
        step = numbers + 4 * all_rows * pairs
        totals = step + 4 * all_rows * groups
        floats = totals + 4 * all_rows * groups
        made = (sums, floats, numbers, step, totals, floats + 4 * all_rows * groups)
        return run(self._library, function, x, beside, made, sizes, wide=wide, ahead=self._ahead)


def _parts(x: Tensor) -> int:
    # 16 bits beside a group's largest number hold what a 16-bit float says, but for the last bits of numbers below a
    # hundredth of it; float32 takes two rows of them.
    return 2 if x.dtype == torch.float32 else 1


@functools.cache
def kernels() -> GemvKernels | None:
    """Ours, or None where torch's have to do."""
    loaded = library()
    return GemvKernels(loaded) if loaded is not None else None


# As the table calls them: x [M, I], the matrix's tensors by name, its outputs, and the scratch of other kernels.
Tensors = Mapping[str, Tensor | None]


def int8_product(x: Tensor, tensors: Tensors, outputs: int, scratch: Any) -> Tensor:
    """Of int8 rows."""
    own, dtype, weight, scale = kernels(), x.dtype, tensors["weight"], tensors["scale"]
    assert own is not None and weight is not None and scale is not None  # noqa: PT018
    return own.multiply_int8(x, weight, scale, typed(tensors["bias"], dtype), typed(tensors["input_scale"], dtype))


def rows_product(bits: int, x: Tensor, tensors: Tensors, outputs: int, scratch: Any) -> Tensor:
    """Of rows of 2 to 4 `bits`."""
    own, weight, groups, scale = kernels(), tensors["weight"], tensors["groups"], tensors["scale"]
    assert own is not None and weight is not None and groups is not None and scale is not None  # noqa: PT018
    return own.multiply_rows(x, weight, groups, scale, typed(tensors["bias"], x.dtype), bits=bits)


def strips_product(bits: int, x: Tensor, tensors: Tensors, outputs: int, scratch: Any) -> Tensor:
    """Of strips of 2 to 4 `bits`."""
    own, dtype, weight, groups = kernels(), x.dtype, tensors["weight"], tensors["groups"]
    inputs = typed(tensors["input_scale"], dtype)
    assert own is not None and weight is not None and groups is not None and inputs is not None  # noqa: PT018
    return own.multiply_strips(x, weight, groups, inputs, typed(tensors["bias"], dtype), outputs, bits=bits)


def float_product(x: Tensor, tensors: Tensors, outputs: int, scratch: Any) -> Tensor:
    """Of 16-bit floats; x may have more axes."""
    own, weight = kernels(), tensors["weight"]
    assert own is not None and weight is not None  # noqa: PT018
    return own.multiply_floats(x.reshape(-1, x.shape[-1]), weight, tensors["bias"]).view(*x.shape[:-1], -1)
