"""Many rows times a matrix that is not multiplied as it rests (many_rows.c): what a prompt does.

torch would have the whole matrix translated first, block by block; here a part of it is translated where it is
multiplied, in the cache (benchmarks/NOTES.md has the rates).
"""

import functools
from typing import Literal

import torch
from torch import Tensor

from griffin_offload.kernels.compiled import HALVES, NUMBER_TYPES, Library, library, needs_gradient
from griffin_offload.kernels.few_rows import ROWS
from griffin_offload.kernels.product import NOTHING_MADE, check, run

Form = Literal["float", "int8", "int4_rows", "int4_neurons", "int4_tiles"]
# From so many rows on they are faster than the kernels for a few rows; others are from one row more than these take.
_PAIRS_FROM, _TILES_FROM = {"int8": 4}, {"int8": 9, "int4_tiles": 24}
_GROUP = 32  # numbers of int4 rows with a scale, outputs of int4 neurons side by side
_OUTPUTS = 64  # of int4 tiles that are multiplied together


class Kernels:
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
        scale: Tensor | None,
        bias: Tensor | None = None,
        block: int = 1,
        features: int | None = None,
    ) -> Tensor:
        """x [M, I], which they `take`, times a matrix [O, I] in `form` plus `bias` [O], in the type of x.

        The forms are those of quantize.py and int4_tiles.py, whose tiles have blocks of `block` outputs, of which the
        first `features` are wanted; "float" is of the type of x.
        """
        inputs, outputs, group = x.shape[1], weight.shape[0], 1
        if form == "float":
            check(weight, (outputs, inputs), x.dtype, "the matrix")
        elif form == "int8":
            check(weight, (outputs, inputs), torch.int8, "the matrix")
        elif form == "int4_neurons":
            outputs = 2 * weight.shape[1]
            check(weight, (inputs, outputs // 2), torch.uint8)
        else:
            check(weight, (outputs, inputs // 2), torch.uint8)
        if form in ("int8", "int4_neurons"):
            check(_there(scale), (outputs,))
        elif form == "int4_rows":
            check(_there(scale), (outputs, inputs // _GROUP, 2))
        elif form == "int4_tiles":
            group = inputs // max(_there(scale).shape[0], 1)
            check(_there(scale), (inputs // max(group, 1), outputs, 2))
        if not _whole_groups(form, outputs, inputs, group, block):
            raise ValueError(f"{form} of {outputs} outputs in blocks of {block}, {inputs} inputs in groups of {group}")
        wanted = outputs if features is None else min(features, outputs)
        sizes = (x.shape[0], 1, outputs, wanted, inputs, group, block)
        beside = (None, weight, scale, bias)
        wide = self._pairs + self._tiles
        return run(
            self._library,
            f"multiply_many_{form}",
            x,
            beside,
            NOTHING_MADE,
            sizes,
            wide=wide,
            ahead=self._library.fetches_ahead,
        )


def _there(scale: Tensor | None) -> Tensor:
    if scale is None:
        raise ValueError("a quantised matrix needs its scales")
    return scale


def _whole_groups(form: Form, outputs: int, inputs: int, group: int, block: int) -> bool:
    if form == "int4_rows":
        return inputs % _GROUP == 0
    if form == "int4_neurons":
        return outputs % _GROUP == 0
    if form == "int4_tiles":
        whole = group > 0 and inputs % group == 0 and group % 2 == 0
        return whole and block in (_OUTPUTS // 2, _OUTPUTS) and outputs % _OUTPUTS == 0
    return True


@functools.cache
def kernels(dtype: torch.dtype) -> Kernels | None:
    """Those that multiply in `dtype`, or None where torch does it as fast: float32 in AVX-512."""
    loaded = library()
    if loaded is None:
        return None
    capability = torch.backends.cpu.get_cpu_capability()
    known = loaded.sums_pairs if dtype == torch.bfloat16 else dtype == torch.float32 and capability == "AVX2"
    return Kernels(loaded, dtype) if known else None
