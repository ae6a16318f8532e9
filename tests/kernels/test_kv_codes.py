"""Kernels write tokens as codes, and attend to codes, as the KV cache's own stores do: to the last bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from griffin_offload.kernels.attention import (
    KeptStates,
    KeptToken,
    SeenTokens,
    each_token,
    kernels_know,
    packed_states,
)
from griffin_offload.kernels.library import HALVES, library
from griffin_offload.kv_cache.store import DequantBuffer, Int4Keys, Int4Values, Int8Store, QuantizedStore

pytestmark = pytest.mark.skipif(library() is None, reason="another processor, or no compiler")
of_all_stores = pytest.mark.parametrize("store_type", [Int8Store, Int4Values, Int4Keys])
Stores = type[QuantizedStore]


def _stores(store_type: Stores, like: Tensor, tokens: int, count: int = 2) -> list[QuantizedStore]:
    return [store_type(like, tokens, DequantBuffer()) for _ in range(count)]


def _states(draw_seed: int, heads: int, tokens: int, size: int, dtype: torch.dtype) -> Tensor:
    """Numbers of any size, some of them zero, with tokens and numbers that stand out."""
    generator = torch.Generator().manual_seed(draw_seed)
    states = torch.randn(1, heads, tokens, size, generator=generator)
    states[:, :, ::5] *= 50
    states[..., 3] *= 30
    states[:, -1, 1::4] = 0
    states[:, 0, :, 4:8] = 0.25  # a group of which all are alike has no step
    return states.to(dtype)


@of_all_stores
@given(
    seed=st.integers(0, 99),
    heads=st.integers(1, 5),
    size=st.sampled_from([16, 32, 48, 80, 128]),
    before=st.integers(0, 70),
    dtype=st.sampled_from(sorted(HALVES, key=str)),
)
@settings(max_examples=25)
def test_tokens_become_the_same_codes(
    store_type: Stores, seed: int, heads: int, size: int, before: int, dtype: torch.dtype
):
    """One by one behind a prompt, across the ends of groups."""
    states = _states(seed, heads, before + 40, size, dtype)
    own, expected = _stores(store_type, states, before + 40)
    for store in (own, expected):
        store.write(0, states[:, :, :before])
    expected.write(before, states[:, :, before:])
    wide = torch.zeros(heads, 2 * size, dtype=dtype)  # heads that lie apart, as projections give them
    write = None
    for place in range(before, before + 40):
        wide[:, :size] = states[0, :, place]
        own.at(place)
        if write is None:
            write = KeptToken(wide[:, :size], own.kept_states, place)
        else:
            write.go_to(own.kept_states, place)
            library().call("keep_token", write.job)
    for found, right in zip(own.parts(before + 40), expected.parts(before + 40), strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("value_type", [Int8Store, Int4Values])
@pytest.mark.parametrize("key_type", [Int8Store, Int4Keys])
@given(
    seed=st.integers(0, 99),
    heads=st.integers(1, 3),
    shared=st.integers(1, 7),
    sizes=st.tuples(*[st.sampled_from([16, 48, 80, 128, 256, 576])] * 2),
    ends=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    dtype=st.sampled_from(sorted(HALVES, key=str)),
)
@settings(max_examples=25)
def test_attention_is_that_over_the_numbers(
    key_type: Stores,
    value_type: Stores,
    seed: int,
    heads: int,
    shared: int,
    sizes: tuple[int, int],
    ends: list[int],
    dtype: torch.dtype,
):
    """From any token on, as a window that moves has it."""
    rows, keys, values = [], [], []
    for i, end in enumerate(ends):
        first = (seed * (i + 1)) % end
        stores = []
        for store_type, size, read in ((key_type, sizes[0], keys), (value_type, sizes[1], values)):
            states = _states(seed + i, heads, end, size, dtype)
            (store,) = _stores(store_type, states, end + 3, 1)
            store.write(0, states)
            stores.append(store)
            read.append(store.read(first, end))
        rows.append(SeenTokens(*(store.kept_states for store in stores), first, end))
    query = torch.randn(len(ends), heads * shared, 1, sizes[0], generator=torch.Generator().manual_seed(seed)).to(dtype)
    expected, _ = each_token(None, query, keys, values)
    found, _ = each_token(None, query, keys, values, rows=rows)
    assert torch.equal(found, expected)


def test_what_is_no_number_stays_none():
    """In the token and the head that has it."""
    states = torch.ones(1, 2, 1, 32).bfloat16()
    states[0, 1, 0, 5] = torch.nan
    for store_type in (Int8Store, Int4Values):
        (store,) = _stores(store_type, states, 4, 1)
        KeptToken(states[0, :, 0], store.kept_states, 0)
        assert store.read(0, 1)[0, 0].isfinite().all()
        assert store.read(0, 1)[0, 1].isnan().any()


def test_what_kernels_do_not_know():
    states = torch.ones(1, 2, 1, 24).bfloat16()
    (store,) = _stores(Int8Store, states, 4, 1)
    assert not kernels_know(store.kept_states, states), "24 numbers are no whole vectors of both halves"
    (store,) = _stores(Int8Store, torch.ones(1, 2, 1, 32), 4, 1)
    assert not kernels_know(store.kept_states, torch.ones(1, 2, 1, 32)), "float32"
    with pytest.raises(ValueError, match="a token "):
        KeptToken(torch.ones(3, 32).bfloat16(), KeptStates((torch.ones(1, 2, 4, 32).bfloat16(),), 32), 0)
    with pytest.raises(ValueError, match="side by side"):
        packed_states(KeptStates((torch.ones(1, 2, 4, 64).bfloat16()[..., ::2],), 32))
    ones = torch.ones(1, 2, 4, 32).bfloat16()
    of_two = KeptStates((torch.ones(2, 2, 4, 32).bfloat16(),), 32)
    with pytest.raises(ValueError, match="of one sequence"):
        each_token(None, ones[:, :, :1], [ones], [ones], rows=[SeenTokens(of_two, of_two, 0, 4)])
