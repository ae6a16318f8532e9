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


def int8_input_scale(down: Tensor) -> Tensor:
    """[I]: the same of a matrix whose rows, but for those of zeros, have all a root mean square of one."""
    rows = [row / (row.square().mean().sqrt() if row.any() else 1) for row in down.double().unbind(0)]
    return neuron_scale(torch.stack(rows))


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


@dataclass(frozen=True)
class FewBits:
    """Rows of int3 or int2 as they are stored, without their scale; number by number, from where its bits lie."""

    levels: Tensor
    """0 to 7 or 3, [R, C]."""
    step: Tensor
    """Of each number, [R, C]."""
    offset: Tensor

    @classmethod
    def of_bytes(cls, codes: Tensor, groups: Tensor) -> FewBits:
        """Codes [R, C B / 8] and bytes of halves [R, C / 32, 2]."""
        bits = codes.shape[1] // groups.shape[1] // 4
        own = codes.view(*groups.shape[:2], 4 * bits).long()
        half, place, byte = (n // d % m for n in [torch.arange(GROUP)] for d, m in ((16, 2), (4, 4), (1, 4)))
        levels = own[..., 4 * half + byte] >> 2 * place & 3
        if bits == 3:
            levels += 4 * (own[..., 8 + 2 * half + byte // 2] >> 4 * (byte % 2) + place & 1)
        index = groups.long().flatten(1).repeat_interleave(GROUP // 2, dim=1)
        return cls(levels.flatten(1), few_bits_steps(bits)[index % 16], few_bits_offsets(bits)[index // 16])

    @property
    def values(self) -> Tensor:
        return self.step * (self.levels.double() + self.offset)


def few_bits_steps(bits: int) -> Tensor:
    """float64 [16]: all steps of int3 or int2."""
    steps = [10, 20, 29, 35, 42, 49, 56, 65, 75, 87, 103, 125, 176, 288, 448, 672]
    return torch.tensor(steps).double() / 2 ** (4 + bits)


def few_bits_offsets(bits: int) -> Tensor:
    """float64 [16]: what is added to codes, from the middle of all levels upwards and then from there downwards."""
    sixteenths = {3: [2, 5, 8, 11, 16, 23, 34, 56], 2: [1, 3, 4.5, 6, 8, 11, 15, 24]}[bits]
    return torch.tensor([*sixteenths, *(-n for n in sixteenths)]).double() / 16 - (2**bits - 1) / 2


def of_bytes(codes: Tensor, groups: Tensor) -> Int4 | FewBits:
    """Rows of any format in groups, told by how many bytes a group has."""
    return (Int4 if codes.shape[1] == 16 * groups.shape[1] else FewBits).of_bytes(codes, groups)


def strips_as_rows(codes: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [S, R, 8 B] and groups [2 S, R, 2] of strips, as codes [R, 8 B S] and groups [R, 2 S, 2] of inputs."""
    return torch.cat(list(codes), dim=1), groups.transpose(0, 1).contiguous()


def rows_as_strips(codes: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse; what fills up the last strip is zeros."""
    fill, own = groups.shape[1] % 2, codes.shape[1] // groups.shape[1]
    codes, groups = (
        torch.cat([codes, codes.new_zeros(codes.shape[0], own * fill)], dim=1),
        torch.cat([groups, groups.new_zeros(groups.shape[0], fill, 2)], dim=1),
    )
    return torch.stack(codes.split(2 * own, dim=1)), groups.transpose(0, 1).contiguous()


def grouped_matrix(tensors: Mapping[str, Tensor]) -> Tensor:
    """The matrix [O, I] in float64 of stored rows, or of a down projection's neurons, of any format in groups."""
    values = of_bytes(tensors["weight"], tensors["groups"]).values
    if "input_scale" in tensors:
        return (values * tensors["input_scale"].double()[:, None]).t()
    return values * tensors["scale"].double()[:, None]


def row_scale(weight: Tensor) -> Tensor:
    """[O]: root mean square of every row."""
    return torch.stack([row.square().mean().sqrt() for row in weight.double().unbind(0)])


def stored_values(weight: Tensor, precision: str | Values, dtype: torch.dtype, *, is_down: bool) -> Tensor:
    """What `weight` becomes, in float64. int8 by the formulas above; what formats in groups search has tests of
    its own (formats/test_int4.py, test_few_bits.py): here the package's bytes are read by the formula of the format."""
    if not isinstance(precision, str):
        return precision(weight, dtype, is_down=is_down)
    if precision != "int8":
        return grouped_matrix(get(precision).quantize(weight, dtype, is_down=is_down))
    return quantised(weight, dtype, is_down=is_down).values


def head_values(weight: Tensor) -> Tensor:
    """What a head [V, H] rests as among matrices in fewer bits than 8, in its own type: int8 with a scale per row."""
    return stored_values(weight, "int8", weight.dtype, is_down=False).to(weight.dtype)


def quantised(weight: Tensor, dtype: torch.dtype, *, is_down: bool) -> Quantised:
    """`weight` in int8 with scales in `dtype`, by the formulas above."""
    columns = int8_input_scale(weight).to(dtype) if is_down else None
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
    """Every matrix of a linear layer inside the decoder layers, by its module's name, as a view [O, I]; but for Mamba
    1's of time steps, which stays as it is."""
    kinds = torch.nn.Linear | Conv1D
    found = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and re.search(r"\.(layers|h)\.\d+\.", n)}
    found = {name: m for name, m in found.items() if not name.endswith("dt_proj")}
    return {name: m.weight.t() if isinstance(m, Conv1D) else m.weight for name, m in found.items()}


def in_feed_forward(matrix: Tensor, neurons: int, *, is_down: bool) -> bool:
    """In the tiny models no matrix of an attention is as wide as an FF."""
    return is_down or matrix.shape[0] in (neurons, 2 * neurons)


def small_ones(model: PreTrainedModel) -> set[str]:
    """Modules of keys and values that have a sixteenth of their layer's numbers at most: beside fewer bits than 8 they
    are in int8. In the tiny models no other matrix is as small."""
    sizes = {name: matrix.numel() for name, matrix in layer_matrices(model).items()}
    found = set()
    for keys in (name for name in sizes if name.endswith(".k_proj")):
        layer, values = keys.removesuffix("self_attn.k_proj"), keys.removesuffix("k_proj") + "v_proj"
        if 16 * (sizes[keys] + sizes[values]) <= sum(size for name, size in sizes.items() if name.startswith(layer)):
            found |= {keys, values}
    return found


@torch.no_grad()
def round_layers(
    model: PreTrainedModel, down: str, neurons: int, precision: str | Values, *, feed_forward: bool, whole: bool = False
) -> None:
    """Replace the attention's or the FF's matrices by what they are on their grids; with `whole`, int4's down
    projections of linear layers as rows of outputs, as they rest where all neurons stay."""
    downs = {down.format(i=i) for i in range(model.config.num_hidden_layers)}
    small = small_ones(model) if precision in ("int4", "int3", "int2") else set()
    for name, matrix in layer_matrices(model).items():
        if in_feed_forward(matrix, neurons, is_down=name in downs) == feed_forward:
            own, is_down = "int8" if name in small else precision, name in downs
            if whole and own == "int4" and isinstance(model.get_submodule(name), torch.nn.Linear):
                is_down &= matrix.shape[0] > matrix.shape[1] or any(size % 64 for size in matrix.shape)
            matrix.copy_(stored_values(matrix, own, matrix.dtype, is_down=is_down))


def round_head(model: PreTrainedModel) -> None:
    """Give `model` the head that rests among matrices in fewer bits; embeddings that it is tied to stay as they are."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head_values(head.weight.detach()))


def quantised_generate(
    model: PreTrainedModel,
    down: str,
    neurons: int,
    precision: str | Values,
    inputs: tuple[Tensor, Tensor],
    sets: Sequence[Tensor] | None,
    new_tokens: int,
    *,
    head: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """What `dense_generate` returns, of a quantised model. With `sets` the prompt runs with the FF as it is stored,
    which is rounded and masked to the chosen neurons for every further token; without, all is rounded throughout. So is
    the `head`, in int8; embeddings that it is tied to are as they were."""
    round_layers(model, down, neurons, precision, feed_forward=False)
    if head:
        round_head(model)
    if sets is None:
        round_layers(model, down, neurons, precision, feed_forward=True, whole=True)
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
