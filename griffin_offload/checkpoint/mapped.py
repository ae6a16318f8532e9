"""Pages of mapped files: found from a tensor's address, read ahead, mapped, dropped.

Everything here is advice to the kernel by madvise(2) and posix_fadvise(2). Where the mapping of a tensor cannot be
found (not Linux, or a tensor that was copied), nothing is advised and the operating system's own paging does the work.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import sys
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from griffin_offload.checkpoint.direct_io import DirectReader, Extent
from griffin_offload.checkpoint.files import FileMapping, FileState, Mappings, WatchedFiles
from griffin_offload.devices.memory import in_host_memory
from griffin_offload.errors import CheckpointChanged, CheckpointError, GriffinError, memory_refused, one_line
from griffin_offload.formats.translated import TranslatedTensor, in_memory, stored_parts

_PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform != "win32" else ctypes.CDLL("msvcrt")  # called on Linux alone
_MADV_RANDOM, _MADV_WILLNEED, _MADV_DONTNEED, _MADV_POPULATE_READ = 1, 3, 4, 22
# The kernel reads ahead at most the disk's window for one call, however long the range: so ask in steps, and keep
# some of them in flight (benchmarks/NOTES.md).
_STEP_BYTES = 8 * 2**20
_STEPS_AHEAD = 4
# Of a tensor that is copied so much is mapped at once.
_PART_BYTES = _STEPS_AHEAD * _STEP_BYTES


@dataclass(frozen=True)
class Span:
    """Whole pages of one file, mapped at `address`."""

    address: int
    nbytes: int
    path: str
    offset: int

    def steps(self) -> list["Span"]:
        """The span in pieces that the kernel reads with one request."""
        return [
            Span(self.address + at, min(_STEP_BYTES, self.nbytes - at), self.path, self.offset + at)
            for at in range(0, self.nbytes, _STEP_BYTES)
        ]


class FilePages:
    """The pages under tensors that are views of mapped files.

    `evict` is for models that do not fit the page cache: dropped pages are freed from it, too, and what is copied is
    read past it, by `direct`, where the file system can do that.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        *,
        evict: bool,
        known: Mapping[str, FileState] | None = None,
        mappings: Mappings | None = None,
    ) -> None:
        """`known` are states of the files from before they were mapped, `mappings` from after that."""
        self.evict = evict
        self.direct: DirectReader | None = None
        self._mappings = Mappings() if mappings is None else mappings
        parts = [part for tensor in tensors for part in stored_parts(tensor)]
        used = {mapping for part in parts if (mapping := self._mapping_of(part)) is not None}
        self.unmapped_bytes = sum(p.nbytes for p in parts if self._mappings and self._mapping_of(p) is None)
        for mapping in used:
            if mapping.deleted:
                raise CheckpointChanged(f"{mapping.path} was deleted or replaced while it was loaded: load it again")
        self.files = WatchedFiles(sorted({mapping.path for mapping in used}), known)
        for mapping in used:
            # What is needed is asked for exactly; guessing around page faults would read other layers, too.
            self._advise(Span(mapping.start, mapping.end - mapping.start, mapping.path, 0), _MADV_RANDOM)
        if evict and used:
            with contextlib.suppress(OSError):
                self.direct = DirectReader(self.files.descriptors)

    def extents(self, tensors: Sequence[Tensor]) -> list[Extent] | None:
        """The bytes of `tensors` in their files; None if one lies in none, or is translated."""
        found = []
        for tensor in tensors:
            if isinstance(tensor, TranslatedTensor):
                return None
            mapping = self._mapping_of(tensor)
            if mapping is None or not tensor.is_contiguous():
                return None
            found.append(Extent(mapping.path, mapping.offset + tensor.data_ptr() - mapping.start, tensor.nbytes))
        return found

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy a mapped tensor to another one of its size, in any precision and on any device. Of a large one, such as
        a table of embeddings, a part at a time is mapped: pages count as the process's memory while they are."""
        extents = self.extents([source])
        if self.direct and extents and source.dtype == target.dtype and in_host_memory(target):
            self.direct.copy(extents[0], target.view(-1).view(torch.uint8))
            return
        if isinstance(source, TranslatedTensor):
            spans = self.spans([source])
            self.read(spans)
            source.read(target)
            self.drop(spans)
            return
        parts = [(source, target)]
        if source.is_contiguous() and target.is_contiguous():
            elements = _PART_BYTES // source.element_size()
            parts = list(zip(source.view(-1).split(elements), target.view(-1).split(elements), strict=True))
        following = [self.spans([part]) for part, _ in parts[1:]] + [[]]
        for (part, place), next_spans in zip(parts, following, strict=True):
            spans = self.spans([part])
            self.read(spans)
            for step in (step for span in next_spans for step in span.steps()):
                self._advise(step, _MADV_WILLNEED)  # the disk goes on while this part is copied
            place.copy_(part)
            self.drop(spans)

    def spans(self, tensors: Sequence[Tensor]) -> list[Span]:
        """The whole pages under `tensors`, neighbours joined first so that the pages they share count, too."""
        joined: list[tuple[int, int, FileMapping]] = []
        parts = [part for tensor in tensors for part in stored_parts(tensor)]
        for part in sorted(parts, key=lambda p: p.data_ptr()):
            mapping = self._mapping_of(part)
            if mapping is None:
                continue
            begin, end = part.data_ptr(), part.data_ptr() + part.nbytes
            if joined and begin - joined[-1][1] in range(_PAGE) and joined[-1][2] == mapping:
                begin = joined.pop()[0]
            joined.append((begin, end, mapping))
        return [span for begin, end, mapping in joined if (span := _inner_pages(begin, end, mapping)).nbytes > 0]

    def ask(self, spans: Sequence[Span]) -> None:
        """Have the disk read the spans; does not wait."""
        for step in (step for span in spans for step in span.steps()):
            self._advise(step, _MADV_WILLNEED)

    def read(self, spans: Sequence[Span]) -> None:
        """Read the spans and map their pages, so that using them takes no page fault; blocks."""
        steps = [step for span in spans for step in span.steps()]
        for position, step in enumerate(steps):
            ahead = position + _STEPS_AHEAD
            for early in steps[ahead : ahead + 1] if position else steps[: ahead + 1]:
                self._advise(early, _MADV_WILLNEED)
            self._advise(step, _MADV_POPULATE_READ)

    def read_rows(self, tensor: Tensor, rows: Tensor) -> int:
        """Read the pages under some rows (sorted indices) of a contiguous tensor and map them; returns their bytes."""
        mapping, row_bytes = self._mapping_of(tensor), tensor.nbytes // tensor.shape[0]
        if mapping is None:
            return rows.numel() * row_bytes
        begin = rows.numpy() * row_bytes + tensor.data_ptr()
        first, end = begin // _PAGE * _PAGE, -(-(begin + row_bytes) // _PAGE) * _PAGE
        starts = np.flatnonzero(np.append(True, first[1:] > end[:-1]))  # of runs of pages without a gap
        runs = list(zip(first[starts].tolist(), end[np.append(starts[1:], len(end)) - 1].tolist(), strict=True))
        spans = [Span(at, to - at, mapping.path, 0) for at, to in runs]
        for advice in (_MADV_WILLNEED, _MADV_POPULATE_READ):  # all are asked for before the first is waited for
            for span in spans:
                self._advise(span, advice)
        return sum(span.nbytes for span in spans)

    def drop(self, spans: Sequence[Span]) -> None:
        """Unmap the spans' pages and, when evicting, free them."""
        for span in spans:
            self._advise(span, _MADV_DONTNEED)
            if self.evict:
                # In this order: fadvise skips pages that are still mapped.
                os.posix_fadvise(self.files.descriptors[span.path], span.offset, span.nbytes, os.POSIX_FADV_DONTNEED)

    @contextlib.contextmanager
    def reading(self, tensors: Sequence[Tensor], *, translate: bool = True) -> Iterator[list[Tensor]]:
        """Inside, the numbers of `tensors`, in their pages or translated (or, if not `translate`, to be translated a
        few rows at a time); the pages are dropped behind it. CheckpointChanged behind it if one of the files was
        written to or cut meanwhile."""
        spans = self.spans(tensors)
        self.read(spans)
        yield [in_memory(tensor.detach()) if translate else tensor.detach() for tensor in tensors]
        self.files.check_contents()
        self.drop(spans)

    def close(self) -> None:
        """Close the files; the mappings are not ours."""
        if self.direct is not None:
            self.direct.close()
        self.files.close()

    def paths(self, tensors: Sequence[Tensor]) -> set[str]:
        """The files under `tensors`."""
        parts = [part for tensor in tensors for part in stored_parts(tensor)]
        return {mapping.path for part in parts if (mapping := self._mapping_of(part)) is not None}

    def _advise(self, span: Span, advice: int) -> None:
        """madvise(2); advice the kernel does not know is left out. CheckpointChanged or GriffinError when the file
        cannot be read."""
        failed = LIBC.madvise(ctypes.c_void_p(span.address), ctypes.c_size_t(span.nbytes), advice)
        if failed and ctypes.get_errno() == errno.EFAULT:
            self.files.check_contents([span.path])
            raise GriffinError(f"{span.path} cannot be read any more: its disk fails")

    def _mapping_of(self, tensor: Tensor) -> FileMapping | None:
        found = self._mappings.around(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
        return found if found is not None and found.path else None


def _inner_pages(begin: int, end: int, mapping: FileMapping) -> Span:
    # Inwards: what lies beside may be in use.
    first, last = -(-begin // _PAGE) * _PAGE, end // _PAGE * _PAGE
    return Span(first, last - first, mapping.path, mapping.offset + first - mapping.start)


# Files mapped to be read alone.


_FAILED = ctypes.c_void_p(-1).value  # what mmap(2) returns for an error


class FileMaps:
    """Files, each mapped once when it is first asked for; none of their pages is touched. A mapping lives as long as a
    tensor of it."""

    def __init__(self) -> None:
        self._contents: dict[str, Tensor] = {}

    def view(self, extent: Extent) -> Tensor:
        """Its bytes, uint8, not to be written to. CheckpointError for a file that is no longer what it was."""
        try:
            content = self._content(extent.path)
        except OSError as error:
            if memory_refused(error):
                raise
            raise CheckpointError(f"{extent.path} was changed while it was loaded: {one_line(error)}") from error
        end = extent.offset + extent.nbytes
        if end > content.numel():
            raise CheckpointError(
                f"{extent.path} was changed while it was loaded: a tensor ends at byte {end} of {content.numel()}"
            )
        return content[extent.offset : end]

    def _content(self, path: str) -> Tensor:
        if path not in self._contents:
            with open(path, "rb") as file:
                self._contents[path] = _mapped(file.fileno())
        return self._contents[path]


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
