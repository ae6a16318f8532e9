"""What every weight format answers: how a matrix lies, is quantised, gathered and multiplied; what it takes, and
the scales that several share.

Shapes: O outputs, I inputs, K chosen neurons, M rows of activations, G groups. A down projection is a matrix [O, I]
whose inputs are neurons; of all others the outputs may be.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from griffin_offload.config import FORMAT_NAMES
from griffin_offload.errors import CheckpointError, UsageError
from griffin_offload.formats.compensation import Compensation
from griffin_offload.formats.translated import Codes, TranslatedTensor, in_memory
from griffin_offload.kernels import table

Tensors = dict[str, Tensor]
"""Of a matrix, by name: weight, bias, and what its layout has beside them."""
Spec = tuple[tuple[int, ...], torch.dtype | None]
"""Shape and type of a tensor; None is the precision of the computation."""
Specs = Callable[[int, int, bool], dict[str, Spec]]
RowCodes = Callable[[Tensor], Codes | None]
"""Those of some rows of a matrix (indices [K]); None where they lie on no grids."""
BLOCK_NUMBERS = 2**20  # float32 copies of a block stay in the cache
PLAIN_TYPES = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64))
"""What is computed in, and what plain weights are of; 8-bit floats are numbers of a quantised matrix."""
_FLOAT_BYTES = 4


def is_plain(tensor: Tensor) -> bool:
    """Whether its numbers are computed with as they are: false of quantised ones, in floats of 8 bits, too."""
    return tensor.dtype in PLAIN_TYPES


def specs_bytes(specs: Iterable[Spec], dtype: torch.dtype) -> int:
    """Bytes of tensors, computing in `dtype`."""
    return sum(math.prod(shape) * (own or dtype).itemsize for shape, own in specs)


def _second_axis(weight: Tensor) -> int:
    return weight.shape[1]


@dataclass(frozen=True, eq=False)
class Layout:
    """One way in which the tensors of a matrix lie."""

    name: str
    """As rows of the table of kernels name it."""
    format: "Format"
    tensors: Specs
    """Of a matrix of (outputs, inputs), a down projection or not, without its bias."""
    multiply: Callable[[Tensor, table.Tensors, int, Any], Tensor]
    """torch's way, the last row of the table: x [M, I], tensors, outputs and the scratch to [M, O]."""
    torchs: str = "by blocks"
    """What the table calls it."""
    neurons_first: bool = False
    """Whether a down projection holds a neuron as a row, so that chosen ones can be read alone."""
    inputs: Callable[[Tensor], int] = _second_axis
    """Inputs of a matrix by its weight."""

    def specs(self, outputs: int, inputs: int, *, is_down: bool) -> dict[str, Spec]:
        """Tensors of a matrix [outputs, inputs], without its bias."""
        return self.tensors(outputs, inputs, is_down)

    def nbytes(self, outputs: int, inputs: int, dtype: torch.dtype, *, is_down: bool) -> int:
        """Of the same, computing in `dtype`."""
        return specs_bytes(self.specs(outputs, inputs, is_down=is_down).values(), dtype)


