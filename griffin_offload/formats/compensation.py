"""Rounding errors that later inputs make up for: all of them, as far as there is time.

Rounding to the nearest keeps weights, but it is products that count. Here one input of a matrix is rounded after
another, those first that count most, and what one misses of the products with inputs X [T, I] of a page of text is
taken out of the inputs that are not rounded yet (GPTQ: Frantar et al. 2022, arXiv:2210.17323, section 3). The format
stays as it is.

A page has fewer tokens than a matrix has inputs, so of the moments X^T X the diagonal is known best: they are shrunk
towards it, by the share s. Even so an input may be small on the page and large elsewhere: the diagonal has a floor.
With the columns x of X over its roots and a = s / (1 - s), a change d of weights in the same units errs by
|x d|^2 + a |d|^2. Moments [I, I] are never formed: what the inputs R behind a block make up for follows from
S = a + x_R x_R^T, [T, T], as (a + x_R^T x_R)^-1 x_R^T = x_R^T S^-1.

That is for convert. Where weights are quantised for every prompt X is one row, the leading component of all inputs:
then S is a number, and a few instructions a weight make up for most of what matters (`known_of`, `feedback`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHRINKING = 0.5
"""s. benchmarks/NOTES.md has what others gave."""
FLOOR = 0.5
"""Of the inputs' mean root mean square, squared: what an input counts that the page shows nothing of."""
BLOCK = 32
"""Inputs whose grids are chosen together."""
HUGE = 4.0
"""Times the median token's inputs, by their length. First tokens' are ten to five hundred times as large in some layers
of most models."""
_A = SHRINKING / (1 - SHRINKING)
_POWERS = 24

Packed = tuple[Tensor, Tensor]
"""Codes and groups."""
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
        x = _finite(x)
        self.importance = _counts(x.square().mean(0))
        """Mean squares of the inputs [I], and the floor."""
        self._norms = torch.where(self.importance == 0, 1, self.importance * len(x)).sqrt()
        x = x / self._norms
        if x.shape[0] > x.shape[1]:
            x = torch.linalg.qr(x, mode="r").R  # fewer rows with the same moments
        order = _order(self.importance, BLOCK if grouped else 1)
        self._blocks = list(_blocks(x, order, _A))

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


def known_of(x: Tensor) -> Tensor:
    """[3, I] of inputs X [T, I], all that `feedback` needs: what an error of each counts, the leading component of all,
    and what each takes of errors along it."""
    x = _finite(x)
    squares = x.square().mean(0)
    importance = _counts(squares)
    units = torch.where(importance == 0, 1, importance).sqrt()
    x = x / units
    leading = x[x.square().sum(1).argmax()]
    for _ in range(_POWERS):
        leading = torch.nn.functional.normalize((x @ leading) @ x, dim=0)
    leading = leading * (x @ leading).square().mean().sqrt() * units
    own = importance + (squares - leading.square()).clamp_(min=0) / _A
    return torch.stack([importance, leading, leading / torch.where(own == 0, 1, own)])


def has_huge_token(x: Tensor) -> bool:
    """Whether one of the inputs X [T, I] of a matrix is so much larger than most that all hangs on what a few
    weights make of it."""
    sizes = torch.linalg.vector_norm(_finite(x), dim=1)
    return bool(sizes.max() > HUGE * sizes.median())


def counts_of(known: Tensor | None) -> Tensor | None:
    """What errors of inputs count [I], of `known` as `known_of` has it, or that alone."""
    return known if known is None or known.dim() == 1 else known[0]


Fed = tuple[Tensor | None, Tensor | None]
"""[2, I]: what of the carried errors is added to each of the inputs, and what of its own error each adds to them behind
its block; and the order in which blocks pass, int32 [I / BLOCK]. Nothing where nothing is made up for."""


def feedback(known: Tensor | None, chunk: int | None = None) -> Fed:
    """Of what is `known` [3, I]. Blocks that count most pass first; those of a `chunk` of inputs stay together."""
    if known is None or known.dim() == 1:
        return None, None
    counts, leading, takes = known
    each = -(-(chunk or len(counts)) // BLOCK)
    parts = [part.argsort(descending=True, stable=True) for part in _by_blocks(counts).split(each)]
    order = torch.cat([part + i * each for i, part in enumerate(parts)]) if parts else counts.new_empty(0).long()
    sizes = _by_blocks((leading * takes).double())[order]
    behind = torch.empty_like(sizes)
    behind[order] = sizes.flip(0).cumsum(0).flip(0) - sizes
    rest = (_A + behind).float().repeat_interleave(BLOCK)[: len(leading)]
    return torch.stack([takes, leading / rest]), order.int()


def _by_blocks(x: Tensor) -> Tensor:
    """Sums of each block of x [I]."""
    return torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK).sum(1)


class Passing:
    """The `feedback` of inputs that come a chunk at a time, and what those before them missed."""

    def __init__(self, known: Tensor, chunk: int) -> None:
        """`known` [3, K], `chunk` a multiple of BLOCK."""
        self._fed, self._order = feedback(known, chunk)
        self._passed = 0
        self._carried: Tensor | None = None

    @classmethod
    def of(cls, known: Tensor | None, chosen: Tensor, chunk: int) -> "Passing | None":
        """Of inputs `chosen` [K] of all that are `known` [3, I]; None where they are not."""
        if known is None or known.dim() == 1:
            return None
        return cls(known.to(chosen.device).index_select(-1, chosen), chunk)

    def next(self, scale: Tensor, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
        """[2, J] and order of the next inputs, all of a chunk, whose numbers are over `scale` [J], none of which is 0;
        and what is carried, [O], to which theirs is to be added."""
        assert self._fed is not None
        assert self._order is not None
        start, self._passed = self._passed, self._passed + len(scale)
        takes, gives = self._fed[:, start : self._passed]
        order = self._order[start // BLOCK : -(-self._passed // BLOCK)] - start // BLOCK
        if self._carried is None:
            self._carried = self._fed.new_zeros(outputs)
        return torch.stack([takes / scale, gives * scale]), order, self._carried


def in_turns(
    numbers: Tensor,
    fed: Sequence[Tensor | None],
    packed: Callable[[Tensor, slice], Packed],
    unpack: Callable[..., Tensor],
    *,
    along: bool,
) -> Packed:
    """`numbers` [I, O] packed a block of inputs after the other, with what is `fed`, as `feedback` or `Passing.next`
    has it: `packed` is given rows, of the inputs in a slice, and `unpack` reads them. Rows run `along` the inputs, or
    each is one."""
    own, order, carried = (*fed, None)[:3]
    assert own is not None
    assert order is not None
    carried, found = numbers.new_zeros(numbers.shape[1]) if carried is None else carried, {}
    for place in order.tolist():
        part = slice(place * BLOCK, (place + 1) * BLOCK)
        takes, gives = own[:, part]
        block = numbers[part] + takes[:, None] * carried
        rows = block.t().contiguous() if along else block
        found[place] = packed(rows, part)
        missed = rows - unpack(*found[place], torch.empty_like(rows))
        carried += gives @ (missed.t() if along else missed)
    ordered = [found[place] for place in sorted(found)]
    codes, groups = (torch.cat(parts, dim=int(along)) for parts in zip(*ordered, strict=True))
    return codes, groups


def _finite(x: Tensor) -> Tensor:
    x = x.float()
    x = x[x.isfinite().all(1)]  # a token whose states are no numbers says nothing
    return x if len(x) else x.new_zeros(1, x.shape[1])


def _counts(squares: Tensor) -> Tensor:
    return squares + FLOOR * squares.sqrt().mean().square()


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
