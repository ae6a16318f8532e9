"""Numbers in the blocks of a GGUF file: rows as they are needed, in the order that transformers has them in.

The package gguf knows every type. Of those that most files are of our own kernels make the same numbers
(kernels/gguf_blocks.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from griffin_offload.checkpoint.gguf_file import BlockType
from griffin_offload.errors import UsageError
from griffin_offload.formats.translated import Codes
from griffin_offload.kernels import table
from griffin_offload.kernels.gguf_blocks import KINDS, ON_GRIDS

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# Numbers that are made at once: what is made of a piece stays in the processor's caches.
_PIECE_NUMBERS = 2**18
_GROUP = 32  # of numbers on one grid


def gguf_package() -> Any:
    """The package; UsageError where it is not installed."""
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise UsageError("GGUF files are read with the package gguf: pip install 'griffin-offload[gguf]'") from error
    return gguf


@cache
def block_types() -> dict[int, BlockType]:
    """Every type that can be read, by its number in files."""
    package = gguf_package()
    found = {}
    for kind, (numbers, nbytes) in package.GGML_QUANT_SIZES.items():
        block = BlockType(int(kind), kind.name, numbers, nbytes)
        if kind.name in _FLOATS or _can_read(block):
            found[block.id] = block
    return found


def _can_read(kind: BlockType) -> bool:
    """Tried on one block, which also makes the tables that the package makes at first use, before there are threads."""
    try:
        _by_package(kind.name, torch.zeros(1, kind.nbytes, dtype=torch.uint8, device="cpu"))
    except (NotImplementedError, ValueError, KeyError):
        return False
    return True


def _by_package(name: str, rows: Tensor) -> Tensor:
    package = gguf_package()
    with np.errstate(all="ignore"):  # scales that are no numbers are found where the model computes with them
        return torch.from_numpy(package.quants.dequantize(rows.numpy(), package.GGMLQuantizationType[name]))


def numbers_of(rows: Tensor, kind: BlockType) -> Tensor:
    """Rows of bytes [R, bytes], uint8 and contiguous, as numbers [R, I] in float32, or the type they are stored in."""
    if kind.name in _FLOATS:
        return rows.view(_FLOATS[kind.name])
    made = torch.empty(rows.shape[0], rows.shape[1] // kind.nbytes * kind.numbers, dtype=torch.float32, device="cpu")
    fill_numbers(rows, kind, made)
    return made


def fill_numbers(rows: Tensor, kind: BlockType, into: Tensor) -> None:
    """The same into `into` [R, I], in its precision."""
    if kind.name in KINDS:
        table.call("dequantize", kind.name, rows, into)
    elif kind.name in _FLOATS:
        into.copy_(numbers_of(rows, kind))
    else:
        _fill_by_package(kind.name, rows, into)


def _fill_by_package(name: str, rows: Tensor, into: Tensor) -> None:
    into.copy_(_by_package(name, rows))


def _codes_by_package(name: str, rows: Tensor) -> Codes:
    """Of a type of 16 levels, by what its blocks begin with; codes are the levels of the package's numbers."""
    package = gguf_package()
    nbytes = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[name]][1]
    blocks = rows.view(rows.shape[0], -1, nbytes)
    halves = blocks[..., :4].contiguous().view(torch.float16).float()
    first, second = halves[..., :1], halves[..., 1:]
    if name != "Q4_K":
        lowest = -8 * first if name == "Q4_0" else second
        return Codes(blocks[..., -16:].clone().flatten(1), first.flatten(1), lowest.flatten(1))
    # Steps and offsets of eight groups, of 6 bits each.
    sixes = package.quants.Q4_K.get_scale_min(blocks[..., 4:16].flatten(0, -2).numpy())
    steps, below = (torch.from_numpy(six).view(*blocks.shape[:-1], -1) for six in sixes)
    both = blocks[..., 16:].unflatten(-1, (4, 1, 32))
    codes = torch.cat([both & 15, both >> 4], dim=-2).unflatten(-1, (2, 16))
    packed = codes[..., 0, :] | (codes[..., 1, :] << 4)
    return Codes(packed.flatten(1), (first * steps).flatten(1), -(second * below).flatten(1))