class Format:
    """A weight format. Those that are not plain keep a matrix in few bits, with scales beside them.

    Stored layouts are those of a full matrix in a checkpoint; the resident ones hold chosen neurons, and are what
    decoding multiplies. Gathering into them reads floats, or what is stored in the same format; a format that is not
    closed under gathering neurons names the one that its matrices rest in (`rests_as`) and gives floats.
    """

    name: ClassVar[str]
    bits: ClassVar[float]
    """Of a number, about: "auto" tries formats in this order."""
    is_plain: ClassVar[bool] = False
    """Whether its numbers are those that are computed with."""
    by_name_only: ClassVar[bool] = False
    """Whether a plan takes it only where it is named: "auto" does not try it, and no advice mentions it."""
    gives_chosen: ClassVar[bool] = False
    """Whether `chosen_floats` reads a part of a stored matrix, so that another format can be made of it by chunks."""
    distortion: ClassVar[float] = 0.0
    """Of what an FF neuron gives whose matrices are in it: the relative squared error, in trained models."""
    is_tier: ClassVar[bool] = False
    """Whether neurons of one layer may rest in it beside others in other formats."""
    version: ClassVar[int] = 1
    """Of the stored layout: converted checkpoints of another one are refused."""
    neuron_multiple: ClassVar[int] = 1
    """Compact blocks hold whole groups of so many neurons."""
    scratch_rows: ClassVar[int] = 1
    """Rows of a matrix that torch's way translates at least at once."""
    wants_importance: ClassVar[bool] = False
    """Whether quantising asks for the mean square of every input, which a pass over a text measures; and converting
    for the inputs themselves."""
    missed_from: ClassVar[float] = 0.25
    """A weight that is off by a larger share has not come back (`missed`)."""
    takes_over: ClassVar[bool] = False
    """Whether it has `taken_over`."""
    holds: tuple["Format", ...] = ()
    """Formats whose neurons a copy in this one has side by side, so that nothing is rounded for a prompt."""
    chunk: ClassVar[int] = 1024
    """Neurons that are on their way at once: a multiple of every block, and small enough for a cache."""

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, ...]:  # one object a format, in copies and other processes, too
        return get, (self.name,)

    # How it lies -----------------------------------------------------------------------------------------------

    def stored(self, *, is_down: bool) -> Layout:
        """Of a full matrix in a checkpoint."""
        raise NotImplementedError

    def resident(self, *, is_down: bool) -> Layout:
        """Of the neurons that decoding multiplies: the stored layout, or that of the format it rests as."""
        other = self.rests_as()
        return self.stored(is_down=is_down) if other is self else other.resident(is_down=is_down)

    def rests_as(self) -> "Format":
        """The format that gathered neurons have: this one, if it is closed under gathering."""
        return self

    def outside(self) -> "Format":
        """The format that matrices which hold no neurons are stored in beside it."""
        return self

    def part(self, format: "Format", full: Tensors) -> Tensors:
        """Of a stored matrix the tensors in one of the formats that it holds."""
        raise NotImplementedError

    @property
    def option(self) -> str:
        """What `--quantize` calls residents that are as they are stored."""
        return self.name

    def layouts(self) -> tuple[Layout, ...]:
        """All that are this format's own."""
        found = (way(is_down=is_down) for way in (self.stored, self.resident) for is_down in (False, True))
        return tuple(dict.fromkeys(layout for layout in found if layout.format is self))

    def check(self, outputs: int, inputs: int, where: str, *, is_down: bool) -> None:
        """UnsupportedModel when a matrix of these sizes cannot be in this format."""

    def check_device(self, device: str) -> None:
        """UnsupportedModel when this type of device cannot multiply by it."""

    # What is made of it ----------------------------------------------------------------------------------------

    def quantize(
        self, weight: Tensor, dtype: torch.dtype, *, is_down: bool, compensation: Compensation | None = None
    ) -> Tensors:
        """The stored tensors of a matrix [O, I] of floats, scales in `dtype`; `compensation`, of its inputs, where they
        are known and wanted. CheckpointError for what is no number."""
        raise NotImplementedError

    def compensation(self, x: Tensor, *, is_down: bool) -> Compensation:
        """Of matrices whose inputs were x [T, I], in formats that want it."""
        raise NotImplementedError

    def taken_over(self, codes: Codes, dtype: torch.dtype) -> Tensors | None:
        """As `quantize`, of rows whose numbers lie on grids of 16 levels already: with the nearest grids to those, and
        their codes, which are given up. None of formats that have no such."""
        return None

    def missed(self, matrix: Tensor, found: Tensors, *, is_down: bool) -> tuple[int, float]:
        """How many weights of `matrix` [O, I] do not come back from `found`, its stored tensors, and by which share
        the worst is off; of formats that can miss some."""
        return 0, 0.0

    def floats(self, full: Tensors, dtype: torch.dtype, *, is_down: bool) -> Tensor:
        """The matrix [O, I] in `dtype`: asked of formats that are not closed under gathering."""
        raise NotImplementedError

    def chosen_floats(self, full: Tensors, index: Tensor, dtype: torch.dtype, *, is_down: bool) -> Tensor:
        """Rows `index` [K] of a stored matrix, [K, I], or columns of a down projection, [O, K], in `dtype`: asked of
        formats that say so."""
        raise NotImplementedError

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
        """Write neurons `chosen` (sorted indices [K]) of a matrix in `source` into `out`, its resident tensors, which
        were zeros and hold at least so many: rows of each of its `parts` stacked matrices (gate and up), or columns of
        a down projection. What fills them up to whole blocks stays zero. Floats are quantised on the way with the
        scales of the full matrix."""
        plain = source.format.is_plain
        if not plain and source.format is not self:
            dtype = out["scale"].dtype if "scale" in out else out["input_scale"].dtype
            full, plain = full | {"weight": source.format.floats(full, dtype, is_down=is_down)}, True
        if is_down:
            full = {name: in_memory(tensor) for name, tensor in full.items()}
            self.gather_columns(full, chosen, out, importance, plain=plain)
            return
        for rows, start in self.row_chunks(full, chosen, out, parts):
            self.gather_rows(full, rows, start, out, importance, plain=plain)

    def take_over(self, full: Tensors, codes: RowCodes, chosen: Tensor, out: Tensors, *, parts: int = 1) -> bool:
        """As `gather`, of a matrix of floats that is no down projection, by `taken_over`; False where it cannot be."""
        return False

    def row_chunks(self, full: Tensors, chosen: Tensor, out: Tensors, parts: int) -> Iterator[tuple[Tensor, int]]:
        """Which rows of `full` go to which row of `out` on, a chunk at a time; their biases are there already."""
        neurons, padded = (tensors["weight"].shape[0] // parts for tensors in (full, out))
        for part in range(parts):
            index, base = chosen + part * neurons, part * padded
            if "bias" in out:
                out["bias"][base : base + index.numel()] = full["bias"][index]
            for start in range(0, index.numel(), self.chunk):
                yield index[start : start + self.chunk], base + start

    def gather_rows(
        self, full: Tensors, index: Tensor, start: int, out: Tensors, importance: Tensor | None, *, plain: bool
    ) -> None:
        """Make rows `index` of a matrix, of floats or stored in this format, rows start.. of `out`."""
        raise NotImplementedError

    def gather_columns(self, full: Tensors, chosen: Tensor, out: Tensors, known: Tensor | None, *, plain: bool) -> None:
        """Make columns `chosen` of a down projection, of floats or stored in this format, the first of `out`."""
        raise NotImplementedError

    def row_norms(self, full: Tensors) -> Tensor:
        """Norms float32 [O] of the rows of a stored matrix that is no down projection."""
        raise NotImplementedError

    def column_norms(self, full: Tensors) -> Tensor:
        """Norms float32 [I] of the columns of a stored down projection, up to a factor common to all."""
        return full["input_scale"].float()  # where that is `neuron_scale`

    # What it takes ---------------------------------------------------------------------------------------------

    def gather_bytes(self, outputs: int, neurons: int, item_bytes: int) -> int:
        """Of a matrix on its way into the resident layout: chunks as stored, packed, and float32 blocks."""
        numbers = max(min(self.chunk, neurons) * outputs, min(self.chunk, outputs) * neurons)
        return numbers * (item_bytes + 2) + 3 * min(numbers, BLOCK_NUMBERS) * _FLOAT_BYTES

    def floats_bytes(self, outputs: int, neurons: int, item_bytes: int) -> int:
        """Of `floats`, for formats whose neurons rest in another one."""
        return 0 if self.rests_as() is self else outputs * neurons * item_bytes


def take(source: Tensor, axis: int, index: Tensor, out: Tensor) -> None:
    """`source.index_select(axis, index)` of a matrix or a vector into `out`."""
    if source.dtype.itemsize == 1:  # torch indexes no floats of 8 bits
        source, out = source.view(torch.uint8), out.view(torch.uint8)
    if axis == 0 and isinstance(source, TranslatedTensor):
        out.copy_(source.index_select(0, index))
    elif axis == 0:
        torch.index_select(source, 0, index, out=out)
    else:
        table.call("gather", "columns", in_memory(source), index, out)


def row_blocks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, float32 copy) of each block of rows."""
    rows = max(1, BLOCK_NUMBERS // max(weight.shape[1], 1))
    for start in range(0, weight.shape[0], rows):
        yield start, weight[start : start + rows].to(torch.float32, copy=True).contiguous()


_REGISTRY: dict[str, Format] = {}
_COPIES: dict[str, Format] = {}
"""Those that only copies have, and no residents."""


def register_format(format: Format) -> None:
    """Add a weight format: every option, command and checkpoint knows its name from now on, and the table of kernels
    torch's way to multiply its layouts. "auto" tries it behind those of as many bits. UsageError for a second one of a
    name."""
    if format.name in _REGISTRY:
        raise UsageError(f"there is a weight format {format.name} already: give this one another name")
    known = [*_REGISTRY.values(), format]
    known.sort(key=lambda other: -other.bits)
    _REGISTRY.clear()
    _REGISTRY.update((other.name, other) for other in known)
    if format.name not in FORMAT_NAMES:
        FORMAT_NAMES[:] = list(_REGISTRY)
    for layout in format.layouts():
        table.add(table.Kernel("gemm", layout.name, layout.torchs, layout.multiply, ours=False), last=True)


def register_copy(format: Format) -> None:
    """Add a format of converted copies, whose neurons rest in those that it holds."""
    _COPIES[format.name] = format


def of_copies() -> tuple[Format, ...]:
    """All that a converted copy may be in."""
    return (*every(), *_COPIES.values())


def forget_format(format: Format) -> None:
    """Take back what `register_format` did."""
    del _REGISTRY[format.name]
    FORMAT_NAMES.remove(format.name)
    names = {layout.name for layout in format.layouts()}
    table.remove(lambda kernel: kernel.layout in names)


def get(name: str) -> Format:
    """The format of that name; UsageError where there is none."""
    found = _REGISTRY.get(name) or _COPIES.get(name)
    if found is None:
        raise UsageError(f"there is no weight format {name}: give one of {', '.join(_REGISTRY)}")
    return found


def every() -> tuple[Format, ...]:
    """All formats, from the most to the fewest bits."""
    return tuple(_REGISTRY.values())


# Scales of rows and of neurons, in the precision of the computation, that several formats share.


def neuron_scale(down: Tensor, dtype: torch.dtype) -> Tensor:
    """input_scale [I] of a down projection [O, I]: the norm of each neuron's column, over the root of O."""
    return finite(table.call("quantize", "column_norms", down, None), dtype)


