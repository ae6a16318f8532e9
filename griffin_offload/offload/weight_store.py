"""Where the full FF weights rest: mapped from the checkpoint's files, or held in host memory.

Both fetch the FF tensors of a layer and count every byte they fetch. The mapped source reads a layer into the page
cache and drops it when it was used, so that a model larger than RAM passes through a few pages.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from griffin_offload.blocks.base import ALIGNMENT
from griffin_offload.checkpoint.direct_io import SlotLayout
from griffin_offload.checkpoint.files import Mappings
from griffin_offload.checkpoint.mapped import FilePages
from griffin_offload.devices.base import Device
from griffin_offload.devices.memory import in_huge_pages
from griffin_offload.formats.base import is_plain
from griffin_offload.formats.translated import TranslatedTensor, stored_bytes

MIN_DIRECT_BYTES = 16 * 2**20
"""Layers of at least so many bytes are read directly where the page cache is too small: slots have whole blocks."""
DIRECT_SLACK_BYTES = 2**17
"""What whole blocks can add to such a slot."""
_COPY_THREADS = 4  # a disk wants several requests at a time, and so do page faults


def slot_bytes(flat_bytes: int) -> int:
    """What a layer of `flat_bytes` takes at most in a slot on the CPU."""
    return flat_bytes + (DIRECT_SLACK_BYTES if flat_bytes >= MIN_DIRECT_BYTES else 0)


def stream_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What `tensor` is streamed as: floats in the precision of the computation, quantised numbers as they are."""
    return dtype if is_plain(tensor) else tensor.dtype


class FlatLayout:
    """Where the tensors of one layer lie in one flat buffer of bytes."""

    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Places for `tensors`, whose floats will be of `dtype`."""
        self._specs = [(tensor.shape, stream_dtype(tensor, dtype)) for tensor in tensors]
        self._offsets, end = [], 0
        for shape, own in self._specs:
            self._offsets.append(end)
            end += -(-shape.numel() * own.itemsize // ALIGNMENT) * ALIGNMENT
        self.nbytes = end

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Typed tensors inside `buffer`, a uint8 tensor of at least `nbytes`."""
        return [
            buffer[offset : offset + shape.numel() * own.itemsize].view(own).view(shape)
            for offset, (shape, own) in zip(self._offsets, self._specs, strict=True)
        ]


class HostStore:
    """Full FF weights in host memory, one flat buffer a layer, in the precision of the computation."""

    def __init__(self, origin: "MmapStore", layers: Sequence[int], dtype: torch.dtype, device: Device) -> None:
        """Copy `layers` out of `origin`, several at a time, into buffers that `device` copies from."""
        self._layers: dict[int, list[Tensor]] = {}
        self.flat: dict[int, Tensor] = {}
        self._device = device
        self._registered: list[Tensor] = []
        self.fetched_bytes = 0
        try:
            with ThreadPoolExecutor(_COPY_THREADS) as pool:
                list(pool.map(lambda index: self._copy_layer(origin, index, dtype), layers))
        except BaseException:
            self.close()
            raise

    def _copy_layer(self, origin: "MmapStore", index: int, dtype: torch.dtype) -> None:
        tensors = origin.tensors(index)
        layout = FlatLayout(tensors, dtype)
        buffer = in_huge_pages(torch.empty(layout.nbytes, dtype=torch.uint8, device="cpu"))
        self._device.register(buffer)
        self._registered.append(buffer)
        views = layout.views(buffer)
        origin.copy(index, views)
        self.flat[index], self._layers[index] = buffer, views

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.flat.values())

    def tensors(self, layer: int) -> list[Tensor]:
        return self._layers[layer]

    def fetch(self, layer: int) -> list[Tensor]:
        """The layer's tensors; counted."""
        self.fetched_bytes += sum(tensor.nbytes for tensor in self._layers[layer])
        return self._layers[layer]

    def fetch_rows(self, layer: int, rows: Sequence[Tensor | None]) -> list[Tensor]:
        """The layer's tensors, of which only `rows` are used (None: all); counted."""
        for tensor, needed in zip(self._layers[layer], rows, strict=True):
            share = 1 if needed is None else needed.numel() / tensor.shape[0]
            self.fetched_bytes += int(tensor.nbytes * share)
        return self._layers[layer]

    def drop(self, layer: int) -> None:
        """Nothing to drop: the buffer is the weights' home."""

    def check_files(self) -> None:
        """Nothing to check: no file is read any more."""

    def check(self, layer: int) -> None:
        """Nothing to check: no file is read any more."""

    def close(self) -> None:
        while self._registered:
            self._device.unregister(self._registered.pop())


