"""Where the experts of streamed layers rest: in their files. They are read one by one, in pieces, by a few threads.

What somebody waits for is read first, an expert behind the other, so that the first can compute while the next ones are
read; guesses are read while nothing else is. What is used as it is stored is read past the page cache where that is too
small for the model; of what has to be made (quantised, decoded) the pages are read, and whoever waits makes it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from griffin_offload.checkpoint.direct_io import PIECE_BYTES, Extent
from griffin_offload.checkpoint.mapped import FilePages, Span
from griffin_offload.devices.memory import BLOCK_BYTES
from griffin_offload.formats.expert_form import record_rows
from griffin_offload.formats.translated import Fill, copied_parts, read_rows, row_parts

READ_AHEAD = 4
"""Experts of a layer that are on their way, or asked for, ahead of the one that computes."""
_READERS = 4  # a disk wants several requests at a time
_GUESSING = 2  # what is waited for waits for so many pieces of guesses at most

Piece = tuple[int, Callable[[], None]]
"""Bytes of files, and what reads them."""


class ExpertRead:
    """An expert on its way into tensors of its own."""

    def __init__(
        self,
        layer: int,
        expert: int,
        into: Sequence[Tensor],
        pieces: Sequence[Piece],
        *,
        made: bool,
        host: bool = False,
        mapped: bool = False,
    ) -> None:
        self.layer, self.expert, self.into = layer, expert, into
        self.made = made
        """Its pages are read, and it is made when somebody waits for it."""
        self.host, self.mapped = host, mapped
        """The CPU computes it beside a device; where its pages are mapped."""
        self.done: Future[None] = Future()
        """All pieces are read, or one has failed; of what was cancelled, nothing is written any more."""
        self.read_bytes = 0
        """So far."""
        self.left, self.flying = deque(pieces), 0
        self.error: BaseException | None = None


class ReadQueue:
    """Threads that read pieces of experts."""

    def __init__(self, readers: int = _READERS) -> None:
        self._pool = ThreadPoolExecutor(readers, "griffin-offload-experts")
        self._readers, self._lock = readers, threading.Lock()
        self._wanted: deque[ExpertRead] = deque()
        self._guesses: deque[ExpertRead] = deque()
        self._guessing = 0
        """Pieces of guesses that are being read."""
        self._flying: set[ExpertRead] = set()
        """Of which pieces are being read."""

    def add(self, read: ExpertRead, *, guess: bool) -> None:
        """Read it behind those that were added before; guesses behind all others."""
        pieces = len(read.left)
        with self._lock:
            (self._guesses if guess else self._wanted).append(read)
        self._wake(min(pieces, _GUESSING) if guess else pieces)

    def _wake(self, pieces: int) -> None:
        for _ in range(min(self._readers, pieces)):
            self._pool.submit(self._work)

    def want(self, read: ExpertRead) -> None:
        """It was no guess."""
        with self._lock:
            pieces = len(read.left) if read in self._guesses else 0
            if pieces:
                self._guesses.remove(read)
                self._wanted.append(read)
        self._wake(pieces)

    def cancel(self, read: ExpertRead) -> None:
        """Read no more of it than what is being read now."""
        with self._lock:
            read.left.clear()
            over = read.flying == 0 and not read.done.done()
        if over:
            read.done.set_result(None)

    def close(self) -> None:
        """Wait for what is being read, and read nothing more. Threads end by themselves: whoever collects a model may
        be any thread, also one that Python is starting, and joining another one there would wait for ever."""
        with self._lock:
            flying = list(self._flying)
            for read in (*self._wanted, *self._guesses, *flying):
                read.left.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for read in flying:
            read.done.exception()

    def _work(self) -> None:
        while (found := self._next()) is not None:
            read, (nbytes, piece), guess = found
            error: BaseException | None = None
            try:
                piece()
            except BaseException as failure:  # whoever waits for the expert gets it
                error = failure
            self._end(read, nbytes, error, guess=guess)

    def _next(self) -> tuple[ExpertRead, Piece, bool] | None:
        with self._lock:
            for queue in (self._wanted, self._guesses):
                guess = queue is self._guesses
                while queue and not (guess and self._guessing >= _GUESSING):
                    read = queue[0]
                    if len(read.left) <= 1:
                        queue.popleft()
                    if read.left:
                        self._flying.add(read)
                        read.flying += 1
                        self._guessing += guess
                        return read, read.left.popleft(), guess
        return None

    def _end(self, read: ExpertRead, nbytes: int, error: BaseException | None, *, guess: bool) -> None:
        with self._lock:
            read.flying -= 1
            self._guessing -= guess
            if error is None:
                read.read_bytes += nbytes
            else:
                read.error = read.error or error
                read.left.clear()
            over = not read.flying and not read.left
            if not read.flying:
                self._flying.discard(read)
        if over and read.error is not None:
            read.done.set_exception(read.error)
        elif over:
            read.done.set_result(None)


class ExpertStore:
    """The experts of all streamed layers in their files; every byte that is read is counted."""

    def __init__(
        self, layers: dict[int, list[Tensor]], *, evict: bool, fills: Mapping[int, Fill] | None = None
    ) -> None:
        """`fills` are of the layers whose experts are not computed with as they are stored."""
        self._fills = fills or {}
        self._queue = ReadQueue()
        self._layers = {index: [tensor.detach() for tensor in tensors] for index, tensors in layers.items()}
        self._pages = FilePages([tensor for tensors in self._layers.values() for tensor in tensors], evict=evict)
        self._paths = {index: self._pages.paths(tensors) for index, tensors in self._layers.items()}
        self._records = {index: record_rows(tensors) for index, tensors in self._layers.items()}
        self._spans: dict[tuple[int, int], list[Span]] = {}
        self.unmapped_bytes = self._pages.unmapped_bytes
        """Of experts that lie in no file."""
        self.fetched_bytes = self.reads = 0
        self.wrong_bytes = 0
        """Of the fetched ones and of those for the CPU, those of guesses that nobody needed."""
        self.host_bytes = 0
        """Read for the CPU to compute beside a device, and not fetched."""
        self.wait_s = 0.0
        """Seconds that the computation waited for experts."""

    def tensors(self, layer: int) -> list[Tensor]:
        """As they lie, all experts of a layer."""
        return self._layers[layer]

    def expert_bytes(self, layer: int) -> int:
        """Of one expert, in the files."""
        return sum(part.nbytes for tensor in self._layers[layer] for part in row_parts(tensor, 0))

    def ask(self, layer: int, experts: Sequence[int]) -> None:
        """Have the disk read `experts`; does not wait."""
        for expert in experts:
            self._pages.ask(self._spans_of(layer, expert))

    def read(self, layer: int, expert: int, into: Sequence[Tensor]) -> None:
        """Read an expert into its tensors, in any precision and on any device; blocks; counted."""
        self.finish(self.start(layer, expert, into))

    def start(
        self,
        layer: int,
        expert: int,
        into: Sequence[Tensor],
        record: Tensor | None = None,
        *,
        guess: bool = False,
        host: bool = False,
    ) -> ExpertRead:
        """Have readers begin with that; `finish`, or `give_up`, has to be called. `record` is the memory of `into`
        where it lies there as in files that hold records. It is counted as fetched, or as read for the `host`."""
        pieces = self._pieces(layer, expert, into, record)
        made = pieces is None
        read = ExpertRead(layer, expert, into, pieces or self._pages_of(layer, expert), made=made, host=host)
        self._queue.add(read, guess=guess)
        return read

    def lies_as(self, layer: int, places: Sequence[Tensor]) -> bool:
        """Whether experts lie in the files as in `places` [N, ...], and the page cache has room for them."""
        plain = all(
            type(tensor) in (Tensor, torch.nn.Parameter) and tensor.dtype == place.dtype
            for tensor, place in zip(self._layers[layer], places, strict=True)
        )
        return plain and layer not in self._fills and not self._pages.evict

    def start_mapped(self, layer: int, expert: int) -> ExpertRead:
        """Have readers map an expert's pages, where the CPU multiplies it: its tensors are `into`."""
        into = [tensor[expert] for tensor in self._layers[layer]]
        pages = self._pages_of(layer, expert)
        read = ExpertRead(layer, expert, into, pages, made=False, host=True, mapped=True)
        self._queue.add(read, guess=False)
        return read

    def _pages_of(self, layer: int, expert: int) -> list[Piece]:
        return [(self.expert_bytes(layer), partial(self._pages.read, self._spans_of(layer, expert)))]

    def want(self, read: ExpertRead) -> None:
        """What was a guess will be waited for."""
        self._queue.want(read)

    def finish(self, read: ExpertRead) -> None:
        """Wait until the expert is there. What has to be made of what is stored is made by whoever waits."""
        start, layer = time.perf_counter(), read.layer
        read.done.result()
        if read.made:
            self._fills.get(layer, read_rows)(self._layers[layer], read.expert, read.into)
        self._pages.files.check_contents(self._paths[layer])
        if not read.mapped:
            self._pages.drop(self._spans_of(layer, read.expert))
        self._count(read)
        self.reads += 1
        self.wait_s += time.perf_counter() - start

    def cancel(self, read: ExpertRead) -> None:
        """Nobody will ask for it; does not wait. Its tensors are written to until it is `done`."""
        self._queue.cancel(read)

    def give_up(self, read: ExpertRead) -> None:
        """What was cancelled is let go of, once it is done; counted."""
        read.done.exception()
        self._pages.drop(self._spans_of(read.layer, read.expert))
        self._count(read)
        self.wrong_bytes += read.read_bytes

    def _count(self, read: ExpertRead) -> None:
        self.host_bytes += read.read_bytes * read.host
        self.fetched_bytes += read.read_bytes * (not read.host)

    def _pieces(self, layer: int, expert: int, into: Sequence[Tensor], record: Tensor | None) -> list[Piece] | None:
        """Of an expert that is used as it is stored; None for one that is made."""
        parts = self._copied(layer, expert, into)
        if parts is None:
            return None
        records = self._records[layer]
        if record is not None and records is not None and record.shape == records.shape[1:]:
            parts = [(records[expert], record)]
        direct = self._pages.direct
        extents = self._pages.extents([part for part, _ in parts]) if direct is not None else None
        if direct is None or extents is None:
            copy = partial(self._copy, parts, self._spans_of(layer, expert))
            return [(sum(part.nbytes for part, _ in parts), copy)]
        return [
            (piece.nbytes, partial(direct.copy, piece, target))
            for extent, (_, place) in zip(extents, parts, strict=True)
            for piece, target in _in_pieces(extent, place)
        ]

    def _copied(self, layer: int, expert: int, into: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]] | None:
        """Bytes of files and where they go, of an expert that is used as it is stored; None for one that is made."""
        found: list[tuple[Tensor, Tensor]] = []
        for tensor, target in zip(self._layers[layer], into, strict=True) if layer not in self._fills else ():
            parts = copied_parts(tensor, expert)
            if parts is None or not target.is_cpu or target.dtype != tensor.dtype or not target.is_contiguous():
                return None
            bytes_ = target.view(-1).view(torch.uint8).split([part.nbytes for part in parts])
            found += [(part.view(-1).view(torch.uint8), place) for part, place in zip(parts, bytes_, strict=True)]
        return found or None

    def _copy(self, parts: Sequence[tuple[Tensor, Tensor]], spans: Sequence[Span]) -> None:
        """By a reader, through the page cache."""
        self._pages.read(spans)
        for part, place in parts:
            place.numpy()[:] = part.numpy()  # by this thread alone, without the interpreter's lock

    def check_files(self) -> None:
        """CheckpointChanged unless the files are those that were mapped: to ask before a pass."""
        self._pages.files.check()

    def close(self) -> None:
        self._queue.close()
        self._pages.close()

    def _spans_of(self, layer: int, expert: int) -> list[Span]:
        key = layer, expert
        if key not in self._spans:
            parts = [part for tensor in self._layers[layer] for part in row_parts(tensor, expert)]
            self._spans[key] = self._pages.spans(parts)
        return self._spans[key]


