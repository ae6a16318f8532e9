"""The compiled library, and the threads its kernels run on."""

import contextlib
import ctypes
import functools
import platform
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from griffin_offload.errors import one_line

# What has to be true of tensors whose addresses kernels are handed: C sees neither sizes nor types.


def check(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None, name: str = "a tensor") -> None:
    """ValueError, by `name`, for what would be read or written past its end, or as what it is not."""
    fits = tensor.shape == shape and tensor.dtype == (dtype or tensor.dtype)
    if not (fits and tensor.is_contiguous() and tensor.is_cpu):
        kind = f" of {dtype}" if dtype else ""
        raise ValueError(f"{name}, {_told(tensor)}, must be {shape}{kind}, and contiguous, in the CPU's memory")


def check_rows(tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype, name: str, *, written: bool = False) -> None:
    """The same for a matrix whose rows lie in one piece each, but may lie apart; and may not overlap if they are
    `written`."""
    fits = tensor.shape == shape and tensor.dtype == dtype and tensor.is_cpu
    in_pieces = fits and (tensor.stride(1) == 1 or shape[1] <= 1)
    if not in_pieces or (written and shape[0] > 1 and tensor.stride(0) < shape[1]):
        raise ValueError(
            f"{name}, {_told(tensor)}, must be {shape} of {dtype}, each row in one piece, in the CPU's memory"
        )


def number_type(tensor: Tensor, name: str) -> int:
    """Of the enum in float16.h; ValueError, by `name`, for numbers that kernels do not know."""
    known = NUMBER_TYPES.get(tensor.dtype)
    if known is None:
        raise _of_no_known_type(tensor, name)
    return known


def _of_no_known_type(tensor: Tensor, name: str) -> ValueError:
    return ValueError(f"{name}, {_told(tensor)}, must be of one of {', '.join(map(str, NUMBER_TYPES))}")


def _told(tensor: Tensor) -> str:
    lies = "" if tensor.is_cpu else f" on {tensor.device}"
    return f"{tuple(tensor.shape)} of {tensor.dtype} in steps of {tensor.stride()}{lies}"


NUMBER_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The enum of float16.h."""
HALVES = frozenset((torch.bfloat16, torch.float16))


def needs_gradient(x: torch.Tensor) -> bool:
    """Whether x is to be differentiated by, which no kernel here can be."""
    return x.requires_grad and torch.is_grad_enabled()


Kernel = Callable[..., None]
Job = bytearray
Note = Callable[[Kernel, Job], None]


class Library:
    """Functions of the library at `path`. OSError or AttributeError if it, or torch's OpenMP, is not there."""

    def __init__(self, path: str) -> None:
        self.functions = ctypes.CDLL(path)
        # A symbol of torch's own dependencies: other OpenMP runtimes in the process are other pools.
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        self.parallel = ctypes.cast(torch_library.GOMP_parallel, ctypes.c_void_p)
        self.supported = bool(self.functions.has_avx2())
        self.sums_bytes = bool(self.functions.has_vnni())
        """Whether one instruction of this processor multiplies and sums many 8-bit numbers."""
        self.sums_pairs = bool(self.functions.has_bf16())
        """The same of bfloat16 numbers."""
        self.sums_tiles = bool(self.functions.has_amx())
        """The same of whole tiles of them (AMX)."""
        self.fetches_ahead = bool(self.functions.fetches_ahead())
        """Whether products are faster if weights are asked for before they are needed."""
        self.leaves_out = bool(self.functions.has_vbmi2())
        """Whether one instruction of this processor brings chosen numbers of a vector side by side."""

    def call(self, function: str, job: bytes | Job) -> None:
        """Run `function` for `job`, its packed struct, on as many threads as that says; the interpreter is free
        meanwhile."""
        kernel = getattr(self.functions, function)
        kernel(ctypes.byref(ctypes.c_char.from_buffer(job)) if isinstance(job, bytearray) else job, self.parallel)
        if _noting.note is not None:
            _noting.note(kernel, job if isinstance(job, bytearray) else bytearray(job))


