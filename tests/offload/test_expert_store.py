"""The experts of one layer in their places: whoever asks for one gets that one, whatever was read or failed before."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from griffin_offload.offload.expert_store import ExpertBuffers, ExpertCache, ExpertStore

EXPERTS, PLACES, TOP = 6, 3, 2
SHAPES = ((4, 3), (2, 5))


class Unreliable(ExpertStore):
    """Fails when told to, with half of an expert read."""

    failing = False

    def read(self, layer: int, expert: int, into: Sequence[Tensor]) -> None:
        if self.failing:
            into[0].fill_(-1)
            raise OSError("the disk is gone")
        super().read(layer, expert, into)


def _layer() -> tuple[list[Tensor], Unreliable, ExpertCache]:
    full = [torch.arange(EXPERTS, dtype=torch.float32)[:, None, None] + torch.zeros(EXPERTS, *s) for s in SHAPES]
    store = Unreliable({0: full}, evict=False)
    places = [torch.zeros(PLACES, *shape) for shape in SHAPES]
    return full, store, ExpertCache(0, store, places, ExpertBuffers(), EXPERTS)


def _right(full: list[Tensor], found: Sequence[Tensor], expert: int) -> bool:
    return all(torch.equal(tensor, whole[expert]) for tensor, whole in zip(found, full, strict=True))


def _decode(cache: ExpertCache, experts: Sequence[int]) -> None:
    index = torch.tensor([experts])
    cache.begin(experts, index, torch.ones(index.shape))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.permutations(range(EXPERTS)), st.booleans()), min_size=1, max_size=25))
def test_every_token_gets_its_experts(steps: list[tuple[list[int], bool]]):
    full, store, cache = _layer()
    failed = 0
    for order, store.failing in steps:
        experts, absent = order[:TOP], set(order[:TOP]) - set(cache.residents)
        _decode(cache, experts)
        for expert in experts:
            if store.failing and expert in absent:
                with pytest.raises(OSError, match="gone"):
                    cache.tensors(expert)
                failed += 1
            else:
                assert _right(full, cache.tensors(expert), expert)
        assert len(cache.residents) <= PLACES
    store.failing = False
    assert store.reads == cache.misses - failed
    assert store.fetched_bytes == store.reads * store.expert_bytes(0)
    cache.place(range(PLACES))  # no place was lost
    assert cache.residents == list(range(PLACES))
    _decode(cache, cache.residents)
    assert all(_right(full, cache.tensors(expert), expert) for expert in cache.residents)
