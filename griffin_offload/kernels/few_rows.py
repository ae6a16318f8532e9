"""A few rows times a matrix: int8 rows, int4 tiles or 16-bit floats (few_rows.c).

torch 2.13 has its 4-bit kernel for bfloat16 and AVX-512 in the first place, and its 8-bit one for bfloat16
(benchmarks/NOTES.md has the rates).
"""

import ctypes
import functools

import torch
from torch import Tensor

from griffin_offload.kernels.library import HALVES, NUMBER_TYPES, Library, library

_INT8_GROUP = 128  # inputs that share a scale, and the most that may
_BYTE_BLOCK = 64  # outputs of int4 tiles that the kernel for 8-bit numbers takes
_LANES = 16
_Beside = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # input scale, weight, scale, bias
TYPES = frozenset(NUMBER_TYPES)
"""What x may be."""
ROWS = 32
"""Up to so many rows the kernels for quantised matrices are faster than translating the matrix."""
_POINTERS = (
    *("x", "input_scale", "weight", "scale", "bias", "product", "sums"),
    *("floats", "numbers", "step", "totals", "lanes"),
)
_SIZES = (
    *("rows", "parts", "outputs", "features", "inputs", "group", "block"),
    *("x_type", "scale_type", "threads", "wide"),
)


class _Product(ctypes.Structure):
    """The struct of the same name in few_rows.h."""

    _fields_ = (*((name, ctypes.c_void_p) for name in _POINTERS), *((name, ctypes.c_int64) for name in _SIZES))


class Kernels:
    """The products of a library. `wide` is for tests: False takes the kernels of older processors."""

    def __init__(self, library: Library, *, wide: bool = True) -> None:
        self._library = library
        self._bytes, self._pairs = wide and library.sums_bytes, wide and library.sums_pairs

    def multiply_int8(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, input_scale: Tensor | None = None
    ) -> Tensor:
        """x [M, I], times `input_scale` [I], times int8 `weight` [O, I] and its rows' `scale` [O], plus `bias` [O]:
        [M, O] in the type of x, which that of bias and input_scale is, too."""
        beside, outputs = (input_scale, weight, scale, bias), weight.shape[0]
        return self._quantised("multiply_int8", x, beside, outputs, outputs, _INT8_GROUP, 1, self._bytes)

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
        group, wide = 2 * tiles.shape[1] // scales.shape[0], self._bytes and block == _BYTE_BLOCK
        beside, outputs = (input_scale, tiles, scales, bias), tiles.shape[0]
        features = outputs if features is None else features
        return self._quantised("multiply_int4", x, beside, outputs, features, group, block, wide)

    def multiply_floats(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [M, I] times `weight` [O, I] plus `bias` [O], all of the same 16-bit type: [M, O] in it; sums are in
        float32."""
        if not weight.is_contiguous() or weight.dtype != x.dtype or x.dtype not in HALVES:
            raise ValueError(f"weight {tuple(weight.shape)} of {weight.dtype} must be contiguous and as x, {x.dtype}")
        (rows, inputs), outputs, wide = x.shape, weight.shape[0], self._pairs and x.dtype == torch.bfloat16
        own = torch.empty(rows * (outputs + (0 if wide else inputs)))
        sums = own.data_ptr()
        sizes = (rows, 1, outputs, outputs, inputs, 1, 1)
        made = (sums, sums + 4 * rows * outputs, None, None, None, None)
        return self._run("multiply_floats", x, (None, weight, None, bias), made, sizes, wide)

    def _quantised(
        self,
        function: str,
        x: Tensor,
        beside: _Beside,
        outputs: int,
        features: int,
        group: int,
        block: int,
        wide: bool,
    ) -> Tensor:
        (rows, inputs), (_, weight, scale, _) = x.shape, beside
        assert weight is not None
        assert scale is not None
        if not (weight.is_contiguous() and scale.is_contiguous()):
            raise ValueError(f"weight {tuple(weight.shape)} and scale {tuple(scale.shape)} must be contiguous")
        if group > _INT8_GROUP or outputs % block or (block > 1 and inputs % group):
            raise ValueError(f"{outputs} outputs in blocks of {block}, {inputs} inputs in groups of {group}")
        # 16 bits hold what a 16-bit float says; float32 takes two rows of them.
        parts = 2 if x.dtype == torch.float32 else 1
        all_rows, groups, pairs = rows * parts, -(-inputs // group), -(-inputs // 2)
        # One allocation for all that is made on the way: integers of 16 and 32 bits, scales and sums.
        own = torch.empty(all_rows * (outputs + pairs + (2 + _LANES) * groups))
        sums = own.data_ptr()
        numbers = sums + 4 * all_rows * outputs
        step = numbers + 4 * all_rows * pairs
        totals = step + 4 * all_rows * groups
        made = (sums, None, numbers, step, totals, totals + 4 * all_rows * groups)
        sizes = (rows, parts, outputs, features, inputs, group, block)
        return self._run(function, x, beside, made, sizes, wide)

    def _run(
        self,
        function: str,
        x: Tensor,
        beside: _Beside,
        made: tuple[int | None, ...],
        sizes: tuple[int, ...],
        wide: bool,
    ) -> Tensor:
        input_scale, weight, scale, bias = beside
        assert weight is not None
        for of_inputs in (input_scale, bias):
            if of_inputs is not None and of_inputs.dtype != x.dtype:
                raise ValueError(f"bias and input_scale must be as x, {x.dtype}")
        x = x.contiguous()
        product = x.new_empty(x.shape[0], sizes[3])
        job = _Product(
            x.data_ptr(),
            None if input_scale is None else input_scale.data_ptr(),
            weight.data_ptr(),
            None if scale is None else scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            product.data_ptr(),
            *made,
            *sizes,
            NUMBER_TYPES[x.dtype],
            0 if scale is None else NUMBER_TYPES[scale.dtype],
            torch.get_num_threads(),
            wide,
        )
        self._library.call(function, job)
        return product


@functools.cache
def kernels() -> Kernels | None:
    """Ours, or None where torch's have to do."""
    loaded = library()
    return Kernels(loaded) if loaded is not None else None
