"""Experts where they rest, in mapped files: read one by one, several at a time, and counted.

What is used as it is stored is copied by the readers, past the page cache where that is too small for the model. Of
what has to be made (quantised, decoded) they read the pages, and whoever waits makes it.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from griffin_offload.checkpoint.mapped import FilePages, Span
from griffin_offload.formats.stacked import Fill, copied_parts, read_rows, row_parts

READ_AHEAD = 4
"""Experts of a layer that are on their way, or asked for, ahead of the one that computes."""
_READERS = 4  # a disk wants several requests at a time


class ExpertStore:
    """The experts of all streamed layers in their files; every byte that is read is counted."""

    def __init__(
        self, layers: dict[int, list[Tensor]], *, evict: bool, fills: Mapping[int, Fill] | None = None
    ) -> None:
        """`fills` are of the layers whose experts are not computed with as they are stored."""
        self._fills = fills or {}
        self._readers = ThreadPoolExecutor(_READERS, "griffin-offload-experts")
        self._layers = {index: [tensor.detach() for tensor in tensors] for index, tensors in layers.items()}
        self._pages = FilePages([tensor for tensors in self._layers.values() for tensor in tensors], evict=evict)
        self._spans: dict[tuple[int, int], list[Span]] = {}
        self.unmapped_bytes = self._pages.unmapped_bytes
        """Of experts that lie in no file."""
        self.fetched_bytes = self.reads = 0
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

    def start(self, layer: int, expert: int, into: Sequence[Tensor]) -> "ExpertRead":
        """Have a reader begin with that; `finish`, which has to be called, waits for it."""
        spans, parts = self._spans_of(layer, expert), self._copied(layer, expert, into)
        work = partial(self._pages.read, spans) if parts is None else partial(self._copy, parts, spans)
        return ExpertRead(layer, expert, into, parts is None, self._readers.submit(work))

    def finish(self, read: "ExpertRead") -> None:
        """Wait until the expert is there. What has to be made of what is stored is made by whoever waits."""
        start, layer = time.perf_counter(), read.layer
        read.done.result()
        if read.made:
            self._fills.get(layer, read_rows)(self._layers[layer], read.expert, read.into)
        self._pages.files.check_contents()
        self._pages.drop(self._spans_of(layer, read.expert))
        self.fetched_bytes += self.expert_bytes(layer)
        self.reads += 1
        self.wait_s += time.perf_counter() - start

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
        """By a reader: past the page cache where the model does not fit it."""
        extents = self._pages.extents([part for part, _ in parts]) if self._pages.direct else None
        if self._pages.direct is not None and extents is not None:
            for extent, (_, place) in zip(extents, parts, strict=True):
                self._pages.direct.copy(extent, place)
            return
        self._pages.read(spans)
        for part, place in parts:
            place.numpy()[:] = part.numpy()  # by this thread alone, without the interpreter's lock

    def check_files(self) -> None:
        """CheckpointChanged unless the files are those that were mapped: to ask before a pass."""
        self._pages.files.check()

    def close(self) -> None:
        self._readers.shutdown()
        self._pages.close()

    def _spans_of(self, layer: int, expert: int) -> list[Span]:
        key = layer, expert
        if key not in self._spans:
            parts = [part for tensor in self._layers[layer] for part in row_parts(tensor, expert)]
            self._spans[key] = self._pages.spans(parts)
        return self._spans[key]


@dataclass(frozen=True)
class ExpertRead:
    """An expert on its way into tensors of its own."""

    layer: int
    expert: int
    into: Sequence[Tensor]
    made: bool
    """Its pages are read, and it is made when somebody waits for it."""
    done: Future[None]


class PassingExperts:
    """`ExpertSource` of a layer of which none stays: they pass one by one through one buffer, as they are stored."""

    def __init__(self, layer: int, store: ExpertStore) -> None:
        self._layer, self._store = layer, store
        self._buffer: list[Tensor] = []
        self._waiting: list[int] = []

    def begin(self, experts: Sequence[int], index: Tensor, weights: Tensor) -> None:
        """The first are asked for."""
        self._waiting = list(experts)
        self._store.ask(self._layer, self._waiting[:READ_AHEAD])
        if not self._buffer:
            full = self._store.tensors(self._layer)
            self._buffer = [torch.empty(t.shape[1:], dtype=t.dtype, device="cpu") for t in full]

    def tensors(self, expert: int) -> Sequence[Tensor]:
        """Those of `expert`, in the buffer."""
        self._waiting.remove(expert)
        self._store.ask(self._layer, self._waiting[READ_AHEAD - 1 : READ_AHEAD])
        self._store.read(self._layer, expert, self._buffer)
        return self._buffer

    def settle(self, chosen: Sequence[int]) -> None:
        """None stays, and the buffer goes."""
        self._buffer = []
