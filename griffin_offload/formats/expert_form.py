"""The matrices of one expert, in a weight format: how they lie in the model, in places on the device, and in the
records of converted files; made from each other, and multiplied.

A record is all of an expert in a row of bytes, as it is computed with: one expert is one contiguous read.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from griffin_offload.formats.base import Format, Layout, Spec, Tensors
from griffin_offload.formats.translated import StackedTensor, read_row, read_rows
from griffin_offload.kernels.by_blocks import Scratch
from griffin_offload.kernels.gemv import CheckedMatrix, checked_typed
from griffin_offload.kernels.table import Several, products

RECORDS = "records"
"""The parameter that experts of a converted checkpoint lie in: uint8 [E, bytes of a record]."""
RECORD_VERSION = 2  # version 1 had neurons of a down projection in int4 as strips
_ALIGNMENT = 64  # of each tensor in a record: what vector units like
BLOCK_BYTES = 4096
"""Records of a file begin at a multiple of this."""
_LARGE_BYTES = 2**20


@dataclass(frozen=True)
class ExpertMatrix:
    """One that every expert of a layer has."""

    name: str
    """Of the model's parameter, [E, outputs, inputs], or turned around."""
    outputs: int
    inputs: int
    is_down: bool
    transposed: bool
    bias: bool

    @property
    def shape(self) -> tuple[int, int]:
        """In the model."""
        return (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)


