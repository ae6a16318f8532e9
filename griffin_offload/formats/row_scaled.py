"""Numbers of 8 bits with one scale per output row, and one per input.

A gathered neuron takes its numbers and scales along and changes nothing else, so weights are quantised once. Norms of
inputs' columns differ, and a scale of theirs costs one multiplication per activation. Inputs of a down projection are
neurons, whose own norms they are; of all others columns belong to every neuron, and norms over some rows, always the
same, tell enough. Scales are kept in the precision of the computation; numbers are rounded against the rounded scale.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from griffin_offload.formats.base import Format, Layout, Spec, Tensors, divisor, finite, neuron_scale, row_blocks, take
from griffin_offload.formats.compensation import Compensation
from griffin_offload.kernels import by_blocks, table
from griffin_offload.kernels.by_blocks import scaled

_SAMPLED_ROWS = 512
_LEAST_SHARE = 0.25
"""Of the mean norm of all columns, what a column counts at least: a row may hold more there than the sampled ones."""


class RowScaled(Format):
    """What its formats share; a subclass says its numbers' type, the largest of them, and how they are rounded.

    Tensors: weight [O, I], scale [O] and input_scale [I].
    """

    number_type: ClassVar[torch.dtype]
    largest: ClassVar[float]
    """The number that the largest of a row becomes."""
    bits, version = 8, 2  # version 1 had scales of inputs in its down projection alone
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
        own = neuron_scale(weight, dtype) if is_down else self._input_scale(weight, dtype)
        scale = self.scale_of(weight, dtype, own)
        numbers = torch.empty(weight.shape, dtype=self.number_type, device=weight.device)
        self.write(weight, scale, numbers, own)
        return {"weight": numbers, "scale": scale, "input_scale": own}

    def start_rows(self, full: Tensors, out: Tensors, *, plain: bool) -> None:
        target = out["input_scale"]
        target.copy_(self._input_scale(full["weight"], target.dtype) if plain else full["input_scale"])

    def rows_of_all(self, rows: int) -> range:
        return range(0, rows, max(1, -(-rows // _SAMPLED_ROWS)))

    def _input_scale(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """[I], up to 1, of a matrix [O, I] that is no down projection."""
        norms = table.call("quantize", "column_norms", weight[:: self.rows_of_all(weight.shape[0]).step])
        norms = torch.maximum(norms, _LEAST_SHARE * norms.mean())
        largest = norms.amax()
        return finite(torch.where(largest == 0, 1, norms / largest), dtype)

    def gather_rows(
        self, full: Tensors, index: Tensor, start: int, out: Tensors, importance: Tensor | None, *, plain: bool
    ) -> None:
        target = slice(start, start + index.numel())
        if not plain:
            take(full["weight"], 0, index, out["weight"][target])
            out["scale"][target] = full["scale"][index]
            return
        rows, columns = full["weight"].index_select(0, index), out["input_scale"]
        out["scale"][target] = scale = self.scale_of(rows, out["scale"].dtype, columns)
        self.write(rows, scale, out["weight"][target], columns)

    def gather_columns(self, full: Tensors, chosen: Tensor, out: Tensors, *, plain: bool) -> None:
        weight, dtype = full["weight"], out["scale"].dtype
        if plain:
            input_scale = neuron_scale(weight, dtype)
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
        weight, scale, columns = full["weight"], full["scale"].to(dtype), full["input_scale"].to(dtype)
        if not is_down:
            return weight.index_select(0, index).to(dtype).mul_(scale[index, None]).mul_(columns)
        numbers = weight.new_empty(weight.shape[0], index.numel())
        take(weight, 1, index, numbers)
        return numbers.to(dtype).mul_(scale[:, None]).mul_(columns[index])

    def row_norms(self, full: Tensors) -> Tensor:
        columns = full["input_scale"].float()
        norms = [part.float().mul_(columns).norm(dim=1) for part in full["weight"].split(256)]
        return torch.cat(norms) * full["scale"].float()

    def _specs(self, outputs: int, inputs: int, is_down: bool) -> dict[str, Spec]:
        weight = ((outputs, inputs), self.number_type)
        return {"weight": weight, "scale": ((outputs,), None), "input_scale": ((inputs,), None)}


def multiply(x: Tensor, tensors: table.Tensors, outputs: int, scratch: Any) -> Tensor:
    """x [M, I] times a matrix of this kind, block by block."""
    weight = tensors["weight"]
    assert weight is not None
    return by_blocks.multiply(scaled(x, tensors), weight, scratch, tensors["scale"], tensors["bias"])
