"""Experts where they rest, in mapped files, and those of a layer that are on the device.

A prompt's pass reads every expert that a token is sent to, once, and the best stay. While tokens are decoded an expert
that is not there is read into its place: into that of another one where it has been of more use lately, else into a
buffer that all layers share.
"""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from griffin_offload.checkpoint.mapped import FilePages, Span
from griffin_offload.errors import GriffinError
from griffin_offload.formats.stacked import Fill, read_rows, row_parts

# Of what a token has made of use, so much remains behind the next one: the last 50 or so count.
FADING = 0.98
# Experts of a layer that the disk is asked for ahead of the one that is copied.
_READ_AHEAD = 4


class ExpertStore:
    """The experts of all streamed layers in their files; every byte that is read is counted."""

    def __init__(
        self, layers: dict[int, list[Tensor]], *, evict: bool, fills: Mapping[int, Fill] | None = None
    ) -> None:
        """`fills` are of the layers whose experts are not computed with as they are stored."""
        self._fills = fills or {}
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
        start, spans = time.perf_counter(), self._spans_of(layer, expert)
        self._pages.read(spans)
        self._fills.get(layer, read_rows)(self._layers[layer], expert, into)
        self._pages.files.check_contents()
        self._pages.drop(spans)
        self.fetched_bytes += self.expert_bytes(layer)
        self.reads += 1
        self.wait_s += time.perf_counter() - start

    def check_files(self) -> None:
        """CheckpointChanged unless the files are those that were mapped: to ask before a pass."""
        self._pages.files.check()

    def close(self) -> None:
        self._pages.close()

    def _spans_of(self, layer: int, expert: int) -> list[Span]:
        key = layer, expert
        if key not in self._spans:
            parts = [part for tensor in self._layers[layer] for part in row_parts(tensor, expert)]
            self._spans[key] = self._pages.spans(parts)
        return self._spans[key]


class PassingExperts:
    """`ExpertSource` of a layer of which none stays: they pass one by one through one buffer, as they are stored."""

    def __init__(self, layer: int, store: ExpertStore) -> None:
        self._layer, self._store = layer, store
        self._buffer: list[Tensor] = []
        self._waiting: list[int] = []

    def begin(self, experts: Sequence[int], index: Tensor, weights: Tensor) -> None:
        """The first are asked for."""
        self._waiting = list(experts)
        self._store.ask(self._layer, self._waiting[:_READ_AHEAD])
        if not self._buffer:
            full = self._store.tensors(self._layer)
            self._buffer = [torch.empty(t.shape[1:], dtype=t.dtype, device="cpu") for t in full]

    def tensors(self, expert: int) -> Sequence[Tensor]:
        """Those of `expert`, in the buffer."""
        self._waiting.remove(expert)
        self._store.ask(self._layer, self._waiting[_READ_AHEAD - 1 : _READ_AHEAD])
        self._store.read(self._layer, expert, self._buffer)
        return self._buffer

    def settle(self, chosen: Sequence[int]) -> None:
        """None stays, and the buffer goes."""
        self._buffer = []


