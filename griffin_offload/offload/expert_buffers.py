"""Memory on the device for experts without a place in their layer: those that pass, and guesses of what comes next."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from griffin_offload.devices.memory import block_buffer
from griffin_offload.offload.expert_store import ExpertRead, ExpertStore


@dataclass(eq=False)
class Place:
    """Memory of one expert on the device."""

    tensors: list[Tensor]
    record: Tensor | None = None
    """All of it, uint8, where it lies there as in files that hold records."""
    own: bool = True
    """Allocated by `another`, and no part of a layer's."""
    host: bool = False
    """In host memory beside a device: of an expert that the CPU computes."""
    read: ExpertRead | None = None
    """What was last read into it; of a forward that failed it may go on."""
    checked: dict[torch.dtype, Any] = field(default_factory=dict)
    """Its matrices for kernels, by the type of what they multiply."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors) if self.record is None else self.record.nbytes

    def fits(self, other: "Place") -> bool:
        """Whether tensors of the same shapes and types are in it."""
        own, others = ([(tensor.shape, tensor.dtype) for tensor in one.tensors] for one in (self, other))
        return own == others

    def another(self, *, host: bool = False) -> "Place":
        """One more of this kind; or in host memory."""
        if self.record is None:
            device = "cpu" if host else None
            return Place([torch.empty_like(tensor, device=device) for tensor in self.tensors], host=host)
        record, begin = block_buffer(self.record.nbytes)[: self.record.nbytes], self.record.data_ptr()
        return Place(
            [record[own.data_ptr() - begin :][: own.nbytes].view(own.dtype).view(own.shape) for own in self.tensors],
            record,
            host=host,
        )


class ExpertBuffers:
    """Places on the device for experts that have none in their layer, which all layers share: at most `limit` at once
    while a prompt passes, and `few` while tokens are decoded."""

    def __init__(self, limit: int = 1, few: int = 1, host: "HostBuffers | None" = None) -> None:
        """`host` are those of decoding where the CPU computes what tokens miss: then it takes none of the device's."""
        self.limit, self.few, self.host = limit, few if host is None else 0, host
        self._free: list[Place] = []
        self._taken: list[Place] = []
        self._guessed: dict[tuple[int, int], tuple[ExpertStore, ExpertRead, Place]] = {}
        """By layer and expert, on their way or there."""
        self._cancelled: list[tuple[ExpertStore, ExpertRead, Place]] = []
        """Still written to, maybe."""
        self.guesses = True
        """Whether there may be any: not while a prompt passes."""
        self.peak_bytes = 0
        """Since `begin`."""

    @property
    def of_tokens(self) -> "ExpertBuffers":
        """Those of what is missed while tokens are decoded."""
        return self.host or self

    def begin(self) -> None:
        if self.host is not None:
            self.host.begin()
        self.guesses = False
        self.drop_guesses()
        self.collect()
        self.give_back()  # what tokens before it have computed with
        self.peak_bytes = self.nbytes

    def take(self, like: Place, limit: int) -> Place | None:
        """One of the shapes and on the device of `like`, until it is given back; None where `limit` are taken."""
        found = self._take(like, limit)
        while found is None and (self._guessed or self._cancelled):
            if not self._cancelled:
                self._cancel(next(iter(self._guessed)))
            self.collect()
            found = self._take(like, limit)
        if found is not None:
            self._taken.append(found)
            self.peak_bytes = max(self.peak_bytes, self.nbytes)
        return found

    def _take(self, like: Place, limit: int) -> Place | None:
        self.collect(wait=False)
        found = next((free for free in self._free if free.fits(like)), None)
        if found is not None:
            self._free.remove(found)
            return found
        if len(self._free) + len(self._taken) + len(self._guessed) + len(self._cancelled) >= limit:
            if not self._free or len(self._taken) >= limit:
                return None
            self._free.pop()  # of another layer's shapes
        return self._another(like)

    def _another(self, like: Place) -> Place:
        return like.another()

    def exchange(self, taken: Place, other: Place) -> None:
        """`taken` is a layer's from now on, and `other` is not."""
        self._taken = [other if place is taken else place for place in self._taken]

    def give_back(self, but: Sequence[Place] = ()) -> None:
        """All that are taken may be used again, but those of `but`."""
        given = [place for place in self._taken if place not in but]
        for place in given:
            if place.read is not None:
                place.read.done.exception()  # until nobody writes to it
        self._free += given
        self._taken = [place for place in self._taken if place in but]

    def shrink(self) -> None:
        """Let go of all but the few that decoding needs."""
        if self.host is not None:
            self.host.shrink()
        self.give_back()
        self._free.sort(key=lambda place: place.own)  # a layer's memory would not be freed
        del self._free[self.few :]
        self.guesses = True

    # Guesses of what a layer will need.

    def guess(self, store: ExpertStore, layer: int, expert: int, like: Place) -> bool:
        """Have it read when nothing else is, if there is a buffer that nobody has."""
        place = self._take(like, self.few)
        if place is not None:
            read = store.start(layer, expert, place.tensors, place.record, guess=True, host=place.host)
            self._guessed[layer, expert] = store, read, place
        return place is not None

    def guessed(self, layer: int) -> list[int]:
        """Experts of the layer that were guessed."""
        return [expert for of, expert in self._guessed if of == layer]

    def claim(self, layer: int, expert: int) -> tuple[ExpertRead, Place]:
        """The guess was right: it will be waited for, and its buffer is taken."""
        store, read, place = self._guessed.pop((layer, expert))
        store.want(read)
        self._taken.append(place)
        return read, place

    def drop_guesses(self, layer: int | None = None, but: Sequence[int] = (), *, complete: bool = True) -> None:
        """Those of `layer`, or all: nobody will need them. `but` some, and without `complete` those that are there."""
        for (of, expert), (_, read, _) in list(self._guessed.items()):
            if (layer is None or of == layer) and expert not in but and (complete or not read.done.done()):
                self._cancel((of, expert))

    def _cancel(self, key: tuple[int, int]) -> None:
        store, read, place = self._guessed.pop(key)
        store.cancel(read)
        self._cancelled.append((store, read, place))

    def collect(self, *, wait: bool = True) -> None:
        """Count and take back the buffers of guesses that were cancelled, when nobody writes to them any more."""
        if self.host is not None:
            self.host.collect(wait=wait)
        for one in list(self._cancelled):
            store, read, place = one
            if wait or read.done.done():
                store.give_up(read)
                self._cancelled.remove(one)
                self._free.append(place)

    @property
    def nbytes(self) -> int:
        guesses = [place for *_, place in (*self._guessed.values(), *self._cancelled)]
        return sum(place.nbytes for place in (*self._free, *self._taken, *guesses))


class HostBuffers(ExpertBuffers):
    """The same in host memory: of experts that the CPU computes for a device."""

    def _another(self, like: Place) -> Place:
        return like.another(host=True)
