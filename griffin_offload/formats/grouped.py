"""Formats of few bits: groups of 32 numbers of a row, their codes and two bytes that say what levels these stand for.

    number = scale * step * (code + offset)

The scale is the row's, its root mean square, in the precision of the computation; steps and offsets are a format's own
(int4.py, few_bits.py). Rows are those of a matrix [O, I]; of a down projection they are its columns, a neuron each, so
that a selection of neurons takes its bytes along and changes nothing else (but where it has a file's codes: int4.py).
Of B bits a code, "rows" and "neurons" are codes [R, C B / 8] and groups [R, C / 32, 2]; "strips", the form in which
neurons are multiplied, codes [C / 64, R, 8 B] and groups [C / 32, R, 2], C filled up to a multiple of 64.

Step and offset are searched: of a few shares of a group's range, as they are and fitted to their codes by least
squares, the one that errs least. An error counts by the importance of its number along the row: the mean square of
the input that it is multiplied by. What a group of inputs misses, those behind it make up for (compensation.py).
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from griffin_offload.errors import UnsupportedModel
from griffin_offload.formats.base import (
    BLOCK_NUMBERS,
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
from griffin_offload.formats.compensation import Compensation, Packed, Passing, counts_of, feedback, in_turns
from griffin_offload.kernels import by_blocks, table
from griffin_offload.kernels.by_blocks import Scratch, scaled

GROUP, STRIP, PAIR = 32, 64, 2
LARGE = 16.0
"""Root mean squares of its row from which on a weight is large: one that a model may hang on."""
OFF = 0.25
"""From which share on a large weight that comes back otherwise is missed."""
_MISS_ROWS = 256


class Grouped(Format):
    """What they share: rows where neurons are outputs; a down projection is stored as neurons, and rests as strips."""

    code_bits: ClassVar[int]
    alternative: ClassVar[str] = "int8"
    """What to take where this one cannot be."""
    neuron_multiple, scratch_rows, wants_importance, missed_from, gives_chosen = 64, STRIP, True, OFF, True

    def __init__(self) -> None:
        name = self.name
        self.group_bytes = GROUP * self.code_bits // 8
        """Of a group's codes."""
        self._highest = (1 << self.code_bits) - 1
        multiply, inputs = self._multiply_rows, lambda weight: weight.shape[1] * 8 // self.code_bits
        self._rows = Layout(f"{name}_rows", self, self._row_specs, multiply, inputs=inputs)
        self._neurons = Layout(
            *(f"{name}_neurons", self, self._neuron_specs, self._multiply_neurons),
            neurons_first=True,
            inputs=lambda weight: weight.shape[0],
        )
        self._strips = Layout(f"{name}_strips", self, self._strip_specs, self._multiply_strips)
        table.add(
            table.Kernel("quantize", f"{name}_rows", "by blocks", self._rows_by_torch, ours=False),
            table.Kernel("quantize", f"{name}_neurons", "by blocks", self._neurons_by_torch, ours=False),
            table.Kernel("gather", f"{name}_strips", "index_select", self._to_strips_by_torch, ours=False),
            last=True,
        )

    # A format's own -------------------------------------------------------------------------------------------

    def levels_of(self, numbers: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Codes uint8 [R, G, 32] of `numbers` [R, G, 32] over their rows' scale, and the groups' bytes [R, G, 2];
        errors count by `importance` [G, 32]."""
        raise NotImplementedError

    def pack(self, levels: Tensor) -> Tensor:
        """Codes [R, C B / 8] of `levels` uint8 [R, C]."""
        raise NotImplementedError

    def read_codes(self, codes: Tensor, out: Tensor) -> None:
        """Write the codes of groups [..., 4 B] into `out`, floats [..., 32]."""
        raise NotImplementedError

    def steps_of(self, groups: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """step and offset [..., P] of groups [..., 2], of which P equal parts have their own."""
        raise NotImplementedError

    # How it lies ----------------------------------------------------------------------------------------------

    def stored(self, *, is_down: bool) -> Layout:
        return self._neurons if is_down else self._rows

    def resident(self, *, is_down: bool) -> Layout:
        return self._strips if is_down else self._rows

    def check(self, outputs: int, inputs: int, where: str, *, is_down: bool) -> None:
        size = outputs if is_down else inputs  # what groups run along
        if size % GROUP:
            raise UnsupportedModel(
                f"{where}: {self.name} needs rows in groups of {GROUP}, this one has {size} numbers: "
                f"use {self.alternative}"
            )

    def check_device(self, device: str) -> None:
        if device not in ("cpu", "cuda"):  # it was never tried
            raise UnsupportedModel(f"{self.name} is not supported on {device}: use {self.alternative}")

    def _row_specs(self, outputs: int, inputs: int, is_down: bool) -> dict[str, Spec]:
        return self._packed_specs(outputs, inputs) | {"scale": ((outputs,), None)}

    def _neuron_specs(self, outputs: int, inputs: int, is_down: bool) -> dict[str, Spec]:
        return self._packed_specs(inputs, outputs) | {"input_scale": ((inputs,), None)}

    def _packed_specs(self, rows: int, numbers: int) -> dict[str, Spec]:
        groups = numbers // GROUP
        return {
            "weight": ((rows, groups * self.group_bytes), torch.uint8),
            "groups": ((rows, groups, PAIR), torch.uint8),
        }

    def _strip_specs(self, outputs: int, inputs: int, is_down: bool) -> dict[str, Spec]:
        strips, groups = -(-outputs // STRIP), STRIP // GROUP
        return {
            "weight": ((strips, inputs, groups * self.group_bytes), torch.uint8),
            "groups": ((strips * groups, inputs, PAIR), torch.uint8),
            "input_scale": ((inputs,), None),
        }

    # Quantising -----------------------------------------------------------------------------------------------

    def quantize(
        self, weight: Tensor, dtype: torch.dtype, *, is_down: bool, compensation: Compensation | None = None
    ) -> Tensors:
        scale = neuron_scale(weight, dtype) if is_down else row_scale(weight, dtype)
        if compensation is None:
            codes, groups = self.quantize_neurons(weight, scale) if is_down else self.quantize_rows(weight, scale)
        else:
            way = self.compensated_neurons if is_down else self.compensated_rows
            codes, groups = way(weight, scale, compensation)
        return {"weight": codes, "groups": groups, "input_scale" if is_down else "scale": scale}

    def quantize_rows(self, weight: Tensor, scale: Tensor, known: Tensor | None = None) -> Packed:
        """Rows of `weight` [O, I] over their `scale` [O], of which a row of zeros has none; what is `known` of the
        inputs, [3, I] or their importance [I]."""
        beside = divisor(scale), counts_of(known), *feedback(known)
        found: Packed = table.call("quantize", self._rows.name, weight, *beside)
        return found

    def quantize_neurons(
        self, columns: Tensor, scale: Tensor, importance: Tensor | None = None, passing: Passing | None = None
    ) -> Packed:
        """Neurons of K `columns` [O, K] of a down projection over their `scale` [K]; `importance` [O] of the
        outputs. They make up for those that were `passing` before them."""
        fed = () if passing is None else passing.next(divisor(scale), len(columns))
        found: Packed = table.call("quantize", self._neurons.name, columns, divisor(scale), importance, *fed)
        return found

    def compensation(self, x: Tensor, *, is_down: bool) -> Compensation:
        return Compensation(x, grouped=not is_down)

    def compensated_rows(self, weight: Tensor, scale: Tensor, compensation: Compensation) -> Packed:
        """As `quantize_rows`, but that inputs make up for the errors of others."""
        outputs, inputs = weight.shape
        codes = torch.empty(outputs, inputs // GROUP, self.group_bytes, dtype=torch.uint8, device=weight.device)
        groups = codes.new_empty(outputs, inputs // GROUP, PAIR)
        ones = torch.ones_like(scale, dtype=torch.float32)

        def grids(numbers: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            _, pairs = self.quantize_rows(numbers.t().contiguous(), ones, compensation.importance[index])
            groups[:, int(index[0]) // GROUP] = pairs[:, 0]
            step, offset = self._steps_of_numbers(pairs)
            return step.t(), offset.t()

        for index, levels in compensation.rounded(weight, divisor(scale), None, self._highest, grids):
            codes[:, int(index[0]) // GROUP] = self.pack(levels.t())
        return codes.flatten(1), groups

    def compensated_neurons(self, columns: Tensor, scale: Tensor, compensation: Compensation) -> Packed:
        """As `quantize_neurons`, but that neurons make up for the errors of others."""
        outputs, inputs = columns.shape
        codes = torch.empty(inputs, outputs // GROUP * self.group_bytes, dtype=torch.uint8, device=columns.device)
        groups = codes.new_empty(inputs, outputs // GROUP, PAIR)

        def grids(numbers: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            _, groups[index] = self.quantize_rows(numbers, numbers.new_ones(len(numbers)))
            return self._steps_of_numbers(groups[index])

        for index, levels in compensation.rounded(columns, None, divisor(scale), self._highest, grids):
            codes[index] = self.pack(levels)
        return codes, groups

    def _steps_of_numbers(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Step and offset [R, C] of every number of groups [R, C / 32, 2]."""
        step, offset = self.steps_of(groups, torch.float32)
        each = GROUP // step.shape[-1]
        return step.flatten(1).repeat_interleave(each, dim=1), offset.flatten(1).repeat_interleave(each, dim=1)

    def missed(self, matrix: Tensor, found: Tensors, *, is_down: bool) -> tuple[int, float]:
        """Of large weights: such as are beyond what the steps reach, or whose inputs count little."""
        rows, scale = (matrix.t(), found["input_scale"]) if is_down else (matrix, found["scale"])
        largest = table.call("quantize", "largest_of_rows", rows, None)
        count, worst = 0, 0.0
        for index in (largest > LARGE * scale.float()).nonzero()[:, 0].split(_MISS_ROWS):
            numbers, own = rows.index_select(0, index).float(), scale[index, None].float()
            codes, groups = (found[name].index_select(0, index) for name in ("weight", "groups"))
            back = self.unpack(codes, groups, torch.empty_like(numbers)).mul_(own)
            off = (back.sub_(numbers) / numbers).abs_()[numbers.abs() > LARGE * own]
            count += int((off > OFF).sum())
            worst = max(worst, float(off.max()) if off.numel() else 0.0)
        return count, worst

    # Gathering ------------------------------------------------------------------------------------------------

    def gather(
        self,
        full: Tensors,
        source: Layout,
        chosen: Tensor,
        out: Tensors,
        *,
        is_down: bool,
        parts: int = 1,
        importance: Tensor | None = None,
    ) -> None:
        """As any format's; of a copy of several, its own; by `chosen_floats` of others, and of down in rows."""
        if self in source.format.holds:
            full, source = source.format.part(self, full), self.stored(is_down=is_down)
        stored = source.format
        as_it_lies = stored is self and not (is_down and source is self._rows)
        if as_it_lies or stored.is_plain or not stored.gives_chosen:
            super().gather(full, source, chosen, out, is_down=is_down, parts=parts, importance=importance)
            return
        if is_down:
            passing = Passing.of(importance, chosen, self.chunk)
            for start in range(0, chosen.numel(), self.chunk):
                index = chosen[start : start + self.chunk]
                columns = stored.chosen_floats(full, index, out["input_scale"].dtype, is_down=True)
                self._write_columns(columns, start, out, passing)
            return
        for some, start in self.row_chunks(full, chosen, out, parts):
            rows = stored.chosen_floats(full, some, out["scale"].dtype, is_down=False)
            self._write_rows(rows, start, out, importance)

    def gather_rows(
        self, full: Tensors, index: Tensor, start: int, out: Tensors, importance: Tensor | None, *, plain: bool
    ) -> None:
        if plain:
            self._write_rows(full["weight"].index_select(0, index), start, out, importance)
            return
        target = slice(start, start + index.numel())
        take(full["weight"], 0, index, out["weight"][target])
        take(full["groups"], 0, index, out["groups"][target])
        out["scale"][target] = full["scale"][index]

    def _write_rows(self, rows: Tensor, start: int, out: Tensors, importance: Tensor | None) -> None:
        """Make `rows` of floats rows start.. of `out`."""
        target = slice(start, start + rows.shape[0])
        out["scale"][target] = scale = row_scale(rows, out["scale"].dtype)
        known = importance if importance is None else importance.to(rows.device)
        out["weight"][target], out["groups"][target] = self.quantize_rows(rows, scale, known)

    def gather_columns(self, full: Tensors, chosen: Tensor, out: Tensors, known: Tensor | None, *, plain: bool) -> None:
        weight, strips = full["weight"], (out["weight"], out["groups"])
        room = weight.new_empty(weight.shape[0], min(self.chunk, chosen.numel()) if plain else 0)
        passing = Passing.of(known, chosen, self.chunk) if plain else None
        for start in range(0, chosen.numel(), self.chunk):
            index = chosen[start : start + self.chunk]
            if plain:
                columns = room[:, : index.numel()]
                take(weight, 1, index, columns)
                self._write_columns(columns, start, out, passing)
            else:
                out["input_scale"][start : start + index.numel()] = full["input_scale"][index]
                self.gather_neurons((weight, full["groups"]), index, strips, start)

    def _write_columns(self, columns: Tensor, start: int, out: Tensors, passing: Passing | None) -> None:
        """Make `columns` of floats [O, K] neurons start.. of the strips of `out`."""
        target = out["input_scale"][start : start + columns.shape[1]]
        target.copy_(neuron_scale(columns, target.dtype))
        every = torch.arange(columns.shape[1], dtype=torch.int64, device=columns.device)
        packed = self.quantize_neurons(columns, target, passing=passing)
        self.gather_neurons(packed, every, (out["weight"], out["groups"]), start)

    def gather_neurons(self, neurons: Packed, chosen: Tensor, strips: Packed, start: int) -> None:
        """Make neurons `chosen` [K] inputs start.. of `strips`."""
        table.call("gather", self._strips.name, neurons, chosen, strips, start, like=neurons[0])

    def write_neurons(self, neurons: Packed, strips: Packed, start: int) -> None:
        """Make all of `neurons` [R, ...] inputs start.. of `strips`."""
        (codes, groups), (to_codes, to_groups) = neurons, strips
        part = slice(start, start + codes.shape[0])
        target = to_codes.view(*to_codes.shape[:2], STRIP // GROUP, self.group_bytes)
        for half in range(STRIP // GROUP):
            source = codes.view(*groups.shape[:-1], self.group_bytes)[:, half :: STRIP // GROUP].transpose(0, 1)
            target[: source.shape[0], part, half] = source
        to_groups[: groups.shape[1], part] = groups.transpose(0, 1)

    # Reading --------------------------------------------------------------------------------------------------

    def chosen_floats(self, full: Tensors, index: Tensor, dtype: torch.dtype, *, is_down: bool) -> Tensor:
        codes, groups = (full[name].index_select(0, index) for name in ("weight", "groups"))
        scale = full["input_scale" if is_down else "scale"][index]
        out = torch.empty(codes.shape[0], groups.shape[1] * GROUP, dtype=dtype, device=codes.device)
        step = max(1, BLOCK_NUMBERS // max(out.shape[1], 1))
        for start in range(0, out.shape[0], step):
            some = slice(start, start + step)
            self.unpack(codes[some], groups[some], out[some]).mul_(scale[some, None])
        return out.t() if is_down else out

    def unpack(self, codes: Tensor, groups: Tensor, out: Tensor) -> Tensor:
        """step * (code + offset) of rows or neurons, written into `out`, floats [R, C]: numbers without their
        scale."""
        shape = groups.shape[:-1]
        self.read_codes(codes.view(*shape, self.group_bytes), out.view(*shape, GROUP))
        step, offset = self.steps_of(groups, out.dtype)
        out.view(*step.shape, GROUP // step.shape[-1]).add_(offset[..., None]).mul_(step[..., None])
        return out

    def unpack_strip(self, codes: Tensor, groups: Tensor, out: Tensor) -> Tensor:
        """The same of one strip, codes [I, 8 B] and groups [2, I, 2], written into `out`, floats [I, 64]."""
        return self.unpack(codes, groups.transpose(0, 1), out)

    def row_norms(self, full: Tensors) -> Tensor:
        return full["scale"].float() * math.sqrt(full["groups"].shape[1] * GROUP)  # the root mean square is the scale

    # torch's ways ---------------------------------------------------------------------------------------------

    def _rows_by_torch(self, weight: Tensor, divisor: Tensor, importance: Tensor | None, *fed: Tensor | None) -> Packed:
        outputs, inputs = weight.shape
        codes = torch.empty(outputs, inputs // GROUP * self.group_bytes, dtype=torch.uint8, device=weight.device)
        groups = codes.new_empty(outputs, inputs // GROUP, PAIR)
        counts = torch.ones(inputs, dtype=torch.float32, device=weight.device) if importance is None else importance
        if any(part is not None for part in fed):
            numbers = (weight.float() / divisor[:, None]).t()
            return in_turns(numbers, fed, lambda rows, part: self._plain(rows, counts[part]), self.unpack, along=True)
        for start, block in row_blocks(weight):
            part = slice(start, start + block.shape[0])
            numbers = block.mul_(1 / divisor[part, None]).view(block.shape[0], -1, GROUP)
            levels, groups[part] = self.levels_of(numbers, counts.float().view(-1, GROUP))
            codes[part] = self.pack(levels.flatten(1))
        return codes, groups

    def _neurons_by_torch(self, columns: Tensor, divisor: Tensor, counts: Tensor | None, *fed: Tensor | None) -> Packed:
        if all(part is None for part in fed):
            return self._rows_by_torch(columns.t(), divisor, counts)
        numbers = columns.t().float() / divisor[:, None]
        return in_turns(numbers, fed, lambda rows, _: self._plain(rows, counts), self.unpack, along=False)

    def _plain(self, rows: Tensor, importance: Tensor | None) -> Packed:
        return self._rows_by_torch(rows, rows.new_ones(len(rows)), importance)

    def _to_strips_by_torch(self, neurons: Packed, chosen: Tensor, strips: Packed, start: int) -> None:
        self.write_neurons((neurons[0].index_select(0, chosen), neurons[1].index_select(0, chosen)), strips, start)

    def _multiply_rows(self, x: Tensor, tensors: table.Tensors, outputs: int, scratch: Scratch) -> Tensor:
        """x [M, I] times rows and their scale [O]."""
        codes, groups = _packed(tensors)
        inputs = groups.shape[1] * GROUP

        def fill(start: int, end: int) -> Tensor:
            return self.unpack(codes[start:end], groups[start:end], scratch.block(end - start, inputs)).t()

        step, rows = scratch.rows(inputs), scaled(x, tensors)
        return by_blocks.by_outputs(rows, codes.shape[0], step, scratch.dtype, fill, tensors["scale"], tensors["bias"])

    def _multiply_strips(self, x: Tensor, tensors: table.Tensors, outputs: int, scratch: Scratch) -> Tensor:
        """x [M, I] times the first `outputs` outputs of strips."""
        codes, groups = _packed(tensors)
        inputs, pairs = codes.shape[1], groups.view(-1, STRIP // GROUP, *groups.shape[1:])

        def fill(start: int, _: int) -> Tensor:
            return self.unpack_strip(codes[start // STRIP], pairs[start // STRIP], scratch.block(inputs, STRIP))

        return by_blocks.by_outputs(scaled(x, tensors), outputs, STRIP, scratch.dtype, fill, None, tensors["bias"])

    def _multiply_neurons(self, x: Tensor, tensors: table.Tensors, _: int, scratch: Scratch) -> Tensor:
        """x [M, I] times neurons."""
        (codes, groups), bias, rows = _packed(tensors), tensors["bias"], scaled(x, tensors)
        outputs = groups.shape[1] * GROUP
        wide, step = rows.to(scratch.dtype), scratch.rows(outputs)
        total = torch.zeros(rows.shape[0], outputs, dtype=scratch.dtype, device=x.device)
        for start in range(0, codes.shape[0], step):
            part = slice(start, start + step)
            block = self.unpack(codes[part], groups[part], scratch.block(codes[part].shape[0], outputs))
            total.addmm_(wide[:, part], block)
        return (total if bias is None else total.add_(bias)).to(rows.dtype)


def _packed(tensors: table.Tensors) -> Packed:
    codes, groups = tensors["weight"], tensors["groups"]
    assert codes is not None
    assert groups is not None
    return codes, groups
