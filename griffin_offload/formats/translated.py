"""Tensors that lie in files in a form nothing here multiplies: translated where they are used, a few rows at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Decode = Callable[[Sequence[Tensor], int, int, Tensor], None]
"""Called with (parts, first, end, into): write the rows from `first` to `end`, of the first axis, into `into`, of their
shape and the tensor's type. The parts are uint8 tensors, the stored bytes as they lie; they may not be written to.
Called by several threads at once."""
Fill = Callable[[Sequence[Tensor], int, Sequence[Tensor]], None]
"""Called with (full, expert, into): write an expert of `full`, all experts of a layer as they are stored, into `into`,
its tensors."""


class Codes(NamedTuple):
    """Rows of a matrix whose stored numbers lie on grids of 16 levels, each 32 inputs on their own."""

    packed: Tensor
    """uint8 [R, I / 2]: of each 32 numbers 16 bytes, of which byte b has number b (low) and b + 16 (high)."""
    steps: Tensor
    """float32 [R, I / 32], below 0 where codes count downwards."""
    lowest: Tensor
    """What code 0 stands for, likewise."""

    def numbers(self) -> Tensor:
        """float32 [R, I]."""
        groups = self.packed.view(*self.steps.shape, -1)
        codes = torch.cat([groups & 15, groups >> 4], dim=-1)
        return (codes * self.steps[..., None] + self.lowest[..., None]).flatten(1)

    @classmethod
    def above_each_other(cls, matrices: Sequence["Codes | None"]) -> "Codes | None":
        """Those of several matrices as one; None where one has none."""
        known = [codes for codes in matrices if codes is not None]
        return None if len(known) < len(matrices) else cls(*map(torch.cat, zip(*known, strict=True)))


_aten = torch.ops.aten
# Numbers of a tensor that are translated at once, where they need not stay.
_PIECE_NUMBERS = 2**22
_MATRICES = 3  # axes of several in one tensor
_SPAN = 4  # times as many rows as are wanted: calls cost more than those


class TranslatedTensor(Tensor):
    """A tensor on the CPU without numbers of its own: `parts` and `decode` say how they come about.

    Copying it, to any precision and device, and looking rows up translates what is needed; whatever else is done with
    it translates all of it once for that. It goes where a view of a mapped file goes: into a parameter, into a layer's
    list of full tensors. Kernels that take an address need `in_memory` first.
    """

    parts: tuple[Tensor, ...]
    decode: Decode

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, parts: Sequence[Tensor], decode: Decode
    ) -> "TranslatedTensor":
        made: TranslatedTensor = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=torch.device("cpu")
        )
        made.parts, made.decode = tuple(parts), decode
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"TranslatedTensor({list(self.shape)}, {self.dtype}, of {self.stored_bytes} bytes)"

    @property
    def stored_bytes(self) -> int:
        """Bytes in the files."""
        return sum(part.nbytes for part in self.parts)

    def codes(self, rows: Tensor | None = None) -> Codes | None:
        """Of a matrix whose stored numbers lie on grids of 16 levels, some `rows` or all; None of others."""
        if not on_grids(self.decode):
            return None
        every = torch.arange(self.shape[0], dtype=torch.long, device="cpu") if rows is None else rows.to("cpu")
        found: Codes | None = cast(Any, self.decode).coded(self.parts, self.shape[0], every)
        return found

    def rows(self, first: int, end: int, into: Tensor) -> None:
        """Translate rows of the first axis into `into`, of their shape, in any precision and on any device."""
        if into.dtype == self.dtype and into.device.type == "cpu" and into.is_contiguous():
            self.decode(self.parts, first, end, into)
            return
        made = torch.empty(into.shape, dtype=self.dtype, device="cpu")
        self.decode(self.parts, first, end, made)
        into.copy_(made)

    def read(self, into: Tensor) -> None:
        """Translate all of it into `into`, a part at a time."""
        step = max(_PIECE_NUMBERS * max(self.shape[0], 1) // max(self.numel(), 1), 1)
        for first in range(0, self.shape[0], step):
            end = min(first + step, self.shape[0])
            self.rows(first, end, into[first:end])

    def translated(self) -> Tensor:
        """All of it, in memory."""
        made = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        self.read(made)
        return made

    def looked_up(self, indices: Tensor) -> Tensor:
        """Rows [..., *] of `indices` [...]: each is translated once."""
        indices = indices.to("cpu")
        wanted, places = indices.unique(return_inverse=True)
        made = self._sorted_rows(wanted.tolist())
        return made if torch.equal(wanted, indices) else made[places]

    def _sorted_rows(self, wanted: list[int]) -> Tensor:
        """By one call where the rows between them are not many more, else by one for each."""
        first, rows = min(wanted, default=0), len(wanted)
        span = max(wanted, default=-1) + 1 - first
        at_once = span <= _SPAN * rows
        made = torch.empty((span if at_once else rows, *self.shape[1:]), dtype=self.dtype, device="cpu")
        if at_once:
            self.rows(first, first + span, made)
            return made if span == rows else made[[row - first for row in wanted]]
        for place, row in enumerate(wanted):
            self.rows(row, row + 1, made[place : place + 1])
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first = args[0]
        if func in (_aten.detach.default, _aten.alias.default):
            return cls(first.shape, first.dtype, first.parts, first.decode)
        if func is _aten.embedding.default and not isinstance(args[1], cls):
            return first.looked_up(args[1])
        if func is _aten.index_select.default and args[1] == 0 and not isinstance(args[2], cls):
            return first.looked_up(args[2])
        if func is _aten.copy_.default and args[1].shape == first.shape and not isinstance(first, cls):
            args[1].read(first)
            return first
        plain_args, plain_kwargs = tree_map_only(cls, lambda tensor: tensor.translated(), (args, kwargs or {}))
        return func(*plain_args, **plain_kwargs)


def on_grids(decode: Decode | None) -> bool:
    """Whether numbers that are made so may lie on grids of 16 levels."""
    return bool(getattr(decode, "on_grids", False))


def in_memory(tensor: Tensor) -> Tensor:
    """`tensor` itself, or its numbers in memory where it has to be translated."""
    return tensor.translated() if isinstance(tensor, TranslatedTensor) else tensor


def stored_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """What of `tensor` lies in files."""
    return tensor.parts if isinstance(tensor, TranslatedTensor) else (tensor,)


def stored_bytes(tensor: Tensor) -> int:
    """How many bytes of it lie there."""
    return sum(part.nbytes for part in stored_parts(tensor))


# Experts that lie in files one by one, seen as the one tensor that the model has of all of them.


class StackedTensor(TranslatedTensor):
    """[E, ...]: row e is expert e, made of the parts from e * n on, n of them, one above the other. Nothing is merged
    until a row is read into its place."""

    def codes_of(self, expert: int) -> Codes | None:
        """Of a matrix [O, I] that an expert is, where its numbers lie on grids of 16 levels."""
        find = getattr(self.decode, "codes_of", None)
        found: Codes | None = None
        if find is not None and self.dim() == _MATRICES:
            found = find(self.parts, expert, self.shape[1])
        return found


class JoinedTensor(StackedTensor):
    """One whose rows are their parts, copied one behind another."""


def stacked(shape: Sequence[int], dtype: torch.dtype, experts: Sequence[Sequence[Tensor]]) -> StackedTensor:
    """A tensor of `shape` whose rows are `experts`: of each the matrices that lie one above the other."""
    parts = [part for matrices in experts for matrix in matrices for part in stored_parts(matrix)]
    as_they_lie = not any(isinstance(matrix, TranslatedTensor) for matrices in experts for matrix in matrices)
    return (JoinedTensor if as_they_lie else StackedTensor)(shape, dtype, parts, _Stack(experts))


class _Stack:
    """The `decode` of one."""

    def __init__(self, experts: Sequence[Sequence[Tensor]]) -> None:
        self._experts = experts

    def __call__(self, parts: Sequence[Tensor], first: int, end: int, into: Tensor) -> None:
        for row in range(first, end):
            heights = [matrix.shape[0] for matrix in self._experts[row]]
            for matrix, place in zip(self._experts[row], into[row - first].split(heights), strict=True):
                place.copy_(matrix)

    def codes_of(self, parts: Sequence[Tensor], expert: int, outputs: int) -> Codes | None:
        """As the tensor's."""
        own = self._experts[expert]
        return Codes.above_each_other([m.codes() if isinstance(m, TranslatedTensor) else None for m in own])