class _Noting(threading.local):
    note: Note | None = None


_noting = _Noting()


@contextlib.contextmanager
def note_calls(note: Note) -> Iterator[None]:
    """Inside, `note` is told of every call that this thread makes: the kernel, and its job, which may be changed."""
    _noting.note = note
    try:
        yield
    finally:
        _noting.note = None


def calls_are_noted() -> bool:
    """Whether somebody may make this thread's calls again, who knows addresses alone."""
    return _noting.note is not None


def built(directory: Path) -> Path | None:
    """The library in `directory`: the one for every Python, which wheels have and installing compiles, before one that
    an earlier version left there for this Python alone."""
    names = [f"_library{suffix}" for suffix in sorted(EXTENSION_SUFFIXES, key=lambda suffix: "abi3" not in suffix)]
    return next((directory / name for name in names if (directory / name).is_file()), None)


def compiled() -> bool:
    """Whether there is a library, for who plans: nothing is loaded, and nothing said where there is none."""
    return built(Path(__file__).parent) is not None


@functools.cache
def library() -> Library | None:
    """The library, or None where torch's kernels have to do; a warning if that could be otherwise."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return None
    found = built(Path(__file__).parent)
    try:
        if found is None:
            raise OSError("they were not compiled: install gcc or clang, and then griffin-offload again")
        loaded = Library(str(found))
    except (OSError, AttributeError) as error:
        warnings.warn(f"tokens are decoded by torch's slower kernels, without ours: {one_line(error)}", stacklevel=2)
        return None
    return loaded if loaded.supported else None


# A matrix product as the kernels are asked for it: the struct of gemm_args.h, and what has to be true of it.


Sizes = tuple[int, int, int, int, int, int]
"""Rows, parts, outputs, features, inputs, group."""
Beside = tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""Input scale, weight, groups, scale, bias."""
_PRODUCT = struct.Struct("@12P11q")  # built for every product, so it is packed at once and not field by field
NOTHING_MADE = (0, 0, 0, 0, 0)
"""For kernels that need no memory for sums, floats, numbers, step and lanes."""


def run(
    library: Library,
    function: str,
    x: Tensor,
    beside: Beside,
    made: tuple[int, ...],
    sizes: Sizes,
    *,
    wide: int,
    ahead: bool,
) -> Tensor:
    """The product [rows, features] in the type of x, made by `function` of the library; `made` are addresses."""
    (input_scale, weight, groups, scale, bias), dtype, x = beside, x.dtype, x.contiguous()
    if not 0 <= sizes[3] <= sizes[2]:
        raise ValueError(f"features, {sizes[3]}, must be some of {sizes[2]} outputs")
    x_type = NUMBER_TYPES.get(dtype)
    if x_type is None:
        raise _of_no_known_type(x, "x")
    check(x, (sizes[0], sizes[4]), dtype, "x")
    if input_scale is not None:
        check(input_scale, (sizes[4],), dtype, "the inputs' scale")
    if bias is not None:
        check(bias, (sizes[3],), dtype, "the bias")
    product = x.new_empty(sizes[0], sizes[3])
    where = [0 if part is None else part.data_ptr() for part in (x, input_scale, weight, groups, scale, bias, product)]
    scale_type = 0 if scale is None else number_type(scale, "the scale")
    job = packed((*where, *made), (*sizes, x_type, scale_type), wide=wide, ahead=ahead)
    library.call(function, job)
    return product


def packed(addresses: Sequence[int], sizes: Sequence[int], *, wide: int, ahead: bool) -> bytes:
    """The struct of a product, of as many threads as torch has now."""
    return _PRODUCT.pack(*addresses, *sizes, torch.get_num_threads(), wide, ahead)
