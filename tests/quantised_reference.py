"""Quantised matrices written again from their formulas, in float64 and independently of the package.

Matrices are [O, I]. What a number is before it is rounded is its quotient: the distance from level 0, in levels.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from reference import dense_generate, masked_after_prefill
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

GROUP = 32
# The steps, for numbers of norm 1, among which the int4 format chooses each row of a down projection's.
STEPS = (0.34, 0.28, 0.30, 0.32, 0.37, 0.40, 0.45)


@dataclass(frozen=True)
class Quantised:
    """A matrix on its grid: number = origin + level * step."""

    quotient: Tensor
    origin: Tensor
    step: Tensor
    lowest: int
    highest: int

    @property
    def levels(self) -> Tensor:
        return self.quotient.round().clamp(self.lowest, self.highest)

    def at(self, levels: Tensor) -> Tensor:
        """The numbers that `levels` stand for."""
        return self.origin + levels.double() * self.step

    @property
    def values(self) -> Tensor:
        return self.at(self.levels)

    @property
    def nearest_tie(self) -> Tensor:
        """How far each quotient is from being rounded the other way."""
        inside = (self.quotient > self.lowest - 1) & (self.quotient < self.highest + 1)
        return torch.where(inside, (self.quotient - self.quotient.floor() - 0.5).abs(), 1.0)


def divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale.double())


def int8_scale(weight: Tensor, input_scale: Tensor | None = None) -> Tensor:
    """[O]: the largest of each row is level 127."""
    columns = torch.ones(weight.shape[1]) if input_scale is None else input_scale
    return (weight.double() / divisor(columns)).abs().amax(1) / 127


def int8(weight: Tensor, scale: Tensor, input_scale: Tensor | None = None) -> Quantised:
    columns = torch.ones(weight.shape[1]) if input_scale is None else input_scale
    quotient = weight.double() / divisor(columns) / divisor(scale)[:, None]
    step = scale.double()[:, None] * columns.double()
    return Quantised(quotient, torch.zeros_like(step), step, -127, 127)


def neuron_scale(down: Tensor) -> Tensor:
    """[I]: root mean square of every neuron's column."""
    return torch.stack([column.square().mean().sqrt() for column in down.double().unbind(1)])


def int4_rows_scale(weight: Tensor) -> Tensor:
    """[O, I / 32]: sixteen levels from the smallest to the largest of a group."""
    groups = weight.double().view(weight.shape[0], -1, GROUP)
    return (groups.amax(2) - groups.amin(2)) / 15


def int4_rows_offset(weight: Tensor, scale: Tensor) -> Tensor:
    """[O, I / 32], the number that level 8 stands for: with levels 0 to 15 the group's middle is level 7.5."""
    groups = weight.double().view(weight.shape[0], -1, GROUP)
    return (groups.amax(2) + groups.amin(2)) / 2 + scale.double() / 2


def int4_rows(weight: Tensor, scale: Tensor, offset: Tensor) -> Quantised:
    step, middle = (t.double().repeat_interleave(GROUP, dim=1) for t in (scale, offset))
    return Quantised((weight.double() - middle) / divisor(step) + 8, middle - 8 * step, step, 0, 15)


def int4_neurons(down: Tensor, scale: Tensor, input_scale: Tensor) -> Quantised:
    step = scale.double()[:, None] * input_scale.double()
    quotient = down.double() / divisor(input_scale) / divisor(scale)[:, None] + 7.5
    return Quantised(quotient, -7.5 * step, step, 0, 15)


