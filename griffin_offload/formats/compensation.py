"""Int4 whose rounding errors later inputs make up for: what convert does, where there is time for it.

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

from griffin_offload.formats.int4 import GROUP, Int4, pack, quantize_rows, steps_of

SHRINKING = 0.5
"""s. benchmarks/NOTES.md has what others gave."""
FLOOR = 0.5
"""Of the inputs' mean root mean square, squared: what an input counts that the page shows nothing of."""
_LEVELS = 15

_Search = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Of numbers [J, O] and the indices of their inputs: pairs of bytes, and steps and offsets that broadcast to [J, O]."""


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
    """Quantises matrices [O, I] whose inputs were X [T, I]; several that have the same inputs share one. Inputs of a
    down projection are neurons, and have no groups along them."""

    def __init__(self, x: Tensor, *, are_neurons: bool, shrinking: float = SHRINKING) -> None:
        x = x.float()
        squares = x.square().mean(0)
        self.importance = squares + FLOOR * squares.sqrt().mean().square()
        """Mean squares of the inputs [I], and the floor."""
        self._norms = torch.where(self.importance == 0, 1, self.importance * len(x)).sqrt()
        x = x / self._norms
        if x.shape[0] > x.shape[1]:
            x = torch.linalg.qr(x, mode="r").R  # fewer rows with the same moments
        self._blocks = list(_blocks(x, _order(self.importance, are_neurons), shrinking / (1 - shrinking)))

    def quantize_rows(self, weight: Tensor, scale: Tensor) -> Int4:
        """Codes [O, I / 2] and groups [O, I / 32, 2] of `weight` [O, I] over its rows' `scale` [O]."""
        ones = torch.ones_like(scale, dtype=torch.float32)

        def search(numbers: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            _, pairs = quantize_rows(numbers.t().contiguous(), ones, self.importance[inputs])
            return pairs, *steps_of(pairs[:, 0], torch.float32)

        codes = torch.empty(len(scale), weight.shape[1] // GROUP, GROUP // 2, dtype=torch.uint8, device=weight.device)
        groups = codes.new_empty(*codes.shape[:2], 2)
        for block, levels, pairs in self._rounded(weight, _divisor(scale), self._norms, search):
            group = int(block[0]) // GROUP
            codes[:, group], groups[:, group] = pack(levels.t()), pairs[:, 0]
        return codes.flatten(1), groups

    def quantize_neurons(self, columns: Tensor, scale: Tensor) -> Int4:
        """Codes [I, O / 2] and groups [I, O / 32, 2] of a down projection's `columns` [O, I] over their `scale` [I]."""
        divisor = _divisor(scale)

        def search(numbers: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            _, pairs = quantize_rows(numbers, torch.ones(len(numbers), device=numbers.device))
            step, offset = (part.repeat_interleave(GROUP, dim=1) for part in steps_of(pairs, torch.float32))
            return pairs, step, offset

        outputs, inputs = columns.shape
        codes = torch.empty(inputs, outputs // 2, dtype=torch.uint8, device=columns.device)
        groups = codes.new_empty(inputs, outputs // GROUP, 2)
        for block, levels, pairs in self._rounded(columns, divisor[:, None], self._norms * divisor, search):
            codes[block], groups[block] = pack(levels), pairs
        return codes, groups

    def _rounded(
        self, weight: Tensor, divisor: Tensor, units: Tensor, search: _Search
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Indices of inputs, levels [J, O] and pairs of each block of `weight` [O, I]. `divisor`, [O] or [I, 1], makes
        numbers of it, of which `units` [I] are as far as one of x."""
        missed = torch.zeros(len(self._blocks[0].x), weight.shape[0], device=weight.device)
        for block in self._blocks:
            numbers = weight[:, block.inputs].t().float()
            numbers = numbers / (divisor if divisor.dim() == 1 else divisor[block.inputs])
            own = units[block.inputs, None]
            numbers += block.x.t() @ missed / own
            pairs, step, offset = search(numbers, block.inputs)
            levels, left = _one_after_another(numbers, step, offset, block.inside * own / own.t())
            missed.addmm_(block.carry, left * own)
            yield block.inputs, levels, pairs


def _order(importance: Tensor, are_neurons: bool) -> Tensor:
    """What counts most first, while there are many to make up for it; whole groups where they run along the inputs."""
    if are_neurons:
        return importance.argsort(descending=True, stable=True)
    groups = importance.view(-1, GROUP).sum(1).argsort(descending=True, stable=True)
    return torch.arange(len(importance), device=importance.device).view(-1, GROUP)[groups].flatten()


def _blocks(x: Tensor, order: Tensor, a: float) -> Iterator[_Block]:
    """Of x [T, I], columns of length up to one, in `order` [I]."""
    rest = x.double() @ x.double().t()
    rest.diagonal().add_(a)
    inverse = torch.linalg.inv(rest)  # of S of all inputs that are not rounded yet
    for inputs in order.split(GROUP):
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


def _one_after_another(numbers: Tensor, step: Tensor, offset: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Levels uint8 [J, O] of `numbers` [J, O], and what they miss of what these were."""
    levels, now = torch.empty_like(numbers), numbers.clone()
    step, offset = step.expand_as(numbers), offset.expand_as(numbers)
    values = torch.empty_like(numbers)
    for j in range(len(numbers)):
        levels[j] = (now[j] / step[j] - offset[j]).round_().clamp_(0, _LEVELS)
        values[j] = (levels[j] + offset[j]) * step[j]
        now[j + 1 :].addr_(inside[j, j + 1 :], now[j] - values[j], alpha=-1)
    return levels.to(torch.uint8), numbers - values


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1, scale).float()
