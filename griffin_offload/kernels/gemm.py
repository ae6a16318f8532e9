"""Many rows times a matrix that is not multiplied as it rests (gemm.c): what a prompt does.

torch would have the whole matrix translated first, block by block; here a part of it is translated where it is
multiplied, in the cache (benchmarks/NOTES.md has the rates).
"""

import functools
from typing import Literal

import torch
from torch import Tensor

from griffin_offload.kernels.gemv import ROWS
from griffin_offload.kernels.library import (
    HALVES,
    NOTHING_MADE,
    NUMBER_TYPES,
    Library,
    check,
    library,
    needs_gradient,
    run,
)

Form = Literal["float", "int8", "int4_rows", "int4_neurons", "int4_strips"]
# From so many rows on they are faster than the kernels for a few rows; others are from one row more than these take.
_PAIRS_FROM, _TILES_FROM = {"int8": 4}, {"int8": 9, "int4_rows": 24, "int4_strips": 24}
_GROUP = 32  # of int4: inputs of rows, outputs of neurons and strips
_STRIP = 64  # outputs


class GemmKernels:
    """Products by a library, of numbers in `dtype`: pairs of bfloat16, or float32. `tiles` is for tests: False takes
    the kernels of processors without instructions for whole tiles."""

    def __init__(self, library: Library, dtype: torch.dtype, *, tiles: bool = True) -> None:
        self._library = library
        self._pairs = dtype == torch.bfloat16
        self._tiles = self._pairs and tiles and library.sums_tiles

    def take(self, form: Form, x: Tensor, weight: Tensor) -> bool:
        """Whether rows x [M, I] can be multiplied by `weight`, a matrix in `form`."""
        if not x.is_cpu or x.dtype not in NUMBER_TYPES or needs_gradient(x):
            return False
        if self._pairs:  # the other numbers of `float` need no translation
            return form != "float" and x.dtype == torch.bfloat16 and x.shape[1] % 2 == 0
        return form != "float" or (x.dtype in HALVES and x.dtype == weight.dtype)

    def from_rows(self, form: Form) -> int:
        """From how many rows on they are to multiply matrices in `form`, which few_rows.py has kernels for, too."""
        found: dict[str, int] = _TILES_FROM if self._tiles else _PAIRS_FROM if self._pairs else {}
        return found.get(form, ROWS + 1)

    def multiply(
        self,
        form: Form,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        groups: Tensor | None = None,
        features: int | None = None,
    ) -> Tensor:
        """x [M, I], which they `take`, times a matrix [O, I] in `form` plus `bias` [O], in the type of x.

        The forms are those of quantize.py and int4.py; "float" is of the type of x. int8 and int4 rows have a `scale`
        [O], all int4 has `groups`. Of strips the first `features` outputs are wanted.
        """
        inputs, outputs = x.shape[1], _check(form, x, weight, scale, groups)
        wanted = outputs if features is None else min(features, outputs)
        sizes = (x.shape[0], 1, outputs, wanted, inputs, 1)
        beside = (None, weight, groups, scale, bias)
        function, wide, ahead = f"multiply_many_{form}", self._pairs + self._tiles, self._library.fetches_ahead
        return run(self._library, function, x, beside, NOTHING_MADE, sizes, wide=wide, ahead=ahead)


def _check(form: Form, x: Tensor, weight: Tensor, scale: Tensor | None, groups: Tensor | None) -> int:
    """Outputs of a matrix in `form`; ValueError where x would be multiplied by something else."""
    inputs = x.shape[1]
    if form in ("float", "int8"):
        outputs = weight.shape[0]
        check(weight, (outputs, inputs), x.dtype if form == "float" else torch.int8, "the matrix")
    else:
        outputs = _check_int4(form, inputs, weight, _there(groups))
    if form in ("int8", "int4_rows"):
        check(_there(scale), (outputs,), name="the scale")
    return outputs


def _check_int4(form: Form, inputs: int, codes: Tensor, groups: Tensor) -> int:
    if form == "int4_strips":
        outputs = codes.shape[0] * _STRIP
        check(codes, (codes.shape[0], inputs, _STRIP // 2), torch.uint8, "the codes")
        check(groups, (outputs // _GROUP, inputs, 2), torch.uint8, "the groups")
        return outputs
    rows, width = codes.shape[0], inputs if form == "int4_rows" else 2 * codes.shape[1]
    if width % _GROUP:
        raise ValueError(f"{form}: {width} numbers must be whole groups of {_GROUP}")
    check(codes, (rows if form == "int4_rows" else inputs, width // 2), torch.uint8, "the codes")
    check(groups, (codes.shape[0], width // _GROUP, 2), torch.uint8, "the groups")
    return rows if form == "int4_rows" else width


def _there(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("a quantised matrix needs its scales")
    return tensor


@functools.cache
def kernels(dtype: torch.dtype) -> GemmKernels | None:
    """Those that multiply in `dtype`, or None where torch does it as fast: float32 in AVX-512."""
    loaded = library()
    if loaded is None:
        return None
    capability = torch.backends.cpu.get_cpu_capability()
    known = loaded.sums_pairs if dtype == torch.bfloat16 else dtype == torch.float32 and capability == "AVX2"
    return GemmKernels(loaded, dtype) if known else None