def row_scale(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """scale [O] of rows in groups: the root mean square of each row of `weight` [O, I]."""
    return finite(table.call("quantize", "row_norms", weight), dtype)


def divisor(scale: Tensor) -> Tensor:
    """What is divided by; a row of zeros has scale 0, and stays zero whatever it is divided by."""
    return torch.where(scale == 0, torch.ones_like(scale), scale).float()


def finite(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` in `dtype`; CheckpointError where that holds no number."""
    rounded = scale.to(dtype)
    if not torch.isfinite(rounded).all():
        raise CheckpointError("a matrix holds infinities or NaN, it cannot be quantised: use --quantize none")
    return rounded


# torch's ways.


def _column_norms(down: Tensor, scale: Tensor | None) -> Tensor:
    wide, factor = _wide(down), 1.0 if scale is not None else _factor(down)
    zeros = torch.zeros(down.shape[1], dtype=wide, device=down.device)
    over = (b.mul_(factor) if scale is None else b.div_(scale[i : i + len(b), None]) for i, b in row_blocks(down))
    squares = sum((block.to(wide).square_().sum(0) for block in over), zeros)
    return ((squares / down.shape[0]).sqrt() / factor).float()


def _row_norms(weight: Tensor) -> Tensor:
    wide, factor = _wide(weight), _factor(weight)
    squares = [block.mul_(factor).to(wide).square_().mean(1) for _, block in row_blocks(weight)]
    return (torch.cat(squares).sqrt() / factor).float()


def _largest_of_rows(weight: Tensor, divisor: Tensor | None) -> Tensor:
    if divisor is None:
        return torch.maximum(weight.amax(1), -weight.amin(1)).float()
    return torch.cat([block.div_(divisor).abs_().amax(1) for _, block in row_blocks(weight)])


def _wide(weight: Tensor) -> torch.dtype:
    """What squares are summed in: the kernels' float64, so that whoever quantises gets the same scales."""
    return torch.float32 if weight.device.type == "mps" else torch.float64  # MPS has none


def _factor(weight: Tensor) -> float:
    """A power of two that brings the largest of `weight` near one, so that squares of small ones stay numbers."""
    low, high = map(float, torch.aminmax(weight)) if weight.numel() else (0.0, 0.0)
    largest = max(-low, high)
    return 2.0 ** max(-100, min(-math.frexp(largest)[1], 100)) if math.isfinite(largest) else 1.0


table.add(
    table.Kernel("quantize", "column_norms", "by blocks", _column_norms, ours=False),
    table.Kernel("quantize", "row_norms", "by blocks", _row_norms, ours=False),
    table.Kernel("quantize", "largest_of_rows", "by blocks", _largest_of_rows, ours=False),
    last=True,
)
