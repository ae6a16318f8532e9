"""A matrix a few rows at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_NUMBERS = 2**20  # float32 copies of a block stay in the cache


def row_blocks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, float32 copy) of each block of rows."""
    rows = max(1, BLOCK_NUMBERS // max(weight.shape[1], 1))
    for start in range(0, weight.shape[0], rows):
        yield start, weight[start : start + rows].to(torch.float32, copy=True).contiguous()
