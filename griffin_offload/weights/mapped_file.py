"""The tensors of one safetensors file as views of its mapping, none of which is touched.

The safetensors library reads the first page of every tensor that it hands out, and the kernel up to 16 MB around it: a
third of a converted 13B model. And it maps files in a way that the kernel refuses for those larger than all memory.
Which files are mapped here has been checked by the library before.
"""

import ctypes
import json
import mmap
import os
import sys
import warnings
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from griffin_offload.errors import CheckpointError, memory_refused, one_line

_LENGTH_BYTES = 8
_FAILED = ctypes.c_void_p(-1).value  # what mmap(2) returns for an error
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "BOOL": torch.bool,
}


class Untouched(TorchDispatchMode):
    """Inside it, what would write into one of `tensors` does nothing.

    transformers initialises modules after it has loaded them, for the buffers that no file holds, and leaves the loaded
    weights out by a mark on each tensor, which a view of one lacks: some architectures set a row to zero by such a
    view. The files are mapped to be read alone, so that would end the process, and the weights are the checkpoint's.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = (
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor)
        )
        for target in written if func._schema.is_mutable else ():
            if not target.is_meta and target.untyped_storage().data_ptr() in self._storages:
                return target
        return func(*args, **(kwargs or {}))


def map_file(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file by its name, not to be written to. CheckpointError for a file that is no longer what it
    was."""
    try:
        return _views(path)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if memory_refused(error):
            raise
        raise CheckpointError(f"{path} was changed while it was loaded: {one_line(error)}") from error


def _views(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        content = _mapped(file.fileno())
    start = _LENGTH_BYTES + length
    found = {}
    for name, part in header.items():
        if name == "__metadata__":
            continue
        begin, end = (start + offset for offset in part["data_offsets"])
        dtype = _DTYPES.get(part["dtype"])
        if dtype is None or end > content.numel():
            raise ValueError(f"{name} has the type {part['dtype']} and ends at byte {end} of {content.numel()}")
        piece = content[begin:end]
        # Views want addresses in multiples of the type's size; files that are padded otherwise are copied.
        aligned = begin % dtype.itemsize == 0
        found[name] = (piece if aligned else piece.clone()).view(dtype).view(part["shape"])
    return found


def _mapped(descriptor: int) -> Tensor:
    """All bytes of a file, to be read alone: for pages that can be written to, the kernel would have to promise memory,
    and it promises no more than there is."""
    if sys.platform == "win32":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), dtype=torch.uint8)
    # Python's mmap would keep a descriptor for every file.
    nbytes, libc = os.fstat(descriptor).st_size, ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, ctypes.c_size_t(nbytes), mmap.PROT_READ, mmap.MAP_SHARED, descriptor, ctypes.c_long(0))
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    content = (ctypes.c_ubyte * nbytes).from_address(address)
    unmap = weakref.finalize(content, libc.munmap, ctypes.c_void_p(address), ctypes.c_size_t(nbytes))
    unmap.atexit = False  # threads may still read
    return torch.frombuffer(content, dtype=torch.uint8)
