"""Experts of a layer that are on the device: in places of their layer, and in buffers that all layers share.

A prompt's pass reads every expert that a token is sent to, once, while earlier ones compute, and the best stay; where
there is less room than experts, those that the prompt's routing needs least are given up. While tokens are decoded
experts that are not there are read while those that are there compute: into the place of another one where it has been
of more use lately, else into a buffer. Buffers that nobody has take guesses of what the next layer will need; one that
was right becomes a place, and that place a buffer.

Where the CPU computes what is missing, the buffers of decoding are in host memory: nothing leaves them for the device,
and residents stay until the next prompt, but that a place which none has taken is read into. An expert that lies in a
mapped file as it is computed with needs no buffer, if the page cache has room for the model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from griffin_offload.errors import GriffinError
from griffin_offload.formats.expert_form import record_rows
from griffin_offload.offload.expert_buffers import ExpertBuffers, Place
from griffin_offload.offload.expert_store import READ_AHEAD, ExpertRead, ExpertStore

# Of what a token has made of use, so much remains behind the next one: the last 50 or so count.
FADING = 0.98


class ExpertCache:
    """The experts of one layer that are on the device: `ExpertSource` of its block.

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
        records = record_rows(places)
        self._places = [
            Place([tensor.detach()[i] for tensor in places], None if records is None else records[i], own=False)
            for i in range(places[0].shape[0])
        ]
        self._free = list(range(len(self._places)))
        self._place_of: dict[int, int] = {}
        self._held: dict[int, Place] | None = None
        self._waiting: list[int] = []
        self._reads: dict[int, tuple[ExpertRead, Place, int | None]] = {}
        """On their way, where to, and which of the layer's places they will have."""
        self._by_host = buffers.host is not None
        self._mapped = self._by_host and store.lies_as(layer, places)
        self.away: frozenset[int] = frozenset()
        """Of the experts that tokens were sent to last, those that the CPU computes."""
        self.there = 0
        """How many of them were residents, while no prompt passes."""
        self._used = torch.zeros(experts, dtype=torch.float64, device="cpu")
        """How much of the routing went to each expert lately, in tokens."""
        self.hits = self.misses = 0
        """Experts that were there, and that were not, when tokens were decoded."""
        self.guessed = 0
        """Of those that were not, those that were on their way before the router had chosen them."""
        self.computed_by_host = 0
        """Of those that were not, those that were read for the CPU to compute."""
        self.routing_kept: float | None = None
        """Share of the last prompt's routing weights that went to the experts that it chose."""
        self._routed = torch.zeros_like(self._used)
        self._resident = torch.zeros(experts, dtype=torch.bool, device=places[0].device)

    @property
    def residents(self) -> list[int]:
        """Numbers of the experts that are on the device."""
        return sorted(self._place_of)

    @property
    def keeps_choice(self) -> bool:
        """Whether residents stay those that a prompt has chosen."""
        return self._restricted or self._by_host

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
        self._buffers.of_tokens.drop_guesses(self._layer)
        self._held, self._routed = {}, torch.zeros_like(self._used)
        return self._store.tensors(self._layer)

    def settle(self, chosen: Sequence[int]) -> None:
        """Make `chosen` the residents, as far as they are there or tokens of this pass were sent to them. What no token
        needed is read only where nothing will be read later, routing being restricted."""
        held = self._held or {}
        total = float(self._routed.sum())
        self.routing_kept = float(self._routed[list(chosen)].sum()) / total if total else 1.0
        arriving = [expert for expert in chosen if expert in held]
        # What was given up for want of room: nothing would bring it back where the CPU computes what is missing.
        lost = [one for one in chosen if one not in held and one not in self._place_of and self._routed[one]]
        again = lost if self._by_host else []
        self._give_up(chosen, None if self._restricted else len(arriving) + len(again))
        for expert in arriving:
            place = self._free[0]  # taken when it is full: an interrupt may come between
            for source, target in zip(held[expert].tensors, self._places[place].tensors, strict=True):
                target.copy_(source)
            self._place_of[expert] = self._free.pop(0)
        if self._restricted:
            self.place(chosen)
        else:
            for expert in again:
                self._read_into_place(expert, self._free.pop(0))
        self._note_residents()
        if total:
            self._used = self._routed / total / (1 - FADING)  # as if the prompt had gone on for ever

    def end_pass(self) -> None:
        """What was read and has not become resident is given up."""
        self._abandon()
        self._held = None
        self._buffers.give_back()
        self._note_residents()

    def place(self, chosen: Sequence[int]) -> None:
        """Make `chosen` the residents, between prompts; those that are not there are read."""
        self._abandon()
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

    def begin(self, experts: Sequence[int], index: Tensor, weights: Tensor) -> Sequence[int]:
        self._abandon()  # of a forward that failed
        self.away, self.there = frozenset(), 0
        routed = _shares(index, weights, self._used.numel())
        missing = [expert for expert in experts if expert not in self._place_of]
        self._waiting = list(experts)
        if self._held is not None:
            self._routed += routed
            self._read_ahead(None)
            return experts
        if missing and self._restricted:
            raise GriffinError(
                f"layer {self._layer}: this model's router cannot be kept to residents, it chose {missing} beside "
                f"{self.residents}: load it with missing_experts='fetch', and without exact mode"
            )
        self._used = self._used * FADING ** index.shape[0] + routed
        self.misses += len(missing)
        self.there = len(experts) - len(missing)
        self.hits += self.there
        return [*(expert for expert in experts if expert not in missing), *self._fetch(missing)]

    def _fetch(self, missing: Sequence[int]) -> list[int]:
        """Have all of them read; those that were guessed come first, and what the CPU computes last."""
        buffers = self._buffers.of_tokens
        buffers.give_back()
        places = {expert: self._place_for(expert) for expert in missing}  # in an order that no guess changes
        self.away = frozenset(one for one in missing if places[one] is None) if self._by_host else frozenset()
        self.computed_by_host += len(self.away)
        buffers.drop_guesses(self._layer, [one for one in missing if one in self.away or not self._by_host])
        ahead = buffers.guessed(self._layer)
        for expert in ahead:
            self._reads[expert] = *buffers.claim(self._layer, expert), places[expert]
        self.guessed += len(ahead)
        others = [expert for expert in missing if expert not in ahead]
        for expert in others:
            place = places[expert]
            wants_buffer = place is None and not (self._mapped and expert in self.away)
            buffer = buffers.take(self._places[0], buffers.few) if wants_buffer else None
            if wants_buffer and buffer is None:
                self._store.ask(self._layer, [expert])
            else:
                self._start(expert, place, buffer)
        return sorted(ahead + others, key=self.away.__contains__)

    @property
    def may_guess(self) -> bool:
        """Whether a guess would be of use: a token is decoded, and what it misses is read."""
        wanted = not (self._restricted or self._mapped or (self._by_host and self._free))
        return self._held is None and wanted and self._buffers.of_tokens.guesses

    def guess(self, experts: Sequence[int]) -> None:
        """A token that is decoded will be sent to `experts`, probably: what of them is missing is read while nothing
        else is, as far as there are buffers. A better guess may follow."""
        missing = [expert for expert in experts if expert not in self._place_of]
        buffers = self._buffers.of_tokens
        buffers.drop_guesses(self._layer, missing, complete=False)
        known = buffers.guessed(self._layer)
        for expert in missing:
            if expert not in known and not buffers.guess(self._store, self._layer, expert, self._places[0]):
                break

    def tensors(self, expert: int) -> Sequence[Tensor]:
        return self._place(expert).tensors

    def checked(self, expert: int, dtype: torch.dtype, check: Callable[[Sequence[Tensor], torch.dtype], Any]) -> Any:
        """What `check` makes of a place, which is asked once."""
        place = self._place(expert)
        if dtype not in place.checked:
            place.checked[dtype] = check(place.tensors, dtype)
        return place.checked[dtype]

    def _place(self, expert: int) -> Place:
        self._waiting.remove(expert)
        if self._held is not None:
            found = self._found(expert, self._held)
            self._read_ahead(expert)
            return found
        if expert in self._place_of:
            return self._places[self._place_of[expert]]
        if expert not in self._reads:
            buffers = self._buffers.of_tokens
            buffers.give_back([into for _, into, _ in self._reads.values()])  # those of experts that have computed
            self._start(expert, None, buffers.take(self._places[0], buffers.few))
        return self._finish(expert)

    def _found(self, expert: int, held: dict[int, Place]) -> Place:
        """An expert while a prompt passes: resident, held, on its way, or not even that."""
        if expert in self._place_of:
            return self._places[self._place_of[expert]]
        if expert not in held:
            if expert not in self._reads:
                self._start(expert, *self._room_for(held, None, must=True))
            held[expert] = self._finish(expert)
            if expert in self._place_of:
                return held.pop(expert)
        return held[expert]

    def _read_ahead(self, computing: int | None) -> None:
        """Have readers begin with experts that will be asked for, as far as there is room beside the one that is
        `computing`."""
        held = self._held
        assert held is not None, "a pass is on"
        missing = [one for one in self._waiting if one not in self._place_of and one not in held]
        for expert in missing[:READ_AHEAD]:
            if expert in self._reads:
                continue
            place, buffer = self._room_for(held, computing, must=False)
            if place is None and buffer is None:
                self._store.ask(self._layer, [expert])
                return
            self._start(expert, place, buffer)

    def _room_for(
        self, held: dict[int, Place], computing: int | None, *, must: bool
    ) -> tuple[int | None, Place | None]:
        """A place or a buffer while a prompt passes: a free one, else that of what tokens of this prompt have needed
        least. Where all are needed still: neither, or with `must` that of one that will be read again."""
        if self._free:
            return self._free.pop(0), None
        buffer = self._buffers.take(self._places[0], self._buffers.limit)
        if buffer is not None:
            return None, buffer
        busy = {computing, *self._waiting}
        idle = [] if self._restricted else [one for one in self._place_of if not self._routed[one] and one not in busy]
        if idle:
            return self._place_of.pop(min(idle, key=lambda one: (float(self._used[one]), one))), None
        over = [one for one in held if one not in busy] or [*held] * must
        if not over:
            return None, None
        return None, held.pop(min(over, key=lambda one: (float(self._routed[one]), one)))

    def _place_for(self, expert: int) -> int | None:
        """A free place, or that of the resident that was used least lately, if that was less; none that is needed, and
        none where the CPU computes what is missing."""
        if self._free or self._by_host:
            return self._free.pop(0) if self._free else None
        others = [other for other in self._place_of if other not in self._waiting]
        if not others:
            return None
        least = min(others, key=lambda other: (float(self._used[other]), other))
        return self._place_of.pop(least) if self._used[least] < self._used[expert] else None

    def _start(self, expert: int, place: int | None, buffer: Place | None) -> None:
        """Have it read into a place or a buffer; without either it is mapped."""
        into = buffer if place is None else self._places[place]
        if into is None:
            assert self._mapped, "a place or a buffer"
            read = self._store.start_mapped(self._layer, expert)
            into = Place(list(read.into), own=False, host=True)
        else:
            read = self._store.start(self._layer, expert, into.tensors, into.record, host=into.host)
        into.read = read
        self._reads[expert] = read, into, place

    def _finish(self, expert: int) -> Place:
        """The expert, once it is there; in its place it is resident."""
        read, into, place = self._reads.pop(expert)
        try:
            self._store.finish(read)
        except BaseException:
            if place is not None:
                self._free.append(place)  # half of another expert is in it
            raise
        if place is not None:
            self._place_of[expert] = place
            if into is not self._places[place]:  # a guess
                self._buffers.exchange(into, self._places[place])
                self._places[place] = into
        return into

    def _abandon(self) -> None:
        """Wait for what nobody has asked for, and give it up."""
        for read, _, place in self._reads.values():
            read.done.exception()
            if place is not None:
                self._free.append(place)
        self._reads.clear()

    def _read_into_place(self, expert: int, place: int) -> None:
        self._start(expert, place, None)
        self._finish(expert)


def _shares(index: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Of the routing of some tokens [T, k], what went to each expert: float64 [E], one for each token in all."""
    size = weights.detach().cpu().abs().double()
    total = size.sum(-1, keepdim=True)
    share = size / torch.where(total > 0, total, 1)
    return torch.zeros(experts, dtype=torch.float64, device="cpu").index_add_(
        0, index.flatten().cpu(), share.flatten().cpu()
    )
