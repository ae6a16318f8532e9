"""What experts give the tokens that were sent to them: computed where these are, or by the CPU for a device.

The CPU computes in the format that an expert rests in: hidden states travel, and no weights. They are copied down once,
before the device has work of its own; while that computes its residents the CPU multiplies, and what each expert gives
comes back in one copy. There it is weighted and added like what the device has computed itself.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from griffin_offload.devices.base import Device
from griffin_offload.kernels.by_blocks import Scratch


class ExpertSource(Protocol):
    """Where the tensors of experts are while tokens pass."""

    def begin(self, experts: Sequence[int], index: Tensor, weights: Tensor) -> Sequence[int]:
        """Tokens were sent to `experts` (rising numbers), by `index` and `weights` [T, k]. Returns them in the order in
        which they will be there."""

    @property
    def there(self) -> int:
        """So many of these experts, the first ones in that order, are there now, and stay until all were asked for."""

    @property
    def away(self) -> Collection[int]:
        """Of these experts, the last ones in that order, those whose tensors are the CPU's, which computes them."""

    def tensors(self, expert: int) -> Sequence[Tensor]:
        """Those of one of `experts`, in that order; of all but the first ones valid until the next one is asked for."""

    def checked(self, expert: int, dtype: torch.dtype, check: Callable[[Sequence[Tensor], torch.dtype], Any]) -> Any:
        """In place of `tensors`, what `check` makes of them for a type: it is asked once while they lie there."""

    def settle(self, chosen: Sequence[int]) -> None:
        """Of the experts that were handed out since the pass began, keep those that were `chosen`."""


