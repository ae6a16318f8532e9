"""The int8 format: symmetric whole numbers from -127 to 127 with one scale per output row, and in the down projection
one per neuron, too.

A gathered neuron takes its numbers and scales along and changes nothing else, so weights are quantised once. Norms of
neurons differ, and a scale of theirs costs one multiplication per activation. Norms of outputs differ, too: weights are
taken over their row's norm, so that a neuron's scale is not that of its largest output alone (benchmarks/NOTES.md).
Scales are kept in the precision of the computation; numbers are rounded against the rounded scale.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from griffin_offload.formats.base import Format, Layout, Spec, Tensors, divisor, finite, row_blocks, row_scale, take
from griffin_offload.formats.compensation import Compensation
from griffin_offload.kernels import by_blocks, table
from griffin_offload.kernels.by_blocks import scaled


class RowScaled(Format):
    """What its formats share; a subclass says its numbers' type, the largest of them, and how they are rounded.

    Tensors: weight [O, I], scale [O], and input_scale [I] of a down projection.
    """

    number_type: ClassVar[torch.dtype]
    largest: ClassVar[float]
    """The number that the largest of a row becomes."""
    bits = 8
    neuron_multiple = 64
    gives_chosen = True

    def __init__(self) -> None:
        self._layout = Layout(self.name, self, self._specs, multiply)

    def stored(self, *, is_down: bool) -> Layout:
        return self._layout

    def scale_of(self, weight: Tensor, dtype: torch.dtype, input_scale: Tensor | None = None) -> Tensor:
        """scale [O] of `weight` [O, I], of its columns divided by `input_scale` [I] where one is given."""
        columns = None if input_scale is None else divisor(input_scale)
        return finite(table.call("quantize", "largest_of_rows", weight, columns) / self.largest, dtype)

    def input_scale_of(self, down: Tensor, dtype: torch.dtype) -> Tensor:
        """input_scale [I] of a down projection [O, I]: the root mean square of each neuron's column, over its rows'."""
        rows = divisor(row_scale(down, torch.float32))
        return finite(table.call("quantize", "column_norms", down, rows), dtype)

    def write(self, weight: Tensor, scale: Tensor, out: Tensor, input_scale: Tensor | None = None) -> None:
        """Write `weight` [O, I] over its rows' `scale` [O], and its columns' `input_scale` [I], into `out` [O, I]."""
        columns, rows = None if input_scale is None else divisor(input_scale), divisor(scale)
        for start, block in row_blocks(weight):
            part = slice(start, start + block.shape[0])
            if columns is not None:
                block.div_(columns)
            out[part] = self.rounded(block.div_(rows[part, None]))

    def rounded(self, numbers: Tensor) -> Tensor:
        """`numbers`, float32, as the nearest that the format has; they may be changed."""
        return numbers.clamp_(-self.largest, self.largest).to(self.number_type)

    def quantize(
        self, weight: Tensor, dtype: torch.dtype, *, is_down: bool, compensation: Compensation | None = None
    ) -> Tensors:
        beside = {"input_scale": self.input_scale_of(weight, dtype)} if is_down else {}
        scale = self.scale_of(weight, dtype, beside.get("input_scale"))
        numbers = torch.empty(weight.shape, dtype=self.number_type, device=weight.device)
        self.write(weight, scale, numbers, beside.get("input_scale"))
        return {"weight": numbers, "scale": scale, **beside}

    def gather_rows(
        self, full: Tensors, index: Tensor, start: int, out: Tensors, importance: Tensor | None, *, plain: bool
    ) -> None:
        target = slice(start, start + index.numel())
        if not plain:
            take(full["weight"], 0, index, out["weight"][target])
            out["scale"][target] = full["scale"][index]
            return
        rows = full["weight"].index_select(0, index)
        out["scale"][target] = scale = self.scale_of(rows, out["scale"].dtype)
        self.write(rows, scale, out["weight"][target])

    def gather_columns(self, full: Tensors, chosen: Tensor, out: Tensors, known: Tensor | None, *, plain: bool) -> None:
        weight, dtype = full["weight"], out["scale"].dtype
        if plain:
            input_scale = self.input_scale_of(weight, dtype)
            scale = self.scale_of(weight, dtype, input_scale)
        else:
            input_scale, scale = full["input_scale"].to(dtype), full["scale"].to(dtype)
        kept = input_scale[chosen]
        out["input_scale"][: chosen.numel()] = kept
        out["scale"].copy_(scale)
        target = out["weight"][:, : chosen.numel()]
        if plain:
            self._write_columns(weight, chosen, kept, scale, target)
        else:
            take(weight, 1, chosen, target)

    def _write_columns(self, weight: Tensor, chosen: Tensor, kept: Tensor, scale: Tensor, target: Tensor) -> None:
        room = weight.new_empty(min(self.chunk, weight.shape[0]), chosen.numel())  # one for all: new memory is slow
        for start in range(0, weight.shape[0], self.chunk):
            rows = weight[start : start + self.chunk]
            columns = room[: rows.shape[0]]
            take(rows, 1, chosen, columns)
            self.write(columns, scale[start : start + self.chunk], target[start : start + self.chunk], kept)

    def chosen_floats(self, full: Tensors, index: Tensor, dtype: torch.dtype, *, is_down: bool) -> Tensor:
        weight, scale = full["weight"], full["scale"].to(dtype)
        if not is_down:
            return weight.index_select(0, index).to(dtype).mul_(scale[index, None])
        numbers = weight.new_empty(weight.shape[0], index.numel())
        take(weight, 1, index, numbers)
        return numbers.to(dtype).mul_(scale[:, None]).mul_(full["input_scale"][index].to(dtype))

    def row_norms(self, full: Tensors) -> Tensor:
        return torch.cat([part.float().norm(dim=1) for part in full["weight"].split(256)]) * full["scale"].float()

    def column_norms(self, full: Tensors) -> Tensor:
        squares = torch.zeros_like(full["input_scale"], dtype=torch.float32)
        for numbers, scale in zip(full["weight"].split(256), full["scale"].float().split(256), strict=True):
            squares += numbers.float().mul_(scale[:, None]).square_().sum(0)
        return squares.sqrt_() * full["input_scale"].float()

    def _specs(self, outputs: int, inputs: int, is_down: bool) -> dict[str, Spec]:
        beside: dict[str, Spec] = {"input_scale": ((inputs,), None)} if is_down else {}
        return {"weight": ((outputs, inputs), self.number_type), "scale": ((outputs,), None), **beside}


def multiply(x: Tensor, tensors: table.Tensors, outputs: int, scratch: Any) -> Tensor:
    """x [M, I] times a matrix of this kind, block by block."""
    weight = tensors["weight"]
    assert weight is not None
    return by_blocks.multiply(scaled(x, tensors), weight, scratch, tensors["scale"], tensors["bias"])


class Int8(RowScaled):
    """q [O, I] int8."""

    name, number_type, largest = "int8", torch.int8, 127
    distortion = 0.0002

    def write(self, weight: Tensor, scale: Tensor, out: Tensor, input_scale: Tensor | None = None) -> None:
        columns = None if input_scale is None else divisor(input_scale)
        table.call("quantize", "int8", weight, divisor(scale), out, columns)

    def rounded(self, numbers: Tensor) -> Tensor:
        return super().rounded(numbers.round_())


INT8 = Int8()


def _by_blocks(weight: Tensor, scale: Tensor, out: Tensor, columns: Tensor | None) -> None:
    RowScaled.write(INT8, weight, scale, out, columns)  # no scale is 0 here


table.add(table.Kernel("quantize", "int8", "by blocks", _by_blocks, ours=False), last=True)
