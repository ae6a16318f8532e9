"""The compiled library, and the threads its kernels run on."""

import ctypes
import functools
import importlib.util
import platform
import sys
import warnings
from pathlib import Path

import torch

from griffin_offload.errors import one_line

NUMBER_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The enum of halves.h."""
HALVES = frozenset((torch.bfloat16, torch.float16))


def needs_gradient(x: torch.Tensor) -> bool:
    """Whether x is to be differentiated by, which no kernel here can be."""
    return x.requires_grad and torch.is_grad_enabled()


class Library:
    """Functions of the library at `path`. OSError or AttributeError if it, or torch's OpenMP, is not there."""

    def __init__(self, path: str) -> None:
        self._functions = ctypes.CDLL(path)
        # A symbol of torch's own dependencies: other OpenMP runtimes in the process are other pools.
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        self._parallel = ctypes.cast(torch_library.GOMP_parallel, ctypes.c_void_p)
        self.supported = bool(self._functions.has_avx2())
        self.sums_bytes = bool(self._functions.has_vnni())
        """Whether one instruction of this processor multiplies and sums many 8-bit numbers."""
        self.sums_pairs = bool(self._functions.has_bf16())
        """The same of bfloat16 numbers."""
        self.sums_tiles = bool(self._functions.has_amx())
        """The same of whole tiles of them (AMX)."""
        self.fetches_ahead = bool(self._functions.fetches_ahead())
        """Whether products are faster if weights are asked for before they are needed."""
        self.leaves_out = bool(self._functions.has_vbmi2())
        """Whether one instruction of this processor brings chosen numbers of a vector side by side."""

    def call(self, function: str, job: bytes) -> None:
        """Run `function` for `job`, its packed struct, on as many threads as that says; the interpreter is free
        meanwhile."""
        getattr(self._functions, function)(job, self._parallel)


@functools.cache
def library() -> Library | None:
    """The library, or None where torch's kernels have to do; a warning if that could be otherwise."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return None
    found = importlib.util.find_spec("griffin_offload.kernels._library")
    try:
        if found is None or found.origin is None:
            raise OSError("they were not compiled: install gcc or clang, and then griffin-offload again")
        loaded = Library(found.origin)
    except (OSError, AttributeError) as error:
        warnings.warn(f"tokens are decoded by torch's slower kernels, without ours: {one_line(error)}", stacklevel=2)
        return None
    return loaded if loaded.supported else None