class Multiplies(Protocol):
    """What is asked of an `ExpertForm` here, which says how experts are multiplied."""

    @property
    def matrices(self) -> Sequence[Any]: ...

    def by_matrix(self, tensors: Sequence[Tensor]) -> Mapping[str, Any]: ...

    def multiply(self, x: Tensor, matrix: Any, tensors: Any) -> Tensor: ...

    def at_once(self, x: Tensor) -> Any: ...

    def checked(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Any: ...


class HostExperts:
    """What all layers of a model, which never compute at the same time, have in host memory for that."""

    def __init__(self, device: Device, scratch: Scratch) -> None:
        """`scratch` is what the CPU multiplies through."""
        self._device, self.scratch = device, scratch
        self._given = self._found = torch.empty(0, dtype=torch.uint8, device="cpu")

    def down(self, hidden: Tensor) -> Tensor:
        """A copy of hidden states [T, H], valid until the next one; waits until the device has them."""
        self._given, copy = self._room(self._given, hidden)
        return copy.copy_(hidden)

    def up(self, found: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What experts give, [M, H] each, on the device: nobody waits for it."""
        joined = torch.cat(list(found))
        # The copy before this one is over: the router's choice came behind it, and that was waited for.
        self._found, source = self._room(self._found, joined)
        source.copy_(joined)
        target = torch.empty(joined.shape, dtype=joined.dtype, device=self._device.torch_device)
        target.copy_(source, non_blocking=self._device.asynchronous_copies)
        parts: tuple[Tensor, ...] = target.split([own.shape[0] for own in found])
        return parts

    def _room(self, buffer: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """`buffer`, or a larger one, pinned where the device copies from that; and in it a tensor like another one."""
        if buffer.numel() < like.nbytes and self._device.asynchronous_copies:
            buffer = self._device.pinned(like.nbytes)
        elif buffer.numel() < like.nbytes:
            buffer = torch.empty(like.nbytes, dtype=torch.uint8, device="cpu")
        return buffer, buffer[: like.nbytes].view(like.dtype).view(like.shape)


FEW = 8
"""Up to so many tokens are multiplied at once by all of their experts that are there."""
Part = tuple[Tensor, Tensor, Tensor]
"""Tokens [M], by which of their choices [M] an expert was to have them, and what it gives them [M, H], without weights
and norm."""


class ExpertCall:
    """One call of a module of experts, with hidden states [T, H], the experts chosen [T, k] and their weights."""

    def __init__(
        self,
        module: Any,
        form: Multiplies,
        given: tuple[Tensor, Tensor, Tensor],
        rows: list[list[int]],
        limit: int | None,
    ) -> None:
        """`rows` are the experts chosen, in numbers; at most `limit` tokens are multiplied at once."""
        self._module, self._form, self._rows, self._limit = module, form, rows, limit
        self._hidden, self._index, self._weights = given
        self._weighs_inputs = bool(getattr(module, "weighs_inputs", False))  # Llama 4

    def outputs(self, source: ExpertSource, beside: tuple[HostExperts, Multiplies] | None) -> Iterator[Part]:
        """What experts give, in parts, in the order of their numbers, whichever is there first: sums do not depend on
        that. `beside` is what the CPU computes with, and how."""
        experts = sorted({expert for row in self._rows for expert in row})
        order = source.begin(experts, self._index, self._weights)
        if 0 < len(self._rows) <= min(FEW, self._limit or FEW) and not source.away:
            pairs = sorted((expert, t, c) for t, row in enumerate(self._rows) for c, expert in enumerate(row))
            token, choice = (self._index.new_tensor([pair[i] for pair in pairs]) for i in (1, 2))
            x = self._inputs(token, choice)
            several = self._form.at_once(x)
            if several is not None:
                yield token, choice, self._at_once(x, [pair[0] for pair in pairs], order, source, several)
                return
        waiting, early = list(experts), dict[int, list[Part]]()
        for expert, parts in self._one_by_one(order, source, beside):
            if expert != waiting[0]:
                early[expert] = list(parts)
                continue
            yield from parts
            waiting.pop(0)
            while waiting and waiting[0] in early:
                yield from early.pop(waiting.pop(0))

    def _inputs(self, token: Tensor, choice: Tensor) -> Tensor:
        """What experts are given: of one token, itself."""
        x = self._hidden if len(self._rows) == 1 else self._hidden[token]
        return x * self._weights[token, choice, None] if self._weighs_inputs else x

    def _at_once(self, x: Tensor, sent: list[int], order: Sequence[int], source: ExpertSource, several: Any) -> Tensor:
        """What experts give the tokens they were `sent`, [P, H], by one call for each matrix of all experts that are
        there. x is of all of these tokens, or one row for all."""
        (multiply, multiply_down), check = several, self._form.checked
        first: dict[int, int] = {}
        for place, expert in enumerate(sent):
            first.setdefault(expert, place)
        groups = [order[: source.there], *([expert] for expert in order[source.there :])]
        found, arrived = [], list[int]()
        for group in groups:
            matrices = [source.checked(expert, x.dtype, check) for expert in group]
            if not matrices:
                continue
            counts = [sent.count(expert) for expert in group]
            rows = (
                [(0, 1) for _ in group]
                if x.shape[0] == 1
                else [(first[e], n) for e, n in zip(group, counts, strict=True)]
            )
            inner = self._gated(multiply(x, [own[0] for own in matrices], rows))
            ends = itertools.accumulate(counts, initial=0)
            found.append(multiply_down(inner, [own[1] for own in matrices], list(zip(ends, counts, strict=False))))
            arrived += [first[expert] + i for expert, count in zip(group, counts, strict=True) for i in range(count)]
        given: Tensor = found[0] if len(found) == 1 else torch.cat(found)
        return given if len(found) == 1 else given[torch.tensor(arrived, dtype=torch.long, device="cpu").argsort()]

    def _gated(self, inner: Tensor) -> Tensor:
        found: Tensor = self._module._apply_gate(inner) if self._module.has_gate else self._module.act_fn(inner)
        return found

    def _one_by_one(
        self, order: Sequence[int], source: ExpertSource, beside: tuple[HostExperts, Multiplies] | None
    ) -> Iterator[tuple[int, Iterable[Part]]]:
        """Of each expert, in the order in which they are there, what it gives, in parts."""
        away = [expert for expert in order if expert in source.away]
        if not away:
            for expert in order:
                yield expert, self._parts(expert, source, self._sent(expert))
            return
        assert beside is not None, "somebody computes what is away"
        host, form = beside
        # What waits for the device comes first.
        sent = {expert: list(self._sent(expert)) for expert in order}
        there = self._on_host(host, form)
        for expert in order[: -len(away)]:
            yield expert, self._parts(expert, source, sent[expert])
        found = [part[2] for expert in away for part in there._parts(expert, source, there._sent(expert))]
        for expert, output in zip(away, host.up(found), strict=True):
            ((token, choice),) = sent[expert]  # no prompt passes, so nothing is in parts
            yield expert, [(token, choice, output)]

    def _on_host(self, host: HostExperts, form: Multiplies) -> "ExpertCall":
        weights = self._weights.cpu() if self._weighs_inputs else self._weights
        index = torch.tensor(self._rows, dtype=torch.long, device="cpu")
        given = host.down(self._hidden), index, weights
        return ExpertCall(self._module, form, given, self._rows, None)

    def _parts(self, expert: int, source: ExpertSource, sent: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Part]:
        tensors = self._form.by_matrix(source.tensors(expert))
        first, down = self._form.matrices
        for token, choice in sent:
            inner = self._gated(self._form.multiply(self._inputs(token, choice), first, tensors[first.name]))
            yield token, choice, self._form.multiply(inner, down, tensors[down.name])

    def _sent(self, expert: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Which tokens were sent to `expert`, and by which of their choices; at most `limit` at once."""
        if len(self._rows) == 1:  # one that is decoded: nothing has to be looked for
            return [(self._index.new_zeros(1), self._index.new_full((1,), self._rows[0].index(expert)))]
        places = torch.where(self._index == expert)
        limit = self._limit or places[0].numel()
        return zip(*(found.split(limit) for found in places), strict=True)
