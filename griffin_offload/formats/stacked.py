"""Experts that lie in files one by one, seen as the one tensor that the model has of all of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from griffin_offload.formats.translated import TranslatedTensor, stored_parts

Fill = Callable[[Sequence[Tensor], int, Sequence[Tensor]], None]
"""Called with (full, expert, into): write an expert of `full`, all experts of a layer as they are stored, into `into`,
its tensors."""


class StackedTensor(TranslatedTensor):
    """[E, ...]: row e is expert e, made of the parts from e * n on, n of them, one above the other. Nothing is merged
    until a row is read into its place."""


class JoinedTensor(StackedTensor):
    """One whose rows are their parts, copied one behind another."""


def stacked(shape: Sequence[int], dtype: torch.dtype, experts: Sequence[Sequence[Tensor]]) -> StackedTensor:
    """A tensor of `shape` whose rows are `experts`: of each the matrices that lie one above the other."""
    heights = [matrix.shape[0] for matrix in experts[0]]
    parts = [part for matrices in experts for matrix in matrices for part in stored_parts(matrix)]

    def decode(_: Sequence[Tensor], first: int, end: int, into: Tensor) -> None:
        for row in range(first, end):
            for matrix, place in zip(experts[row], into[row - first].split(heights), strict=True):
                place.copy_(matrix)

    as_they_lie = not any(isinstance(matrix, TranslatedTensor) for matrices in experts for matrix in matrices)
    return (JoinedTensor if as_they_lie else StackedTensor)(shape, dtype, parts, decode)


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
