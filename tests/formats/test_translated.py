"""Tensors that are translated a few rows at a time: those that are asked for, and not many more."""

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from griffin_offload.formats.base import take
from griffin_offload.formats.translated import TranslatedTensor

ROWS = 40


@given(index=st.lists(st.integers(0, ROWS - 1), max_size=12))
def test_rows_in_any_order_are_those_of_the_whole(index: list[int]):
    numbers, translated = torch.randint(0, 256, (ROWS, 4), dtype=torch.uint8), list[int]()

    def decode(parts: Sequence[Tensor], first: int, end: int, into: Tensor) -> None:
        translated.extend(range(first, end))
        into.copy_(parts[0].view(ROWS, 4)[first:end])

    tensor = TranslatedTensor((ROWS, 4), torch.float32, [numbers.flatten()], decode)
    wanted = torch.tensor(index, dtype=torch.long)
    expected = numbers.float()[wanted]
    assert torch.equal(tensor.index_select(0, wanted), expected)
    assert len(translated) <= 4 * len(set(index))
    assert len(translated) == len(set(translated))
    out = torch.empty_like(expected)
    take(tensor, 0, wanted, out)
    assert torch.equal(out, expected)