class MmapStore:
    """Full FF weights as views of mmapped safetensors, as transformers loads them on the CPU."""

    def __init__(self, layers: dict[int, list[Tensor]], *, evict: bool, mappings: Mappings | None = None) -> None:
        self._layers = layers
        tensors = [tensor for tensors in layers.values() for tensor in tensors]
        self.pages = FilePages(tensors, evict=evict, mappings=mappings)
        self._spans = {index: self.pages.spans(tensors) for index, tensors in layers.items()}
        self._paths = {index: self.pages.paths(tensors) for index, tensors in layers.items()}
        self.unmapped_bytes = self.pages.unmapped_bytes
        self.fetched_bytes = 0
        self.placements = self._placements()
        """Where layers lie in slots that they are read into; empty where they are used in their mapped pages."""

    def _placements(self) -> dict[int, SlotLayout]:
        found = {}
        for index, tensors in self._layers.items():
            extents = self.pages.extents(tensors) if self.pages.direct else None
            if extents is None or sum(tensor.nbytes for tensor in tensors) < MIN_DIRECT_BYTES:
                return {}
            found[index] = SlotLayout(tensors, extents)
        return found

    def tensors(self, layer: int) -> list[Tensor]:
        return self._layers[layer]

    def fetch(self, layer: int) -> list[Tensor]:
        """Read the layer and map its pages; blocks; counted."""
        self.pages.read(self._spans[layer])
        self.fetched_bytes += sum(stored_bytes(tensor) for tensor in self._layers[layer])
        return self._layers[layer]

    def copy(self, layer: int, targets: Sequence[Tensor]) -> None:
        """Copy the layer's tensors to `targets` of their sizes; blocks."""
        for tensor, target in zip(self._layers[layer], targets, strict=True):
            self.pages.copy(tensor.detach(), target)

    def read(self, layer: int, slot: Tensor) -> list[Tensor]:
        """Read the layer into `slot`, a block buffer, past the page cache; blocks; counted."""
        assert self.pages.direct is not None, "only what has a placement"
        self.fetched_bytes += sum(tensor.nbytes for tensor in self._layers[layer])
        return self.pages.direct.read(self.placements[layer], slot)

    def fetch_rows(self, layer: int, rows: Sequence[Tensor | None]) -> list[Tensor]:
        """Read `rows` of each of the layer's tensors (None: all of it) and map their pages; blocks; counted."""
        for tensor, needed in zip(self._layers[layer], rows, strict=True):
            if needed is None or isinstance(tensor, TranslatedTensor):
                self.pages.read(self.pages.spans([tensor]))
                self.fetched_bytes += stored_bytes(tensor)
            else:
                self.fetched_bytes += self.pages.read_rows(tensor, needed)
        return self._layers[layer]

    def drop(self, layer: int) -> None:
        """Unmap the layer's pages and, when evicting, free them."""
        self.pages.drop(self._spans[layer])

    def check_files(self) -> None:
        """CheckpointChanged unless the files are those that were mapped, and whole: to ask before a pass."""
        self.pages.files.check()

    def check(self, layer: int) -> None:
        """CheckpointChanged if a file of the layer was written to or cut: to ask when the layer was used."""
        self.pages.files.check_contents(self._paths[layer])

    def close(self) -> None:
        self.pages.close()


Source = HostStore | MmapStore