def _register() -> None:
    last: dict[str, Any] = {"ours": False}
    table.add(
        *(table.Kernel("dequantize", n, "gguf.dequantize", partial(_fill_by_package, n), **last) for n in KINDS),
        *(
            table.Kernel("dequantize", f"{n}_codes", "gguf.dequantize", partial(_codes_by_package, n), **last)
            for n in ON_GRIDS
        ),
        last=True,
    )


_register()


@dataclass(frozen=True)
class BlockDecoder:
    """The `decode` of one tensor (`formats/translated.py`)."""

    kind: BlockType
    rows: int
    """As they lie in the file; each is so many numbers long:"""
    width: int
    index: Tensor | None = None
    """Which stored row each row of the model is; None: they are in order."""
    transposed: bool = False
    """The model's rows are the file's columns."""
    minus: float = 0.0
    """Taken from every number, in float32."""
    columns: Tensor | None = None
    """Of each row, which stored number each of the model's is."""
    logs: bool = False
    """The model's numbers are x where -exp(x) is stored."""

    @property
    def on_grids(self) -> bool:
        """Whether it is `coded`."""
        as_stored = not (self.transposed or self.minus or self.logs)
        return self.kind.name in ON_GRIDS and as_stored and (self.columns is None or self._groups is not None)

    @cached_property
    def _groups(self) -> Tensor | None:
        """The order of columns as one of whole groups on a grid; None where it tears groups apart."""
        assert self.columns is not None, "rows lie as they are stored"
        if len(self.columns) % _GROUP:
            return None
        groups = self.columns.view(-1, _GROUP)
        whole = groups[:, :1] % _GROUP == 0
        alike = groups == groups[:, :1] + torch.arange(_GROUP, dtype=torch.long, device="cpu")
        return groups[:, 0] // _GROUP if bool(whole.all() and alike.all()) else None

    def coded(self, parts: Sequence[Tensor], outputs: int, rows: Tensor) -> Codes:
        """As `TranslatedTensor` has them."""
        stored, blocks = rows if self.index is None else self.index[rows], parts[0].view(self.rows, -1)
        first, last = int(stored[0]), int(stored[-1])
        in_order = last - first + 1 == len(stored) and torch.equal(
            stored, torch.arange(first, last + 1, dtype=torch.long, device="cpu")
        )
        blocks = blocks[first : last + 1] if in_order else blocks.index_select(0, stored)
        codes = Codes(*table.call("dequantize", f"{self.kind.name}_codes", blocks))
        if self.columns is None:
            return codes
        groups, packed = self._groups, codes.packed.view(*codes.steps.shape, -1)
        assert groups is not None, "others are not coded"
        return Codes(packed[:, groups].flatten(1), codes.steps[:, groups], codes.lowest[:, groups])

    def __call__(self, parts: Sequence[Tensor], first: int, end: int, into: Tensor) -> None:
        stored = parts[0].view(self.rows, -1)
        if self.transposed:
            into.copy_(self._columns(stored, first, end).t())
            return
        flat = into.view(end - first, -1)
        step = max(_PIECE_NUMBERS // self.width, 1)
        for at in range(first, end, step):
            to = min(at + step, end)
            rows = stored[at:to] if self.index is None else stored[self.index[at:to]]
            if self.minus or self.logs or self.columns is not None:
                flat[at - first : to - first] = self._changed(numbers_of(rows, self.kind).float())
            else:
                fill_numbers(rows, self.kind, flat[at - first : to - first])

    def _changed(self, numbers: Tensor) -> Tensor:
        numbers = numbers if self.columns is None else numbers[:, self.columns]
        return torch.log(-numbers) if self.logs else numbers - self.minus

    def _columns(self, stored: Tensor, first: int, end: int) -> Tensor:
        blocks = stored.view(self.rows, -1, self.kind.nbytes)
        low, high = first // self.kind.numbers, -(-end // self.kind.numbers)
        found = numbers_of(blocks[:, low:high].reshape(self.rows, -1).contiguous(), self.kind)
        skip = first - low * self.kind.numbers
        return found[:, skip : skip + end - first]
