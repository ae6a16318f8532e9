"""A few rows times a quantised matrix on x86-64: the kernels of few_rows.c, which installing compiles.

torch 2.13 has its 4-bit kernel for bfloat16 and AVX-512 in the first place, and its 8-bit one for bfloat16
(benchmarks/NOTES.md has the rates). Where no C compiler was there, or on other processors, torch's are used.
"""

import ctypes
import functools
import importlib.util
import platform
import warnings
from pathlib import Path

import torch
from torch import Tensor

from griffin_offload.errors import one_line

_INT8_GROUP = 128  # inputs that share a scale, and the most that may
_SCALE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ROWS = 32
"""Up to so many rows the kernels are faster than translating the matrix."""


class _Product(ctypes.Structure):
    """The struct of the same name in few_rows.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "scale", "product", "numbers", "step", "sum")),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "parts", "outputs", "inputs", "group", "block", "scale_type", "threads")
        ),
    )


class Kernels:
    """The compiled functions and the threads they run on. OSError or AttributeError if either is not there."""

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        # A symbol of torch's own dependencies: other OpenMP runtimes in the process are other pools.
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        self._parallel = ctypes.cast(torch_library.GOMP_parallel, ctypes.c_void_p)
        self.supported = bool(self._library.supported())

    def multiply_int8(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """x [M, I] times int8 `weight` [O, I] and its rows' `scale` [O]: [M, O] in the type of x."""
        return self._multiply("multiply_int8", x, weight, scale, weight.shape[0], _INT8_GROUP, 1)

    def multiply_int4(self, x: Tensor, tiles: Tensor, scales: Tensor, block: int) -> Tensor:
        """x [M, I] times int4 tiles [O, I / 2] in blocks of `block` outputs with scales [G, O, 2], as in
        int4_tiles.py: [M, O] in the type of x."""
        group = 2 * tiles.shape[1] // scales.shape[0]
        return self._multiply("multiply_int4", x, tiles, scales, tiles.shape[0], group, block)

    def _multiply(
        self, function: str, x: Tensor, weight: Tensor, scale: Tensor, outputs: int, group: int, block: int
    ) -> Tensor:
        rows, inputs = x.shape
        if not (weight.is_contiguous() and scale.is_contiguous()):
            raise ValueError(f"weight {tuple(weight.shape)} and scale {tuple(scale.shape)} must be contiguous")
        if group > _INT8_GROUP or outputs % block or (block > 1 and inputs % group):
            raise ValueError(f"{outputs} outputs in blocks of {block}, {inputs} inputs in groups of {group}")
        wide = x.float().contiguous()
        # 16 bits hold what a 16-bit float says; float32 takes two rows of them.
        parts = 2 if x.dtype == torch.float32 else 1
        groups = -(-inputs // group)
        product = torch.empty(rows * parts, outputs)
        numbers = torch.empty(rows * parts, inputs, dtype=torch.int16)
        step, sums = torch.empty(2, rows * parts, groups)  # the second is memory for 32-bit integers
        where = (tensor.data_ptr() for tensor in (wide, weight, scale, product, numbers, step, sums))
        sizes = (rows, parts, outputs, inputs, group, block, _SCALE_TYPES[scale.dtype], torch.get_num_threads())
        getattr(self._library, function)(ctypes.byref(_Product(*where, *sizes)), self._parallel)
        return product.to(x.dtype) if parts == 1 else product.view(rows, parts, outputs).sum(1)


@functools.cache
def kernels() -> Kernels | None:
    """Ours, or None where torch's have to do; a warning if that could be otherwise."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    found = importlib.util.find_spec("griffin_offload.weights._few_rows")
    try:
        if found is None or found.origin is None:
            raise OSError("few_rows.c was not compiled: install gcc or clang, and then griffin-offload again")
        loaded = Kernels(found.origin)
    except (OSError, AttributeError) as error:
        warnings.warn(f"int8 and int4 are multiplied by torch's slower kernels: {one_line(error)}", stacklevel=2)
        return None
    return loaded if loaded.supported else None
