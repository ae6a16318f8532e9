"""Blocks of GGUF's types as numbers (gguf_blocks.c), by the thread that asks, without the interpreter's lock.

The package gguf makes the same, to the last bit, by numpy: a pass over memory for every operation.
"""

import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from griffin_offload.kernels.library import NUMBER_TYPES, check, library

_BLOCKS = struct.Struct("@4P3q")
"""The struct Blocks of gguf_blocks.c."""
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""In the order of gguf_blocks.c."""
ON_GRIDS = ("Q4_0", "Q4_1", "Q4_K")
"""Of 16 levels in each 32 numbers."""
_GROUP = 32
_SHORT_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}
_LONG_BYTES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
SIZES = {kind: (nbytes, _GROUP) for kind, nbytes in _SHORT_BYTES.items()}
SIZES |= {kind: (nbytes, 256) for kind, nbytes in _LONG_BYTES.items()}
"""Bytes of a block, and its numbers."""


def takes(blocks: Tensor, out: Tensor | None = None) -> bool:
    """Whether `numbers` fills `out`, if it is asked for them."""
    return out is None or (out.dtype in NUMBER_TYPES and out.is_contiguous() and out.is_cpu)


def numbers(kind: str, blocks: Tensor, out: Tensor) -> None:
    """Fill `out` [R, I], in any precision, from `blocks` [R, bytes], uint8, of one of KINDS."""
    count = _count(blocks, kind)
    check(out, (blocks.shape[0], count * SIZES[kind][1] // max(blocks.shape[0], 1)), name="the numbers")
    found = library()
    assert found is not None, "the table was not asked"
    job = (blocks.data_ptr(), out.data_ptr(), 0, 0, count, KINDS.index(kind), NUMBER_TYPES[out.dtype])
    found.call("numbers_of_blocks", _BLOCKS.pack(*job))


def codes(kind: str, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one of ON_GRIDS: codes of four bits, uint8 [R, I / 2], as int4 has them; of each 32 numbers the step and the
    lowest of 16 levels, float32 [R, I / 32]."""
    count = _count(blocks, kind)
    groups = count * SIZES[kind][1] // _GROUP // max(blocks.shape[0], 1)
    step = torch.empty(blocks.shape[0], groups, dtype=torch.float32, device="cpu")
    packed = torch.empty(blocks.shape[0], groups * _GROUP // 2, dtype=torch.uint8, device="cpu")
    lowest, found = torch.empty_like(step), library()
    assert found is not None, "the table was not asked"
    parts = (tensor.data_ptr() for tensor in (blocks, packed, step, lowest))
    found.call("codes_of_blocks", _BLOCKS.pack(*parts, count, KINDS.index(kind), 0))
    return packed, step, lowest


BY_LAYOUT: dict[str, tuple[str, Callable[..., Any]]] = {
    **{kind: ("numbers_of_blocks", functools.partial(numbers, kind)) for kind in KINDS},
    **{f"{kind}_codes": ("codes_of_blocks", functools.partial(codes, kind)) for kind in ON_GRIDS},
}
"""Names and functions, as the table calls them."""


def _count(blocks: Tensor, kind: str) -> int:
    check(blocks, blocks.shape, torch.uint8, "the blocks")
    if blocks.dim() != 2 or blocks.shape[1] % SIZES[kind][0]:
        raise ValueError(f"rows of {tuple(blocks.shape)} bytes are no whole blocks of {kind}, of {SIZES[kind][0]}")
    return blocks.numel() // SIZES[kind][0]
