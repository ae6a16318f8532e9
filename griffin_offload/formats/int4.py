"""The int4 format: groups of 32 numbers of a row, and the layouts that it rests in.

    number = scale * step * (code + offset),    code 0..15

- scale: of the row, its root mean square, in the precision of the computation.
- step and offset: of a group, a pair of bytes. The step byte is 2^(e - 11) * (1 + m / 16), e its upper and m its lower
  four bits, so that weights of up to 232 rms are reached; the offset byte counts signed eighths, from -8.
- codes: two a byte, byte b of a group holds number b (low) and b + 16 (high).

4.5 bits a number and one scale a row. Rows are those of a matrix [O, I]; of a down projection they are its columns, a
neuron each, so that a selection of neurons takes its bytes along and changes nothing else. "rows" and "neurons" are
codes [R, C / 2] and groups [R, C / 32, 2]; "strips", the form in which neurons are multiplied, codes [C / 64, R, 32]
and groups [C / 32, R, 2], C filled up to a multiple of 64.

Step and offset are searched: of a few shares of a group's range, as they are and fitted to their codes by least
squares, the one that errs least. An error counts by the importance of its number along the row: the mean square of
the input that it is multiplied by.
"""

import math

import torch
from torch import Tensor

from griffin_offload.errors import UnsupportedModel
from griffin_offload.formats.base import (
    Format,
    Layout,
    Spec,
    Tensors,
    divisor,
    neuron_scale,
    row_blocks,
    row_scale,
    take,
)
from griffin_offload.formats.compensation import Compensation
from griffin_offload.formats.int4_grid import CENTRE, best_grid, steps_of
from griffin_offload.kernels import by_blocks, table
from griffin_offload.kernels.by_blocks import Scratch, scaled

GROUP = 32
STRIP = 64
_HALF = GROUP // 2

Packed = tuple[Tensor, Tensor]
"""Codes and groups."""
LARGE = 16.0
"""Root mean squares of its row from which on a weight is large: one that a model may hang on."""
OFF = 0.25
"""From which share on a large weight that comes back otherwise is missed."""
_MISS_ROWS = 256


def quantize_rows(weight: Tensor, scale: Tensor, importance: Tensor | None = None) -> Packed:
    """Codes [O, I / 2] and groups [O, I / 32, 2] of `weight` [O, I] over its rows' `scale` [O], of which a row of zeros
    has none; `importance` [I] of the inputs."""
    found: Packed = table.call("quantize", "int4_rows", weight, divisor(scale), importance)
    return found