@dataclass(frozen=True)
class ExpertForm:
    """How one expert lies: `precision` is that of places, `stored` that of files."""

    matrices: tuple[ExpertMatrix, ...]
    precision: Format
    stored: Format
    records: torch.dtype | None = None
    """Of floats in files that hold experts as records; None: they hold them as the model does."""
    scratch: Scratch | None = field(default=None, compare=False)
    importance: Tensor | None = field(default=None, compare=False)
    """[H] of what experts are given, for formats that want it when they quantise floats."""
    finer: Format | None = None
    """In places that of `finer_ones`, names of matrices, which have more bits than the others."""
    finer_ones: frozenset[str] = frozenset()

    def specs(self, precision: Format) -> dict[str, Spec]:
        """Tensors of an expert by the names of parameters; those of floats are the model's own."""
        found: dict[str, Spec] = {}
        for matrix in self.matrices:
            if precision.is_plain:
                found[matrix.name] = (matrix.shape, None)
            else:
                own = self._format(matrix, precision)
                is_down = _by_neurons(matrix, own)
                specs = own.resident(is_down=is_down).specs(matrix.outputs, matrix.inputs, is_down=is_down)
                found |= {_name(matrix, key): spec for key, spec in specs.items()}
            if matrix.bias:
                found[_name(matrix, "bias")] = ((matrix.outputs,), None)
        return found

    def _format(self, matrix: ExpertMatrix, precision: Format) -> Format:
        """Of the matrix, where places are in `precision`."""
        finer = self.finer if precision is self.precision and matrix.name in self.finer_ones else None
        return finer or precision

    @property
    def makes(self) -> bool:
        """Whether experts are made of what files hold, and no copies of it."""
        return self.stored is not self.precision

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors in places, in order."""
        return tuple(self.specs(self.precision))

    def check(self, precision: Format, where: str) -> None:
        """UnsupportedModel when an expert cannot be in `precision`."""
        for matrix in self.matrices:
            own = self._format(matrix, precision)
            is_down = _by_neurons(matrix, own)
            own.check(matrix.outputs, matrix.inputs, f"{where}.{matrix.name}", is_down=is_down)

    # Made.

    @torch.no_grad()
    def fill(self, full: Sequence[Tensor], expert: int, into: Sequence[Tensor]) -> None:
        """Write an expert of `full`, the experts of a layer as files hold them, into `into`, its tensors in places."""
        if not self.makes:
            read_rows(full, expert, into)
            return
        stored = dict(zip(self.specs(self.stored), full, strict=True))
        targets = dict(zip(self.names, into, strict=True))
        for matrix in self.matrices:
            self._quantise(matrix, stored, expert, self._of(matrix, targets))

    def _quantise(self, matrix: ExpertMatrix, stored: Mapping[str, Tensor], expert: int, out: Tensors) -> None:
        source, device = stored[matrix.name], out["weight"].device
        own, full = self._format(matrix, self.precision), dict[str, Tensor]()
        if matrix.bias:
            full["bias"] = _row(stored[_name(matrix, "bias")], expert).to(device)
            out["bias"].copy_(full["bias"])
        found: Tensors | None = None
        is_down = _by_neurons(matrix, own)
        if own.takes_over and isinstance(source, StackedTensor) and not (is_down or matrix.transposed):
            codes = source.codes_of(expert)
            found = None if codes is None else own.taken_over(codes, out["scale"].dtype)
        if found is not None:
            for name, tensor in found.items():
                out[name].copy_(tensor)
            return
        floats = _row(source, expert).to(device)
        full["weight"] = floats.t() if matrix.transposed else floats
        every = torch.arange(matrix.inputs if is_down else matrix.outputs, dtype=torch.long, device=device)
        importance = None if matrix.is_down else self.importance
        layout = self.stored.stored(is_down=is_down)
        own.gather(full, layout, every, out, is_down=is_down, importance=importance)

    # Multiplied.

    def by_matrix(self, tensors: Sequence[Tensor]) -> dict[str, Tensors]:
        """The tensors of an expert, in their order, by the matrices that they belong to."""
        found: dict[str, dict[str, Tensor]] = {matrix.name: {} for matrix in self.matrices}
        for (matrix, key), tensor in zip(self._keys, tensors, strict=True):
            found[matrix][key] = tensor
        return dict(found)

    @cached_property
    def _keys(self) -> tuple[tuple[str, str], ...]:
        """Of the tensors in places, in order: their matrix, and what it calls them."""
        of = {name: (matrix.name, key) for matrix in self.matrices for key, name in self._named(matrix).items()}
        return tuple(of[name] for name in self.names)

    def _of(self, matrix: ExpertMatrix, named: Mapping[str, Tensor]) -> Tensors:
        return {key: named[name] for key, name in self._named(matrix).items()}

    def _named(self, matrix: ExpertMatrix) -> dict[str, str]:
        is_down = _by_neurons(matrix, self._format(matrix, self.precision))
        keys = self.layout(matrix).specs(matrix.outputs, matrix.inputs, is_down=is_down)
        return {key: _name(matrix, key) for key in (*keys, *(["bias"] if matrix.bias else []))}

    @cached_property
    def _layouts(self) -> dict[str, str]:
        """Of matrices in a place, by their names."""
        return {matrix.name: self.layout(matrix).name for matrix in self.matrices}

    def layout(self, matrix: ExpertMatrix) -> Layout:
        """Of the matrix in a place."""
        own = self._format(matrix, self.precision)
        return own.resident(is_down=_by_neurons(matrix, own))

    def multiply(self, x: Tensor, matrix: ExpertMatrix, tensors: Tensors) -> Tensor:
        """x [M, inputs] to [M, outputs], whether the expert is resident or passes: by what its rows alone decide."""
        found: dict[str, Tensor | None] = {"bias": None, "input_scale": None, **tensors}
        if self.precision.is_plain and (matrix.transposed or not x.is_cpu):
            weight = tensors["weight"]
            return torch.nn.functional.linear(x, weight.t() if matrix.transposed else weight, found["bias"])
        computes = self.scratch.dtype if self.scratch is not None and not self.precision.is_plain else None
        for kernel in products(self.layout(matrix).name, x.shape[0], x, computes, True):
            if kernel.takes is None or kernel.takes(x, found):
                product: Tensor = kernel.function(x, found, matrix.outputs, self.scratch)
                return product
        raise AssertionError("torch multiplies what nothing else does")

    def at_once(self, x: Tensor) -> tuple[Several, ...] | None:
        """What multiplies several experts by one call for each matrix, every row like one of x alone; None where one
        after the other is multiplied."""
        found = tuple(self._several(matrix, x) for matrix in self.matrices) if x.is_cpu else (None,)
        return None if None in found else found  # type: ignore[return-value]

    def _several(self, matrix: ExpertMatrix, x: Tensor) -> Several | None:
        if self.precision.is_plain and matrix.transposed:
            return None
        computes = self.scratch.dtype if self.scratch is not None and not self.precision.is_plain else None
        return next((kernel.several for kernel in products(self._layouts[matrix.name], 1, x, computes, True)), None)

    def checked(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[CheckedMatrix, ...]:
        """An expert's matrices by its tensors, in their order, for x of a `dtype`."""
        named = self.by_matrix(tensors)
        return tuple(checked_typed(self.layout(own).name, named[own.name], own.outputs, dtype) for own in self.matrices)

    # Records.

    def copies_records(self, dtype: torch.dtype) -> bool:
        """Whether places in `dtype` hold records as they lie in files, which are whole blocks."""
        return not self.makes and self.records is dtype and self.record_bytes % BLOCK_BYTES == 0

    @property
    def record_bytes(self) -> int:
        """Of one expert in files."""
        return self._places()[1]

    def record(self, full: Sequence[Tensor], expert: int) -> Tensor:
        """An expert of `full` as a record: uint8 [bytes], in the precision of places, its matrices as rows."""
        own = replace(self.as_rows(), stored=self.precision)
        made = torch.zeros(1, own.record_bytes, dtype=torch.uint8, device="cpu")
        into = [tensor[0] for tensor in own.views(made)]
        if self.makes:
            self.fill(full, expert, into)
            return made[0]
        turned = {matrix.name for matrix in self.matrices if matrix.transposed}
        for name, tensor, target in zip(self.names, full, into, strict=True):
            row = _row(tensor, expert)
            target.copy_(row.t() if name in turned else row)
        return made[0]

    def as_rows(self) -> "ExpertForm":
        """The same for matrices that lie as [outputs, inputs]."""
        return replace(self, matrices=tuple(replace(matrix, transposed=False) for matrix in self.matrices))

    def views(self, records: Tensor) -> list[Tensor]:
        """The tensors [E, ...] inside `records` [E, bytes], each a view: of one expert they are contiguous."""
        return [
            records[:, start : start + math.prod(shape) * own.itemsize].view(own).unflatten(1, shape)
            for start, shape, own in self._places()[0]
        ]

    def _places(self) -> tuple[list[tuple[int, tuple[int, ...], torch.dtype]], int]:
        assert self.records is not None, "experts lie as the model has them"
        found, end, dtype = [], 0, self.records
        for shape, own in self.specs(self.stored).values():
            found.append((end, shape, own or dtype))
            end = _up_to(end + math.prod(shape) * (own or dtype).itemsize, _ALIGNMENT)
        # Large ones begin at blocks of the disk, whose whole ones are read past the page cache.
        return found, _up_to(end, BLOCK_BYTES) if end >= _LARGE_BYTES else end


