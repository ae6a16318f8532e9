"""Quantised matrices written again from their formulas, in float64 and independently of the package (but for what int4
chooses, see `stored_values`).

Matrices are [O, I]. What a number is before it is rounded is its quotient: the distance from level 0, in levels.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from reference import dense_generate, masked_after_prefill
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from griffin_offload.formats import get

GROUP = 32
Values = Callable[..., Tensor]
"""Of a matrix, the type of its scales and is_down: what it becomes in a format that is none of the package's."""


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


def step_of(code: Tensor) -> Tensor:
    """float64 of step bytes: four bits of exponent, four behind the binary point, no sign, and no zero."""
    return torch.pow(2.0, (code.long() // 16 - 11).double()) * (1 + (code.long() % 16).double() / 16)


def offset_of(code: Tensor) -> Tensor:
    """float64 of offset bytes: two's complement in eighths, counted from -8."""
    return torch.where(code < 128, code.long(), code.long() - 256).double() / 8 - 8


STEPS = step_of(torch.arange(256))
"""Every step that can be stored, in order."""


@dataclass(frozen=True)
class Int4:
    """Rows of int4 as they are stored, without their scale."""

    levels: Tensor
    """0 to 15, [R, C]."""
    step: Tensor
    """Of each number, [R, C]."""
    offset: Tensor

    @classmethod
    def of_bytes(cls, codes: Tensor, groups: Tensor) -> Int4:
        """Codes [R, C / 2] and pairs of bytes [R, C / 32, 2]."""
        step, offset = (part.repeat_interleave(GROUP, dim=1) for part in (groups[..., 0], groups[..., 1]))
        return cls(unpacked(codes), step_of(step), offset_of(offset))

    @property
    def values(self) -> Tensor:
        return self.step * (self.levels.double() + self.offset)

    def nearest(self, numbers: Tensor) -> Tensor:
        """Levels [R, C] of what lies closest to `numbers` on the grids of these rows, each tried."""
        grid = self.step[..., None] * (torch.arange(16).double() + self.offset[..., None])
        return (grid - numbers.double()[..., None]).abs().argmin(-1)


def strips_as_rows(codes: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [S, R, 32] and groups [2 S, R, 2] of strips, as codes [R, 32 S] and groups [R, 2 S, 2] of their inputs."""
    return torch.cat(list(codes), dim=1), groups.transpose(0, 1).contiguous()


def rows_as_strips(codes: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse; what fills up the last strip is zeros."""
    fill = groups.shape[1] % 2
    codes, groups = (
        torch.cat([codes, codes.new_zeros(codes.shape[0], 16 * fill)], dim=1),
        torch.cat([groups, groups.new_zeros(groups.shape[0], fill, 2)], dim=1),
    )
    strips = [codes[:, start : start + 32] for start in range(0, codes.shape[1], 32)]
    return torch.stack(strips), groups.transpose(0, 1).contiguous()


def int4_matrix(tensors: Mapping[str, Tensor]) -> Tensor:
    """The matrix [O, I] in float64 of stored rows, or of a down projection's neurons."""
    values = Int4.of_bytes(tensors["weight"], tensors["groups"]).values
    if "input_scale" in tensors:
        return (values * tensors["input_scale"].double()[:, None]).t()
    return values * tensors["scale"].double()[:, None]


def row_scale(weight: Tensor) -> Tensor:
    """[O]: root mean square of every row."""
    return torch.stack([row.square().mean().sqrt() for row in weight.double().unbind(0)])


def stored_values(weight: Tensor, precision: str | Values, dtype: torch.dtype, *, is_down: bool) -> Tensor:
    """What `weight` becomes, in float64. int8 by the formulas above; what int4 searches has tests of its own
    (formats/test_int4.py): here the package's bytes are read by the formula of the format."""
    if not isinstance(precision, str):
        return precision(weight, dtype, is_down=is_down)
    if precision == "int4":
        return int4_matrix(get("int4").quantize(weight, dtype, is_down=is_down))
    return quantised(weight, dtype, is_down=is_down).values


def quantised(weight: Tensor, dtype: torch.dtype, *, is_down: bool) -> Quantised:
    """`weight` in int8 with scales in `dtype`, by the formulas above."""
    columns = neuron_scale(weight).to(dtype) if is_down else None
    return int8(weight, int8_scale(weight, columns).to(dtype), columns)


def packed(levels: Tensor) -> Tensor:
    """Two numbers a byte, [R, C] to [R, C / 2]: byte b of a group holds number b (low) and b + 16 (high)."""
    low, high = levels.view(levels.shape[0], -1, 2, GROUP // 2).unbind(2)
    return (low + 16 * high).flatten(1).to(torch.uint8)


def unpacked(found: Tensor) -> Tensor:
    """The inverse of `packed`."""
    halves = found.long().view(found.shape[0], -1, GROUP // 2)
    return torch.cat([halves % 16, halves // 16], dim=2).flatten(1)


def layer_matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every matrix of a linear layer inside the decoder layers, by its module's name, as a view [O, I]."""
    kinds = torch.nn.Linear | Conv1D
    found = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and re.search(r"\.(layers|h)\.\d+\.", n)}
    return {name: m.weight.t() if isinstance(m, Conv1D) else m.weight for name, m in found.items()}


def in_feed_forward(matrix: Tensor, neurons: int, *, is_down: bool) -> bool:
    """In the tiny models no matrix of an attention is as wide as an FF."""
    return is_down or matrix.shape[0] in (neurons, 2 * neurons)


@torch.no_grad()
def round_layers(
    model: PreTrainedModel, down: str, neurons: int, precision: str | Values, *, feed_forward: bool
) -> None:
    """Replace the attention's or the FF's matrices by what they are on their grids."""
    downs = {down.format(i=i) for i in range(model.config.num_hidden_layers)}
    for name, matrix in layer_matrices(model).items():
        if in_feed_forward(matrix, neurons, is_down=name in downs) == feed_forward:
            matrix.copy_(stored_values(matrix, precision, matrix.dtype, is_down=name in downs))


def quantised_generate(
    model: PreTrainedModel,
    down: str,
    neurons: int,
    precision: str | Values,
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
def _rounded_after_prefill(model: PreTrainedModel, down: str, neurons: int, precision: str | Values) -> Iterator[None]:
    def hook(*_: Any) -> None:
        handle.remove()
        round_layers(model, down, neurons, precision, feed_forward=True)

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