def _rows_by_torch(weight: Tensor, divisor: Tensor, importance: Tensor | None) -> Packed:
    outputs, inputs = weight.shape
    codes = torch.empty(outputs, inputs // 2, dtype=torch.uint8, device=weight.device)
    groups = torch.empty(outputs, inputs // GROUP, 2, dtype=torch.uint8, device=weight.device)
    counts = torch.ones(inputs, dtype=torch.float32, device=weight.device) if importance is None else importance
    for start, block in row_blocks(weight):
        part = slice(start, start + block.shape[0])
        block.mul_(1 / divisor[part, None])
        _quantize(block.view(block.shape[0], -1, GROUP), counts.float().view(-1, GROUP), codes[part], groups[part])
    return codes, groups


def quantize_neurons(columns: Tensor, scale: Tensor, importance: Tensor | None = None) -> Packed:
    """Codes [K, O / 2] and groups [K, O / 32, 2] of K neurons' `columns` [O, K] of a down projection over their `scale`
    [K]; `importance` [O] of the outputs."""
    found: Packed = table.call("quantize", "int4_neurons", columns, divisor(scale), importance)
    return found


def _neurons_by_torch(columns: Tensor, divisor: Tensor, importance: Tensor | None) -> Packed:
    found: Packed = table.call("quantize", "int4_rows", columns.t(), divisor, importance)
    return found


def missed_weights(rows: Tensor, scale: Tensor, quantised: Packed) -> tuple[int, float]:
    """How many large weights of `rows` [R, C], a matrix or a down projection turned around, are missed by what they
    became, and by which share the worst: such as are beyond what the steps reach, or whose inputs count little."""
    largest = table.call("quantize", "largest_of_rows", rows, None)
    count, worst = 0, 0.0
    for index in (largest > LARGE * scale.float()).nonzero()[:, 0].split(_MISS_ROWS):
        numbers, own = rows.index_select(0, index).float(), scale[index, None].float()
        codes, groups = (part.index_select(0, index) for part in quantised)
        found = unpack(codes, groups, torch.empty_like(numbers)).mul_(own)
        off = (found.sub_(numbers) / numbers).abs_()[numbers.abs() > LARGE * own]
        count += int((off > OFF).sum())
        worst = max(worst, float(off.max()) if off.numel() else 0.0)
    return count, worst


def compensated_rows(weight: Tensor, scale: Tensor, compensation: Compensation) -> Packed:
    """As `quantize_rows`, but that inputs make up for the errors of others."""
    outputs, inputs = weight.shape
    codes = torch.empty(outputs, inputs // GROUP, _HALF, dtype=torch.uint8, device=weight.device)
    groups = codes.new_empty(outputs, inputs // GROUP, 2)
    ones = torch.ones_like(scale, dtype=torch.float32)

    def grids(numbers: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        _, pairs = quantize_rows(numbers.t().contiguous(), ones, compensation.importance[index])
        groups[:, int(index[0]) // GROUP] = pairs[:, 0]
        return steps_of(pairs[:, 0], torch.float32)

    for index, levels in compensation.rounded(weight, divisor(scale), None, 2 * CENTRE - 1, grids):
        codes[:, int(index[0]) // GROUP] = pack(levels.t())
    return codes.flatten(1), groups


def compensated_neurons(columns: Tensor, scale: Tensor, compensation: Compensation) -> Packed:
    """As `quantize_neurons`, but that neurons make up for the errors of others."""
    outputs, inputs = columns.shape
    codes = torch.empty(inputs, outputs // 2, dtype=torch.uint8, device=columns.device)
    groups = codes.new_empty(inputs, outputs // GROUP, 2)

    def grids(numbers: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        _, groups[index] = quantize_rows(numbers, numbers.new_ones(len(numbers)))
        step, offset = steps_of(groups[index], torch.float32)
        return step.repeat_interleave(GROUP, dim=1), offset.repeat_interleave(GROUP, dim=1)

    for index, levels in compensation.rounded(columns, None, divisor(scale), 2 * CENTRE - 1, grids):
        codes[index] = pack(levels)
    return codes, groups


def pack(levels: Tensor) -> Tensor:
    """Codes [R, C / 2] of `levels` uint8 [R, C]."""
    groups = levels.reshape(levels.shape[0], -1, 2, _HALF)
    return (groups[:, :, 0] | (groups[:, :, 1] << 4)).flatten(1)


def unpack(codes: Tensor, groups: Tensor, out: Tensor) -> Tensor:
    """step * (code + offset) of rows or neurons, written into `out`, floats [R, C]: numbers without their scale."""
    shape = groups.shape[:-1]
    low, high = out.view(*shape, 2, _HALF).unbind(2)
    pairs = codes.view(*shape, _HALF)
    low.copy_(pairs & 15)
    high.copy_(pairs >> 4)
    step, offset = steps_of(groups, out.dtype)
    out.view(*shape, GROUP).add_(offset[..., None]).mul_(step[..., None])
    return out


def unpack_strip(codes: Tensor, groups: Tensor, out: Tensor) -> Tensor:
    """The same of one strip, codes [I, 32] and groups [2, I, 2], written into `out`, floats [I, 64]."""
    return unpack(codes, groups.transpose(0, 1), out)


def gather_neurons(neurons: Packed, chosen: Tensor, strips: Packed, start: int) -> None:
    """Make neurons `chosen` [K] inputs start.. of `strips`."""
    table.call("gather", "int4_strips", neurons, chosen, strips, start, like=neurons[0])


def _neurons_to_strips_by_torch(neurons: Packed, chosen: Tensor, strips: Packed, start: int) -> None:
    codes, groups = neurons
    write_neurons((codes.index_select(0, chosen), groups.index_select(0, chosen)), strips, start)


def write_neurons(neurons: Packed, strips: Packed, start: int) -> None:
    """Make all of `neurons` [R, ...] inputs start.. of `strips`."""
    (codes, groups), (to_codes, to_groups) = neurons, strips
    part = slice(start, start + codes.shape[0])
    target = to_codes.view(*to_codes.shape[:2], 2, _HALF)
    for half in range(2):
        source = codes.view(*groups.shape[:-1], _HALF)[:, half::2].transpose(0, 1)
        target[: source.shape[0], part, half] = source
    to_groups[: groups.shape[1], part] = groups.transpose(0, 1)


def _quantize(numbers: Tensor, importance: Tensor, codes: Tensor, groups: Tensor) -> None:
    """`numbers` [R, G, 32] over their rows' scale become `codes` [R, 16 G] and `groups` [R, G, 2]."""
    grid = best_grid(numbers, importance)
    codes.copy_(pack(grid.codes(numbers).add_(CENTRE).to(torch.uint8).view(len(codes), -1)))
    groups[..., 0] = grid.step[..., 0].to(torch.uint8)
    groups[..., 1] = grid.offset[..., 0].to(torch.int8).view(torch.uint8)


# The format.


class Int4(Format):
    """Rows where neurons are outputs; a down projection is stored as neurons, and rests as strips."""

    name, bits, version = "int4", 4.5, 2  # version 1 had one scale a neuron in its down projection
    neuron_multiple, scratch_rows, wants_importance, missed_from = 64, STRIP, True, OFF

    def __init__(self) -> None:
        self._rows = Layout("int4_rows", self, _row_specs, _multiply_rows)
        self._neurons = Layout(
            *("int4_neurons", self, _neuron_specs, _multiply_neurons),
            neurons_first=True,
            inputs=lambda weight: weight.shape[0],
        )
        self._strips = Layout("int4_strips", self, _strip_specs, _multiply_strips)

    def stored(self, *, is_down: bool) -> Layout:
        return self._neurons if is_down else self._rows

    def resident(self, *, is_down: bool) -> Layout:
        return self._strips if is_down else self._rows

    def check(self, outputs: int, inputs: int, where: str, *, is_down: bool) -> None:
        size = outputs if is_down else inputs  # what groups run along
        if size % GROUP:
            raise UnsupportedModel(
                f"{where}: int4 needs rows in groups of {GROUP}, this one has {size} numbers: use int8"
            )

    def check_device(self, device: str) -> None:
        if device not in ("cpu", "cuda"):  # it was never tried
            raise UnsupportedModel(f"int4 is not supported on {device}: use int8")

    def quantize(
        self, weight: Tensor, dtype: torch.dtype, *, is_down: bool, compensation: Compensation | None = None
    ) -> Tensors:
        scale = neuron_scale(weight, dtype) if is_down else row_scale(weight, dtype)
        if compensation is None:
            codes, groups = quantize_neurons(weight, scale) if is_down else quantize_rows(weight, scale)
        else:
            way = compensated_neurons if is_down else compensated_rows
            codes, groups = way(weight, scale, compensation)
        return {"weight": codes, "groups": groups, "input_scale" if is_down else "scale": scale}

    def compensation(self, x: Tensor, *, is_down: bool) -> Compensation:
        return Compensation(x, grouped=not is_down)

    def missed(self, matrix: Tensor, found: Tensors, *, is_down: bool) -> tuple[int, float]:
        rows, scale = (matrix.t(), found["input_scale"]) if is_down else (matrix, found["scale"])
        return missed_weights(rows, scale, (found["weight"], found["groups"]))

    def gather_rows(
        self, full: Tensors, index: Tensor, start: int, out: Tensors, importance: Tensor | None, *, plain: bool
    ) -> None:
        target = slice(start, start + index.numel())
        if not plain:
            take(full["weight"], 0, index, out["weight"][target])
            take(full["groups"], 0, index, out["groups"][target])
            out["scale"][target] = full["scale"][index]
            return
        rows = full["weight"].index_select(0, index)
        out["scale"][target] = scale = row_scale(rows, out["scale"].dtype)
        counts = None if importance is None else importance.to(rows.device)
        out["weight"][target], out["groups"][target] = quantize_rows(rows, scale, counts)

    def gather_columns(self, full: Tensors, chosen: Tensor, out: Tensors, *, plain: bool) -> None:
        weight, strips = full["weight"], (out["weight"], out["groups"])
        room = weight.new_empty(weight.shape[0], min(self.chunk, chosen.numel()) if plain else 0)
        for start in range(0, chosen.numel(), self.chunk):
            index = chosen[start : start + self.chunk]
            target = out["input_scale"][start : start + index.numel()]
            if not plain:
                target.copy_(full["input_scale"][index])
                gather_neurons((weight, full["groups"]), index, strips, start)
                continue
            columns = room[:, : index.numel()]
            take(weight, 1, index, columns)
            target.copy_(neuron_scale(columns, target.dtype))
            everything = torch.arange(index.numel(), dtype=torch.int64, device=weight.device)
            gather_neurons(quantize_neurons(columns, target), everything, strips, start)

    def row_norms(self, full: Tensors) -> Tensor:
        return full["scale"].float() * math.sqrt(2 * full["weight"].shape[1])  # the root mean square is the scale


def _packed_specs(codes: tuple[int, ...], groups: tuple[int, ...]) -> dict[str, Spec]:
    return {"weight": (codes, torch.uint8), "groups": (groups, torch.uint8)}


def _row_specs(outputs: int, inputs: int, is_down: bool) -> dict[str, Spec]:
    return _packed_specs((outputs, inputs // 2), (outputs, inputs // GROUP, 2)) | {"scale": ((outputs,), None)}


def _neuron_specs(outputs: int, inputs: int, is_down: bool) -> dict[str, Spec]:
    found = _packed_specs((inputs, outputs // 2), (inputs, outputs // GROUP, 2))
    return found | {"input_scale": ((inputs,), None)}


def _strip_specs(outputs: int, inputs: int, is_down: bool) -> dict[str, Spec]:
    strips = -(-outputs // STRIP)
    found = _packed_specs((strips, inputs, STRIP // 2), (strips * STRIP // GROUP, inputs, 2))
    return found | {"input_scale": ((inputs,), None)}


def _multiply_rows(x: Tensor, tensors: table.Tensors, outputs: int, scratch: Scratch) -> Tensor:
    """x [M, I] times int4 rows, codes [O, I / 2], groups [O, I / 32, 2] and their scale [O]."""
    codes, groups = _packed(tensors)
    inputs = 2 * codes.shape[1]

    def fill(start: int, end: int) -> Tensor:
        return unpack(codes[start:end], groups[start:end], scratch.block(end - start, inputs)).t()

    step = scratch.rows(inputs)
    rows = scaled(x, tensors)
    return by_blocks.by_outputs(rows, codes.shape[0], step, scratch.dtype, fill, tensors["scale"], tensors["bias"])


def _multiply_strips(x: Tensor, tensors: table.Tensors, outputs: int, scratch: Scratch) -> Tensor:
    """x [M, I] times the first `outputs` outputs of int4 strips."""
    codes, groups = _packed(tensors)
    inputs, pairs = codes.shape[1], groups.view(-1, 2, *groups.shape[1:])

    def fill(start: int, _: int) -> Tensor:
        return unpack_strip(codes[start // STRIP], pairs[start // STRIP], scratch.block(inputs, STRIP))

    return by_blocks.by_outputs(scaled(x, tensors), outputs, STRIP, scratch.dtype, fill, None, tensors["bias"])


def _multiply_neurons(x: Tensor, tensors: table.Tensors, _: int, scratch: Scratch) -> Tensor:
    """x [M, I] times int4 neurons, codes [I, O / 2] and groups [I, O / 32, 2]."""
    (codes, groups), bias, rows = _packed(tensors), tensors["bias"], scaled(x, tensors)
    outputs = 2 * codes.shape[1]
    wide, step = rows.to(scratch.dtype), scratch.rows(outputs)
    total = torch.zeros(rows.shape[0], outputs, dtype=scratch.dtype, device=x.device)
    for start in range(0, codes.shape[0], step):
        part = slice(start, start + step)
        block = unpack(codes[part], groups[part], scratch.block(codes[part].shape[0], outputs))
        total.addmm_(wide[:, part], block)
    return (total if bias is None else total.add_(bias)).to(rows.dtype)


def _packed(tensors: table.Tensors) -> Packed:
    codes, groups = tensors["weight"], tensors["groups"]
    assert codes is not None
    assert groups is not None
    return codes, groups


table.add(
    table.Kernel("quantize", "int4_rows", "by blocks", _rows_by_torch, ours=False),
    table.Kernel("quantize", "int4_neurons", "by blocks", _neurons_by_torch, ours=False),
    table.Kernel("gather", "int4_strips", "index_select", _neurons_to_strips_by_torch, ours=False),
    last=True,
)

INT4 = Int4()