def int4_scales(down: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Every candidate for the down projection's scale [S, O], and how far each row is from its grid, squared [S, O]."""
    rows = down.double() / divisor(input_scale)
    norms = rows.square().mean(1).sqrt()
    candidates = torch.stack([norms * step for step in STEPS])
    ones = torch.ones(down.shape[1])
    errors = [(int4_neurons(rows, scale, ones).values - rows).square().sum(1) for scale in candidates]
    return candidates, torch.stack(errors)


def quantised(weight: Tensor, precision: str, dtype: torch.dtype, *, is_down: bool) -> Quantised:
    """`weight` with scales in `dtype`, by the formulas above."""
    if not is_down:
        if precision == "int8":
            return int8(weight, int8_scale(weight).to(dtype))
        scale = int4_rows_scale(weight).to(dtype)
        return int4_rows(weight, scale, int4_rows_offset(weight, scale).to(dtype))
    columns = neuron_scale(weight).to(dtype)
    if precision == "int8":
        return int8(weight, int8_scale(weight, columns).to(dtype), columns)
    candidates, errors = int4_scales(weight, columns)
    best = errors.argmin(0, keepdim=True)
    return int4_neurons(weight, candidates.gather(0, best)[0].to(dtype), columns)


def packed(levels: Tensor) -> Tensor:
    """Two numbers a byte, [R, C] to [R, C / 2]: byte b of a group holds number b (low) and b + 16 (high)."""
    found = torch.zeros(levels.shape[0], levels.shape[1] // 2, dtype=torch.uint8)
    for byte in range(found.shape[1]):
        group, b = divmod(byte, GROUP // 2)
        low, high = levels[:, group * GROUP + b], levels[:, group * GROUP + b + 16]
        found[:, byte] = (low + 16 * high).to(torch.uint8)
    return found


def unpacked(found: Tensor) -> Tensor:
    """The inverse of `packed`."""
    levels = torch.zeros(found.shape[0], found.shape[1] * 2, dtype=torch.int64)
    for byte in range(found.shape[1]):
        group, b = divmod(byte, GROUP // 2)
        levels[:, group * GROUP + b] = found[:, byte].long() % 16
        levels[:, group * GROUP + b + 16] = found[:, byte].long() // 16
    return levels


def layer_matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every matrix of a linear layer inside the decoder layers, by its module's name, as a view [O, I]."""
    kinds = torch.nn.Linear | Conv1D
    found = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and re.search(r"\.(layers|h)\.\d+\.", n)}
    return {name: m.weight.t() if isinstance(m, Conv1D) else m.weight for name, m in found.items()}


def in_feed_forward(matrix: Tensor, neurons: int, *, is_down: bool) -> bool:
    """In the tiny models no matrix of an attention is as wide as an FF."""
    return is_down or matrix.shape[0] in (neurons, 2 * neurons)


@torch.no_grad()
def round_layers(model: PreTrainedModel, down: str, neurons: int, precision: str, *, feed_forward: bool) -> None:
    """Replace the attention's or the FF's matrices by what they are on their grids."""
    downs = {down.format(i=i) for i in range(model.config.num_hidden_layers)}
    for name, matrix in layer_matrices(model).items():
        if in_feed_forward(matrix, neurons, is_down=name in downs) == feed_forward:
            matrix.copy_(quantised(matrix, precision, matrix.dtype, is_down=name in downs).values)


def quantised_generate(
    model: PreTrainedModel,
    down: str,
    neurons: int,
    precision: str,
    inputs: tuple[Tensor, Tensor],
    sets: Sequence[Tensor] | None,
    new_tokens: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """What `dense_generate` returns, of a quantised model. With `sets` the prompt runs with the FF as it is stored,
    which is rounded and masked to the chosen neurons for every further token; without, all is rounded throughout."""
    round_layers(model, down, neurons, precision, feed_forward=False)
    if sets is None:
        round_layers(model, down, neurons, precision, feed_forward=True)
        return dense_generate(model, *inputs, new_tokens, **options)
    with masked_after_prefill(model, down, sets), _rounded_after_prefill(model, down, neurons, precision):
        return dense_generate(model, *inputs, new_tokens, **options)


@contextlib.contextmanager
def _rounded_after_prefill(model: PreTrainedModel, down: str, neurons: int, precision: str) -> Iterator[None]:
    def hook(*_: Any) -> None:
        handle.remove()
        round_layers(model, down, neurons, precision, feed_forward=True)

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