def record_rows(tensors: Sequence[Tensor]) -> Tensor | None:
    """The records uint8 [E, bytes] that `tensors` [E, ...] are views of (`ExpertForm.views`), as they lie in files and
    in places; None unless they are that, and each one whole blocks."""
    if len(tensors) < 2 or any(type(own) not in (Tensor, torch.nn.Parameter) or own.is_meta for own in tensors):
        return None
    first, storage = tensors[0], tensors[0].untyped_storage()
    begin, nbytes = first.data_ptr(), first.stride(0) * first.itemsize
    alike = all(
        own.stride(0) * own.itemsize == nbytes
        and own.untyped_storage().data_ptr() == storage.data_ptr()
        and 0 <= own.data_ptr() - begin <= nbytes - own[0].nbytes
        for own in tensors
    )
    offset = begin - storage.data_ptr()
    if not alike or nbytes % BLOCK_BYTES or offset + first.shape[0] * nbytes > storage.nbytes():
        return None
    found = torch.empty(0, dtype=torch.uint8, device=first.device)
    return found.set_(storage, offset, (first.shape[0], nbytes), (nbytes, 1))


def _by_neurons(matrix: ExpertMatrix, precision: Format) -> bool:
    """Whether its columns are neurons that may be told apart. All of an expert's stay, so that in a format that takes
    codes over, which files have along the inputs, all its matrices are rows, if neurons come in whole blocks."""
    as_rows = precision.takes_over and matrix.inputs % precision.neuron_multiple == 0
    return matrix.is_down and not as_rows


def _up_to(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _name(matrix: ExpertMatrix, key: str) -> str:
    return matrix.name if key == "weight" else f"{matrix.name}_{key}"


def _row(tensor: Tensor, row: int) -> Tensor:
    """A view where it lies as it is, else made."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor.detach()[row]
    made = torch.empty(tensor.shape[1:], dtype=tensor.dtype, device="cpu")
    read_row(tensor, row, made)
    return made