class ExpertBuffers:
    """Places on the device for experts that have none in their layer: many while a prompt passes, one in decode."""

    def __init__(self) -> None:
        self._free: list[list[Tensor]] = []
        self._taken: list[list[Tensor]] = []
        self.peak_bytes = 0
        """Since `begin`."""

    def begin(self) -> None:
        self.peak_bytes = self.nbytes

    def take(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the shapes and on the device of `like`, until `give_back`."""
        shapes = [tensor.shape for tensor in like]
        place = next((i for i, free in enumerate(self._free) if [tensor.shape for tensor in free] == shapes), None)
        found = [torch.empty_like(tensor) for tensor in like] if place is None else self._free.pop(place)
        self._taken.append(found)
        self.peak_bytes = max(self.peak_bytes, self.nbytes)
        return found

    def give_back(self) -> None:
        """All that are taken may be used again."""
        self._free += self._taken
        self._taken = []

    def shrink(self) -> None:
        """Let go of all but one."""
        self.give_back()
        del self._free[1:]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for one in (*self._free, *self._taken) for tensor in one)


class ExpertCache:
    """The experts of one layer that are on the device, in places that never move: `ExpertSource` of its block.

    One that is missing is read; while routing is kept to residents (`restrict`), GriffinError: the router was to be
    kept from it.
    """

    def __init__(
        self,
        layer: int,
        store: ExpertStore,
        places: Sequence[Tensor],
        buffers: ExpertBuffers,
        experts: int,
    ) -> None:
        """`places` [N, ...] have room for N of `experts`."""
        self._layer, self._store, self._buffers, self._restricted = layer, store, buffers, False
        self._places = [[tensor.detach()[place] for tensor in places] for place in range(places[0].shape[0])]
        self._free = list(range(len(self._places)))
        self._place_of: dict[int, int] = {}
        self._held: dict[int, list[Tensor]] | None = None
        self._waiting: list[int] = []
        self._used = torch.zeros(experts, dtype=torch.float64, device="cpu")
        """How much of the routing went to each expert lately, in tokens."""
        self.hits = self.misses = 0
        """Experts that were there, and that were not, when tokens were decoded."""
        self.routing_kept: float | None = None
        """Share of the last prompt's routing weights that went to the experts that it chose."""
        self._routed = torch.zeros_like(self._used)
        self._resident = torch.zeros(experts, dtype=torch.bool, device=places[0].device)

    @property
    def residents(self) -> list[int]:
        """Numbers of the experts that are on the device."""
        return sorted(self._place_of)

    @property
    def restricted(self) -> bool:
        """Whether routing is kept to residents when tokens are decoded."""
        return self._restricted

    def restrict(self, on: bool) -> None:
        """Keep routing to residents from now on, or have what is missing read."""
        self._restricted = on
        self._note_residents()

    def allowed(self) -> Tensor | None:
        """Which experts a router may choose (booleans [E], on the device); None: all of them, also while a prompt
        passes."""
        return self._resident if self._restricted and self._held is None else None

    # Of a pass.

    def start_pass(self) -> list[Tensor]:
        """Until `end_pass` nothing that is read is given up. Returns all experts, as they lie."""
        self._held, self._routed = {}, torch.zeros_like(self._used)
        return self._store.tensors(self._layer)

    def settle(self, chosen: Sequence[int]) -> None:
        """Make `chosen` the residents, as far as they are there or tokens of this pass were sent to them. What no token
        needed is read only where nothing will be read later, routing being restricted."""
        held = self._held or {}
        total = float(self._routed.sum())
        self.routing_kept = float(self._routed[list(chosen)].sum()) / total if total else 1.0
        arriving = [expert for expert in chosen if expert in held]
        self._give_up(chosen, None if self._restricted else len(arriving))
        for expert in arriving:
            place = self._free[0]  # taken when it is full: an interrupt may come between
            for source, target in zip(held[expert], self._places[place], strict=True):
                target.copy_(source)
            self._place_of[expert] = self._free.pop(0)
        if self._restricted:
            self.place(chosen)
        self._note_residents()
        if total:
            self._used = self._routed / total / (1 - FADING)  # as if the prompt had gone on for ever

    def end_pass(self) -> None:
        """What was read and has not become resident is given up."""
        self._held = None
        self._buffers.give_back()

    def place(self, chosen: Sequence[int]) -> None:
        """Make `chosen` the residents, between prompts; those that are not there are read."""
        self._give_up(chosen, None)
        for expert in chosen:
            if expert not in self._place_of:
                self._read_into_place(expert, self._free.pop(0))
        self._note_residents()

    def _note_residents(self) -> None:
        self._resident.zero_()
        self._resident[self.residents] = True

    def _give_up(self, chosen: Sequence[int], room: int | None) -> None:
        """Free the places of residents that are not chosen: those of all, or until there is `room`."""
        others = sorted(set(self._place_of) - set(chosen), key=lambda expert: float(self._used[expert]))
        for expert in others:
            if room is not None and len(self._free) >= room:
                break
            self._free.append(self._place_of.pop(expert))

    # Of the layer's forward.

    def begin(self, experts: Sequence[int], index: Tensor, weights: Tensor) -> None:
        routed = _shares(index, weights, self._used.numel())
        missing = [expert for expert in experts if expert not in self._place_of]
        self._waiting = list(experts)
        if self._held is not None:
            self._routed += routed
            self._store.ask(self._layer, missing[:_READ_AHEAD])
            return
        if missing and self._restricted:
            raise GriffinError(
                f"layer {self._layer}: this model's router cannot be kept to residents, it chose {missing} beside "
                f"{self.residents}: load it with missing_experts='fetch', and without exact mode"
            )
        self._used = self._used * FADING ** index.shape[0] + routed
        self.misses += len(missing)
        self.hits += len(experts) - len(missing)
        self._store.ask(self._layer, missing)

    def tensors(self, expert: int) -> Sequence[Tensor]:
        self._waiting.remove(expert)
        if expert in self._place_of:
            return self._places[self._place_of[expert]]
        if self._held is not None:
            return self._pass_by(expert, self._held)
        place = self._place_for(expert)
        if place is not None:
            return self._read_into_place(expert, place)
        found = self._buffers.take(self._places[0])
        self._buffers.give_back()
        self._store.read(self._layer, expert, found)
        return found

    def _pass_by(self, expert: int, held: dict[int, list[Tensor]]) -> list[Tensor]:
        if expert not in held:
            ahead = [other for other in self._waiting if other not in self._place_of][_READ_AHEAD - 1 : _READ_AHEAD]
            self._store.ask(self._layer, ahead)
            found = self._buffers.take(self._places[0])
            self._store.read(self._layer, expert, found)
            held[expert] = found
        return held[expert]

    def _place_for(self, expert: int) -> int | None:
        """A free place, or that of the resident that was used least lately, if that was less; none that is waited
        for."""
        if self._free:
            return self._free.pop(0)
        others = [other for other in self._place_of if other not in self._waiting]
        if not others:
            return None
        least = min(others, key=lambda other: (float(self._used[other]), other))
        return self._place_of.pop(least) if self._used[least] < self._used[expert] else None

    def _read_into_place(self, expert: int, place: int) -> list[Tensor]:
        try:
            self._store.read(self._layer, expert, self._places[place])
        except BaseException:
            self._free.append(place)  # half of another expert is in it
            raise
        self._place_of[expert] = place
        return self._places[place]


def _shares(index: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Of the routing of some tokens [T, k], what went to each expert: float64 [E], one for each token in all."""
    size = weights.detach().cpu().abs().double()
    total = size.sum(-1, keepdim=True)
    share = size / torch.where(total > 0, total, 1)
    return torch.zeros(experts, dtype=torch.float64, device="cpu").index_add_(
        0, index.flatten().cpu(), share.flatten().cpu()
    )