def _in_pieces(extent: Extent, place: Tensor) -> list[tuple[Extent, Tensor]]:
    """Ends of all but the last lie between blocks of the file."""
    found, at = [], 0
    while at < extent.nbytes:
        end = (extent.offset + at) // BLOCK_BYTES * BLOCK_BYTES + PIECE_BYTES - extent.offset
        end = min(end, extent.nbytes)
        found.append((Extent(extent.path, extent.offset + at, end - at), place[at:end]))
        at = end
    return found


class PassingExperts:
    """`ExpertSource` of a layer of which none stays: they pass one by one through one buffer, as they are stored."""

    away, there = (), 0

    def __init__(self, layer: int, store: ExpertStore) -> None:
        self._layer, self._store = layer, store
        self._buffer: list[Tensor] = []
        self._waiting: list[int] = []

    def begin(self, experts: Sequence[int], index: Tensor, weights: Tensor) -> Sequence[int]:
        """The first are asked for."""
        self._waiting = list(experts)
        self._store.ask(self._layer, self._waiting[:READ_AHEAD])
        if not self._buffer:
            full = self._store.tensors(self._layer)
            self._buffer = [torch.empty(t.shape[1:], dtype=t.dtype, device="cpu") for t in full]
        return experts

    def tensors(self, expert: int) -> Sequence[Tensor]:
        """Those of `expert`, in the buffer."""
        self._waiting.remove(expert)
        self._store.ask(self._layer, self._waiting[READ_AHEAD - 1 : READ_AHEAD])
        self._store.read(self._layer, expert, self._buffer)
        return self._buffer

    def checked(self, expert: int, dtype: torch.dtype, check: Callable[[Sequence[Tensor], torch.dtype], Any]) -> Any:
        """Anew, whatever was checked before."""
        return check(self.tensors(expert), dtype)

    def settle(self, chosen: Sequence[int]) -> None:
        """None stays, and the buffer goes."""
        self._buffer = []
