"""Where the full FF weights rest: mapped from the checkpoint's files, or held in host memory.

Both fetch the FF tensors of a layer and count every byte they fetch. The mapped source reads a layer ahead
into the page cache and drops it when it was used, so that a model larger than RAM passes through a few pages.
"""

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from griffin_offload.errors import GriffinError

_PAGE = mmap.PAGESIZE
_MADV_WILLNEED, _MADV_DONTNEED, _MADV_POPULATE_READ = 3, 4, 22
_ALIGNMENT = 256  # of each tensor in a flat buffer: what CUDA copies and vector units like


class FlatLayout:
    """Where the tensors of one layer lie in one flat buffer of bytes."""

    def __init__(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
        self._shapes, self._dtype = [torch.Size(shape) for shape in shapes], dtype
        self._offsets, end = [], 0
        for shape in self._shapes:
            self._offsets.append(end)
            end += -(-shape.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = end

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Typed tensors inside `buffer`, a uint8 tensor of at least `nbytes`."""
        return [
            buffer[offset : offset + shape.numel() * self._dtype.itemsize].view(self._dtype).view(shape)
            for offset, shape in zip(self._offsets, self._shapes, strict=True)
        ]


class RamWeights:
    """Full FF weights in host memory, one flat buffer a layer, in the precision of the computation."""

    def __init__(self, layers: dict[int, list[Tensor]], dtype: torch.dtype, *, pin: bool) -> None:
        self._layers: dict[int, list[Tensor]] = {}
        self.flat: dict[int, Tensor] = {}
        self._pinned: list[Tensor] = []
        self.fetched_bytes = 0
        for index, tensors in layers.items():
            layout = FlatLayout([tensor.shape for tensor in tensors], dtype)
            buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
            if pin:
                self._pin(buffer)
            views = layout.views(buffer)
            for view, tensor in zip(views, tensors, strict=True):
                view.copy_(tensor)
            self.flat[index], self._layers[index] = buffer, views

    def _pin(self, buffer: Tensor) -> None:
        # Registered, not allocated pinned: torch's pinned allocator rounds up to powers of two.
        status = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
        if int(status) != 0:
            raise GriffinError(f"cudaHostRegister refused {buffer.nbytes} bytes (status {int(status)})")
        self._pinned.append(buffer)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.flat.values())

    def tensors(self, layer: int) -> list[Tensor]:
        return self._layers[layer]

    def announce(self, layer: int) -> None:
        """Nothing to read ahead: the bytes are here."""

    def fetch(self, layer: int) -> list[Tensor]:
        """The layer's tensors; counted."""
        self.fetched_bytes += sum(tensor.nbytes for tensor in self._layers[layer])
        return self._layers[layer]

    def drop(self, layer: int) -> None:
        """Nothing to drop: the buffer is the weights' home."""

    def close(self) -> None:
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop().data_ptr())


@dataclass(frozen=True)
class _Mapping:
    """One line of /proc/self/maps that belongs to a file."""

    start: int
    end: int
    offset: int
    path: str


@dataclass(frozen=True)
class _Span:
    """Whole pages of one file, mapped at `address`."""

    address: int
    nbytes: int
    path: str
    offset: int


class MappedWeights:
    """Full FF weights as views of mmapped safetensors, as transformers loads them on the CPU.

    `evict` drops a used layer from the page cache, too: for models that do not fit it. Where the mapping cannot be
    found (not Linux), reading ahead and dropping are left to the operating system.
    """

    def __init__(self, layers: dict[int, list[Tensor]], *, evict: bool) -> None:
        self._layers = layers
        self._evict = evict
        self._files: dict[str, int] = {}
        self.fetched_bytes = 0
        mappings = _file_mappings()
        self._spans = {index: _spans(tensors, mappings) for index, tensors in layers.items()}
        everything = [tensor for tensors in layers.values() for tensor in tensors]
        self.unmapped_bytes = sum(t.nbytes for t in everything if mappings and _mapping_of(t, mappings) is None)
        for path in {span.path for found in self._spans.values() for span in found}:
            self._files[path] = os.open(path, os.O_RDONLY)

    def tensors(self, layer: int) -> list[Tensor]:
        return self._layers[layer]

    def announce(self, layer: int) -> None:
        """Ask the kernel to start reading the layer; returns at once."""
        for span in self._spans[layer]:
            _advise(span, _MADV_WILLNEED)

    def fetch(self, layer: int) -> list[Tensor]:
        """Read the layer and map its pages, so that the computation takes no page faults; blocks; counted."""
        for span in self._spans[layer]:
            if not _advise(span, _MADV_POPULATE_READ):
                _advise(span, _MADV_WILLNEED)
        self.fetched_bytes += sum(tensor.nbytes for tensor in self._layers[layer])
        return self._layers[layer]

    def drop(self, layer: int) -> None:
        """Unmap the layer's pages and, when evicting, free them."""
        for span in self._spans[layer]:
            _advise(span, _MADV_DONTNEED)
            if self._evict:
                # In this order: fadvise skips pages that are still mapped.
                os.posix_fadvise(self._files[span.path], span.offset, span.nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


Source = RamWeights | MappedWeights


def release_pages(tensors: Sequence[Tensor], *, evict: bool) -> None:
    """Unmap the file pages behind `tensors`, which were copied and are not needed again."""
    pages = MappedWeights({0: list(tensors)}, evict=evict)
    pages.drop(0)
    pages.close()


def _file_mappings() -> list[_Mapping]:
    """The files mapped into this process; empty if not Linux."""
    maps = Path("/proc/self/maps")
    if not sys.platform.startswith("linux") or not maps.is_file():
        return []
    found = []
    for line in maps.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and os.path.isfile(fields[5]):
            start, end = (int(bound, 16) for bound in fields[0].split("-"))
            found.append(_Mapping(start, end, int(fields[2], 16), fields[5]))
    return found


def _mapping_of(tensor: Tensor, mappings: list[_Mapping]) -> _Mapping | None:
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    return next((m for m in mappings if m.start <= begin and end <= m.end), None)


def _spans(tensors: Sequence[Tensor], mappings: list[_Mapping]) -> list[_Span]:
    """The whole pages under `tensors`, neighbours joined first so that the pages they share count, too."""
    joined: list[tuple[int, int, _Mapping]] = []
    for tensor in sorted(tensors, key=lambda t: t.data_ptr()):
        mapping = _mapping_of(tensor, mappings)
        if mapping is None:
            continue
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if joined and begin - joined[-1][1] in range(_PAGE) and joined[-1][2] == mapping:
            begin = joined.pop()[0]
        joined.append((begin, end, mapping))
    spans = []
    for begin, end, mapping in joined:
        # Inwards: what lies beside the layer's pages may be in use.
        first, last = -(-begin // _PAGE) * _PAGE, end // _PAGE * _PAGE
        if last > first:
            spans.append(_Span(first, last - first, mapping.path, mapping.offset + first - mapping.start))
    return spans


def _advise(span: _Span, advice: int) -> bool:
    """madvise(2); False where the kernel does not know the advice. GriffinError when the file cannot be read."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(span.address), ctypes.c_size_t(span.nbytes), advice) == 0:
        return True
    if ctypes.get_errno() == errno.EFAULT:
        raise GriffinError(f"{span.path} cannot be read any more: it was changed or its disk fails")
    return False