@dataclass(frozen=True)
class EachExpert:
    """Matrices of experts, [E, O, I]: each is decoded from `count` parts of its own. The `decode` of
    a StackedTensor, as `_Stack`."""

    decode: Decode
    count: int

    def __call__(self, parts: Sequence[Tensor], first: int, end: int, into: Tensor) -> None:
        for expert in range(first, end):
            first_part = expert * self.count
            self.decode(parts[first_part : first_part + self.count], 0, into.shape[1], into[expert - first])

    def codes_of(self, parts: Sequence[Tensor], expert: int, outputs: int) -> Codes | None:
        """As the tensor's."""
        if not on_grids(self.decode):
            return None
        own = parts[expert * self.count : (expert + 1) * self.count]
        rows = torch.arange(outputs, dtype=torch.long, device="cpu")
        found: Codes | None = cast(Any, self.decode).coded(own, outputs, rows)
        return found


def row_parts(tensor: Tensor, row: int) -> tuple[Tensor, ...]:
    """What of the files row `row` of `tensor` is made of."""
    if isinstance(tensor, StackedTensor):
        count = len(tensor.parts) // tensor.shape[0]
        return tensor.parts[row * count : (row + 1) * count]
    return tensor.parts if isinstance(tensor, TranslatedTensor) else (tensor[row],)


def copied_parts(tensor: Tensor, row: int) -> tuple[Tensor, ...] | None:
    """The same where row `row` is these parts, copied one behind another; None where it has to be made of them."""
    made = isinstance(tensor, TranslatedTensor) and not isinstance(tensor, JoinedTensor)
    return None if made else row_parts(tensor, row)


@torch.no_grad()
def read_row(tensor: Tensor, row: int, into: Tensor) -> None:
    """Write row `row` of `tensor` into `into`, in the precision and on the device of that."""
    if isinstance(tensor, TranslatedTensor):
        tensor.rows(row, row + 1, into[None])
    else:
        into.copy_(tensor[row])


def read_rows(full: Sequence[Tensor], expert: int, into: Sequence[Tensor]) -> None:
    """The `Fill` of experts that are computed with as they are stored."""
    for tensor, target in zip(full, into, strict=True):
        read_row(tensor, expert, target)
