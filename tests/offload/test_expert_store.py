"""The experts of one layer in their places: whoever asks for one gets that one, whatever was read or failed before."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from griffin_offload.checkpoint.direct_io import DirectReader, Extent
from griffin_offload.checkpoint.safetensors import map_file
from griffin_offload.offload.expert_buffers import ExpertBuffers, HostBuffers
from griffin_offload.offload.expert_cache import ExpertCache
from griffin_offload.offload.expert_store import ExpertRead, ExpertStore

EXPERTS, PLACES, TOP = 6, 3, 2
SHAPES = ((4, 3), (2, 5))


class Unreliable(ExpertStore):
    """Fails when told to, with half of an expert read."""

    failing = False

    def finish(self, read: ExpertRead) -> None:
        super().finish(read)
        if self.failing:
            self.reads -= 1
            self.fetched_bytes -= self.expert_bytes(read.layer) * (not read.host)
            self.host_bytes -= self.expert_bytes(read.layer) * read.host
            read.into[0].fill_(-1)
            raise OSError("the disk is gone")


def _layer(limit: int = 1, few: int = 1) -> tuple[list[Tensor], Unreliable, ExpertCache]:
    full = [torch.arange(EXPERTS, dtype=torch.float32)[:, None, None] + torch.zeros(EXPERTS, *s) for s in SHAPES]
    store = Unreliable({0: full}, evict=False)
    places = [torch.zeros(PLACES, *shape) for shape in SHAPES]
    return full, store, ExpertCache(0, store, places, ExpertBuffers(limit, few), EXPERTS)


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


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.permutations(range(EXPERTS)), st.integers(1, EXPERTS), st.booleans()), min_size=1),
    st.booleans(),
    st.integers(1, 3),
)
def test_what_the_cpu_computes(steps: list[tuple[list[int], int, bool]], in_place: bool, few: int):
    """Any number of experts at once, where they lie or through few buffers: places that are free take what is missed
    first, and once they are taken nothing changes them, whatever fails."""
    full = [torch.arange(EXPERTS, dtype=torch.float32)[:, None, None] + torch.zeros(EXPERTS, *s) for s in SHAPES]
    store, places = Unreliable({0: full}, evict=not in_place), [torch.zeros(PLACES, *shape) for shape in SHAPES]
    buffers = ExpertBuffers(1, few, HostBuffers(few, few))
    cache, filled, computed = ExpertCache(0, store, places, buffers, EXPERTS), 0, 0
    for order, count, failing in steps:
        store.failing = failing and not in_place
        experts, before = sorted(order[:count]), set(cache.residents)
        index = torch.tensor([experts])
        found = cache.begin(experts, index, torch.ones(index.shape))
        assert sorted(found) == experts
        missing, free = [one for one in experts if one not in before], PLACES - len(before)
        assert cache.away == set(missing[free:])
        assert set(found[len(found) - len(cache.away) :]) == cache.away
        for expert in found:
            if store.failing and expert in missing:
                with pytest.raises(OSError, match="gone"):
                    cache.tensors(expert)
                break
            assert _right(full, cache.tensors(expert), expert)
            computed += expert in cache.away
            filled += expert in missing[:free]
        assert before <= set(cache.residents) <= before | set(missing[:free])
        assert buffers.nbytes == 0
        assert buffers.host.nbytes <= (0 if in_place else few * store.expert_bytes(0))
    assert (store.host_bytes, store.fetched_bytes) == (computed * store.expert_bytes(0), filled * store.expert_bytes(0))
    store.failing = False
    cache.place(range(PLACES))  # no place was lost
    assert cache.residents == list(range(PLACES))


_PASSES = st.lists(
    st.tuples(st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1), min_size=1, max_size=3), st.booleans()),
    min_size=1,
    max_size=6,
)


@pytest.mark.slow
@settings(max_examples=80)
@given(passes=_PASSES, limit=st.integers(1, EXPERTS), restricted=st.booleans())
def test_a_pass_with_any_room(passes: list[tuple[list[set[int]], bool]], limit: int, restricted: bool):
    """Calls of one pass, then a choice among all; with room for all each is read once, and whatever fails is repaired
    by the next."""
    full, store, cache = _layer(limit)
    cache.restrict(restricted)
    for calls, store.failing in passes:
        cache.start_pass()
        before, known, failed = store.reads, set(cache.residents), False
        for call in calls:
            experts = sorted(call)
            _decode(cache, experts)
            for expert in experts:
                try:
                    assert _right(full, cache.tensors(expert), expert)
                except OSError:
                    failed = True
                    break
            if failed:
                break
        needed = set().union(*calls) - known
        if not failed and limit >= EXPERTS:
            assert store.reads - before == len(needed)
        if not failed and not store.failing:
            cache.settle(range(PLACES))
        cache.end_pass()
        assert len(cache.residents) <= PLACES
        store.failing = False
        cache.restrict(False)
        there = cache.residents[:TOP]
        if there:
            _decode(cache, there)
            assert all(_right(full, cache.tensors(expert), expert) for expert in there)
        cache.restrict(restricted)
    cache.place(range(PLACES))
    assert cache.residents == list(range(PLACES))


def test_experts_that_are_missing_together(monkeypatch: pytest.MonkeyPatch):
    """All of a token's are on their way before the first is waited for."""
    full, store, cache = _layer(limit=4, few=2)
    cache.place([0, 1, 2])
    log: list[tuple[str, int]] = []
    start, finish = store.start, store.finish
    monkeypatch.setattr(store, "start", lambda layer, e, *a, **b: log.append(("start", e)) or start(layer, e, *a, **b))
    monkeypatch.setattr(store, "finish", lambda read: (log.append(("finish", read.expert)), finish(read))[1])
    for _ in range(3):  # 4 and 5 come to be used more than what is there
        _decode(cache, [4, 5])
        assert all(_right(full, cache.tensors(expert), expert) for expert in (4, 5))
    assert log[:4] == [("start", 4), ("start", 5), ("finish", 4), ("finish", 5)]
    assert {4, 5} <= set(cache.residents)


@pytest.mark.parametrize("evict", [False, True])
def test_experts_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evict: bool):
    """Copied by readers, past the page cache where it is too small for the model, as it lies in the file."""
    full = {f"{i}": torch.randn(EXPERTS, 100, size, dtype=torch.float32).bfloat16() for i, size in enumerate((37, 64))}
    save_file(full, tmp_path / "experts.safetensors")
    mapped = map_file(tmp_path / "experts.safetensors")
    copied: list[int] = []
    copy = DirectReader.copy

    def count(reader: DirectReader, extent: Extent, target: Tensor) -> None:
        copied.append(extent.nbytes)
        copy(reader, extent, target)

    monkeypatch.setattr(DirectReader, "copy", count)
    with contextlib.closing(ExpertStore({0: list(mapped.values())}, evict=evict)) as store:
        for expert in (3, 0, 5):
            into = [torch.empty(tensor.shape[1:], dtype=torch.bfloat16) for tensor in mapped.values()]
            store.read(0, expert, into)
            assert all(torch.equal(found, full[name][expert]) for name, found in zip(mapped, into, strict=True))
            wide = [tensor.float() for tensor in into]
            store.read(0, expert, wide)  # another precision: made by whoever waits
            assert all(torch.equal(found, one.float()) for found, one in zip(wide, into, strict=True))
    assert sum(copied) == (3 * store.expert_bytes(0) if evict else 0)
    assert store.fetched_bytes == 6 * store.expert_bytes(0)
