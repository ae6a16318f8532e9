"""Rounding errors that later inputs make up for: what convert does, where there is time for it.

Rounding to the nearest keeps weights, but it is products that count. Here one input of a matrix is rounded after
another, those first that count most, and what one misses of the products with inputs X [T, I] of a page of text is
taken out of the inputs that are not rounded yet (GPTQ: Frantar et al. 2022, arXiv:2210.17323, section 3). The format
stays as it is.

A page has fewer tokens than a matrix has inputs, so of the moments X^T X the diagonal is known best: they are shrunk
towards it, by the share s. Even so an input may be small on the page and large elsewhere: the diagonal has a floor.
With the columns x of X over its roots and a = s / (1 - s), a change d of weights in the same units errs by
|x d|^2 + a |d|^2. Moments [I, I] are never formed: what the inputs R behind a block make up for follows from
S = a + x_R x_R^T, [T, T], as (a + x_R^T x_R)^-1 x_R^T = x_R^T S^-1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SHRINKING = 0.5
"""s. benchmarks/NOTES.md has what others gave."""
FLOOR = 0.5
"""Of the inputs' mean root mean square, squared: what an input counts that the page shows nothing of."""
BLOCK = 32
"""Inputs whose grids are chosen together."""

Grids = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Steps and offsets, which broadcast to [J, O], of the levels that numbers [J, O] of the inputs [J] can have: a number
is step * (level + offset)."""


@dataclass(frozen=True)
class _Block:
    """J inputs that are rounded before what they missed is carried on; x has T rows."""

    inputs: Tensor
    """Their indices, int64 [J]."""
    x: Tensor
    """float32 [T, J], columns of length up to one."""
    carry: Tensor
    """float32 [T, J]: times what was missed, times x of later inputs, it is what these make up for."""
    inside: Tensor
    """float32 [J, J]: in row j what one missed of input j is for those behind it in the block."""


class Compensation:
    """Rounds matrices [O, I] whose inputs were X [T, I]; several that have the same inputs share one. Where groups of
    32 numbers run along the inputs, `grouped`, they stay together."""

    def __init__(self, x: Tensor, *, grouped: bool) -> None:
        x = x.float()
        x = x[x.isfinite().all(1)]  # a token whose states are no numbers says nothing
        x = x if len(x) else x.new_zeros(1, x.shape[1])
        squares = x.square().mean(0)
        self.importance = squares + FLOOR * squares.sqrt().mean().square()
        """Mean squares of the inputs [I], and the floor."""
        self._norms = torch.where(self.importance == 0, 1, self.importance * len(x)).sqrt()
        x = x / self._norms
        if x.shape[0] > x.shape[1]:
            x = torch.linalg.qr(x, mode="r").R  # fewer rows with the same moments
        order = _order(self.importance, BLOCK if grouped else 1)
        self._blocks = list(_blocks(x, order, SHRINKING / (1 - SHRINKING)))

    def rounded(
        self, weight: Tensor, row_scale: Tensor | None, input_scale: Tensor | None, highest: int, grids: Grids
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices of inputs [J] and levels uint8 [J, O], 0 to `highest`, of each block of `weight` [O, I] over the
        scales [O] or [I], none of which is 0."""
        units = self._norms if input_scale is None else self._norms * input_scale
        missed = torch.zeros(len(self._blocks[0].x), weight.shape[0], dtype=torch.float32, device=weight.device)
        for block in self._blocks:
            numbers = weight[:, block.inputs].t().float()
            if row_scale is not None:
                numbers = numbers / row_scale
            if input_scale is not None:
                numbers = numbers / input_scale[block.inputs, None]
            own = units[block.inputs, None]
            numbers = numbers + block.x.t() @ missed / own
            step, offset = grids(numbers, block.inputs)
            levels, left = _one_after_another(numbers, step, offset, highest, block.inside * own / own.t())
            missed.addmm_(block.carry, left * own)
            yield block.inputs, levels


def _order(importance: Tensor, group: int) -> Tensor:
    """What counts most first, while there are many to make up for it; whole groups."""
    groups = importance.view(-1, group).sum(1).argsort(descending=True, stable=True)
    order = torch.arange(len(importance), dtype=torch.int64, device=importance.device)
    return order.view(-1, group)[groups].flatten()


def _blocks(x: Tensor, order: Tensor, a: float) -> Iterator[_Block]:
    """Of x [T, I], columns of length up to one, in `order` [I]."""
    rest = x.double() @ x.double().t()
    rest.diagonal().add_(a)
    inverse = torch.linalg.inv(rest)  # of S of all inputs that are not rounded yet
    for inputs in order.split(BLOCK):
        own = x[:, inputs]
        part = own.double()
        seen = inverse @ part
        # The inverse of the block's own moments, behind which the rest makes up for what it can.
        left = torch.eye(part.shape[1], dtype=torch.float64, device=x.device) - part.t() @ seen
        carry = torch.linalg.solve(left, seen, left=False)
        inverse.addmm_(carry, seen.t())
        upper = torch.linalg.cholesky(left, upper=True)
        inside = upper / upper.diagonal()[:, None]
        yield _Block(inputs, own, carry.float(), inside.float())


def _one_after_another(
    numbers: Tensor, step: Tensor, offset: Tensor, highest: int, inside: Tensor
) -> tuple[Tensor, Tensor]:
    """Levels uint8 [J, O] of `numbers` [J, O], and what they miss of what these were."""
    levels, now = torch.empty_like(numbers), numbers.clone()
    step, offset = step.expand_as(numbers), offset.expand_as(numbers)
    values = torch.empty_like(numbers)
    for j in range(len(numbers)):
        levels[j] = (now[j] / step[j] - offset[j]).round_().clamp_(0, highest)
        values[j] = (levels[j] + offset[j]) * step[j]
        now[j + 1 :].addr_(inside[j, j + 1 :], now[j] - values[j], alpha=-1)
    return levels.to(torch.uint8), numbers - values
