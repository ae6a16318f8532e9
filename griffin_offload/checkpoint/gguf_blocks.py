"""Numbers out of llama.cpp's blocks, by the package `gguf`: rows of a matrix as they are needed, in the order that
transformers has them in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from griffin_offload.checkpoint.gguf_file import BlockType
from griffin_offload.errors import UsageError

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# Numbers that are made at once: the formulas of a piece stay in the processor's caches.
_PIECE_NUMBERS = 2**18


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
        _by_package(np.zeros((1, kind.nbytes), dtype=np.uint8), kind)
    except (NotImplementedError, ValueError, KeyError):
        return False
    return True


def _by_package(rows: Any, kind: BlockType) -> Any:
    package = gguf_package()
    with np.errstate(all="ignore"):  # scales that are no numbers are found where the model computes with them
        return package.quants.dequantize(rows, package.GGMLQuantizationType(kind.id))


def numbers_of(rows: Tensor, kind: BlockType) -> Tensor:
    """Rows of bytes [R, bytes], uint8 and contiguous, as numbers [R, I] in float32, or the type they are stored in."""
    if kind.name in _FLOATS:
        return rows.view(_FLOATS[kind.name])
    made: Tensor = torch.from_numpy(_by_package(rows.numpy(), kind))
    return made


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
            numbers = numbers_of(rows, self.kind)
            flat[at - first : to - first] = numbers.float() - self.minus if self.minus else numbers

    def _columns(self, stored: Tensor, first: int, end: int) -> Tensor:
        blocks = stored.view(self.rows, -1, self.kind.nbytes)
        low, high = first // self.kind.numbers, -(-end // self.kind.numbers)
        found = numbers_of(blocks[:, low:high].reshape(self.rows, -1), self.kind)
        skip = first - low * self.kind.numbers
        return found[:, skip : skip + end - first]
