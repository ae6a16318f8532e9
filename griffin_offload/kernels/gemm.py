"""Many rows times a matrix that is not multiplied as it rests (gemm.c): what a prompt does.

torch would have the whole matrix translated first, block by block; here a part of it is translated where it is
multiplied, in the cache (benchmarks/NOTES.md has the rates).
"""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from griffin_offload.kernels.by_blocks import Scratch, scaled, typed
from griffin_offload.kernels.library import NOTHING_MADE, Library, check, library, run

_GROUP = 32  # of 2 to 4 bits: inputs of rows, outputs of neurons and strips
_STRIP = 64  # outputs


class GemmKernels:
    """Products by a library, of numbers in `dtype`: pairs of bfloat16, or float32. `tiles` is for tests: False takes
    the kernels of processors without instructions for whole tiles."""

    def __init__(self, library: Library, dtype: torch.dtype, *, tiles: bool = True) -> None:
        self._library = library
        self._pairs = dtype == torch.bfloat16
        self._tiles = self._pairs and tiles and library.sums_tiles

    def multiply(
        self,
        layout: str,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        groups: Tensor | None = None,
        features: int | None = None,
    ) -> Tensor:
        """x [M, I], which they `take`, times a matrix [O, I] in `layout` plus `bias` [O], in the type of x.

        The layouts are those of formats/; "float" is of the type of x. int8 and rows in groups have a `scale` [O], all
        in groups have `groups`. Of strips the first `features` outputs are wanted.
        """
        inputs, outputs = x.shape[1], _check(layout, x, weight, scale, groups)
        wanted = outputs if features is None else min(features, outputs)
        sizes = (x.shape[0], 1, outputs, wanted, inputs, 1)
        beside = (None, weight, groups, scale, bias)
        function, wide, ahead = f"multiply_many_{layout}", self._pairs + self._tiles, self._library.fetches_ahead
        return run(self._library, function, x, beside, NOTHING_MADE, sizes, wide=wide, ahead=ahead)


def _check(layout: str, x: Tensor, weight: Tensor, scale: Tensor | None, groups: Tensor | None) -> int:
    """Outputs of a matrix in `layout`; ValueError where x would be multiplied by something else."""
    inputs = x.shape[1]
    if layout in ("float", "int8"):
        outputs = weight.shape[0]
        check(weight, (outputs, inputs), x.dtype if layout == "float" else torch.int8, "the matrix")
    else:
        name, kind = layout.split("_")
        outputs = _check_groups(kind, int(name.removeprefix("int")), inputs, weight, _there(groups))
    if layout == "int8" or layout.endswith("rows"):
        check(_there(scale), (outputs,), name="the scale")
    return outputs


def _check_groups(kind: str, bits: int, inputs: int, codes: Tensor, groups: Tensor) -> int:
    if kind == "strips":
        outputs = codes.shape[0] * _STRIP
        check(codes, (codes.shape[0], inputs, _STRIP * bits // 8), torch.uint8, "the codes")
        check(groups, (outputs // _GROUP, inputs, 2), torch.uint8, "the groups")
        return outputs
    rows, width = codes.shape[0], inputs if kind == "rows" else codes.shape[1] * 8 // bits
    if width % _GROUP:
        raise ValueError(f"{kind} of {bits} bits: {width} numbers must be whole groups of {_GROUP}")
    check(codes, (rows if kind == "rows" else inputs, width * bits // 8), torch.uint8, "the codes")
    check(groups, (codes.shape[0], width // _GROUP, 2), torch.uint8, "the groups")
    return rows if kind == "rows" else width


def _there(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("a quantised matrix needs its scales")
    return tensor


@functools.cache
def kernels(dtype: torch.dtype) -> GemmKernels | None:
    """Those that multiply in `dtype`, bfloat16 or float32; None without the library."""
    loaded = library()
    return None if loaded is None else GemmKernels(loaded, dtype)


def product(layout: str, x: Tensor, tensors: Mapping[str, Tensor | None], outputs: int, scratch: Scratch) -> Tensor:
    """As the table calls them: x [M, I] times the matrix's tensors by name, in the scratch's precision."""
    own, weight = kernels(scratch.dtype), tensors["weight"]
    assert own is not None
    assert weight is not None
    x = scaled(x, tensors)
    bias = typed(tensors["bias"], x.dtype)
    return own.multiply(layout, x, weight, tensors.get("scale"), bias, tensors.get("groups"), outputs)


def float_product(x: Tensor, tensors: Mapping[str, Tensor | None], outputs: int, scratch: Scratch) -> Tensor:
    """The same of 16-bit floats; x may have more axes."""
    own, weight = kernels(scratch.dtype), tensors["weight"]
    assert own is not None
    assert weight is not None
    product = own.multiply("float", x.reshape(-1, x.shape[-1]), weight, None, tensors["bias"])
    return product.view(*x.shape[:-1], -1)
