"""The kernels of gathering.c against torch's own indexing, over shapes, types, tiles and threads."""

import pytest
import quantised_reference as ref
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from griffin_offload.kernels import gathering
from griffin_offload.kernels.compiled import library
from griffin_offload.kernels.gathering import gather_columns, gather_neurons_to_tiles, gather_rows_to_tiles

LOADED = library()
needs_kernels = pytest.mark.skipif(LOADED is None, reason="another processor, or no compiler")
needs_vbmi2 = pytest.mark.skipif(
    LOADED is None or not LOADED.leaves_out, reason="this processor brings no chosen bytes side by side"
)
MARK = 0xA5


def _chosen(draw: st.DrawFn, total: int) -> Tensor:
    """Some of `total`, in order; all and none are likely."""
    count = draw(st.sampled_from([0, total]) | st.integers(0, total))
    return torch.randperm(total, generator=torch.Generator().manual_seed(count))[:count].sort().values


def _numbers(*shape: int, high: int = 256) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.uint8)


@needs_vbmi2
@given(data=st.data())
def test_columns(data: st.DataObject):
    """Also between rows that lie apart: what is between them stays."""
    rows, columns = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 300))
    dtype = data.draw(st.sampled_from([torch.int8, torch.uint8, torch.bfloat16, torch.float16]))
    chosen, apart = data.draw(st.composite(_chosen)(columns)), data.draw(st.integers(0, 70))
    torch.set_num_threads(data.draw(st.sampled_from([1, 2, 3])))
    bytes_each, before = dtype.itemsize, data.draw(st.sampled_from([0, 0, 3]))
    source = _numbers(rows, (before + columns) * bytes_each)
    room = torch.zeros(rows, chosen.numel() + apart, dtype=dtype)
    out = room.view(torch.uint8).fill_(MARK)
    assert gather_columns(source.view(dtype)[:, before:], chosen, room[:, : chosen.numel()])
    expected = torch.full_like(out, MARK)
    expected[:, : chosen.numel() * bytes_each] = source.view(rows, -1, bytes_each)[:, before + chosen].flatten(1)
    assert torch.equal(out, expected)


@needs_kernels
@given(data=st.data())
def test_rows_to_tiles(data: st.DataObject):
    """As what int4_tiles.py describes, written out; rows that fill up are zero, and nothing else is touched."""
    stored, groups = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 7))
    block, filled = data.draw(st.sampled_from([(32, 32), (32, 64), (64, 64)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    chosen, before = data.draw(st.composite(_chosen)(stored)), data.draw(st.integers(0, 2)) * 64
    torch.set_num_threads(data.draw(st.sampled_from([1, 2, 3])))
    levels, count = _numbers(stored, groups * 32, high=16), chosen.numel()
    scales = torch.randn(stored, groups, 2, generator=torch.Generator().manual_seed(stored)).to(dtype)
    end = before + -(-count // filled) * filled
    tiles = torch.full((end + 64, groups * 16), MARK, dtype=torch.uint8)
    tile_scales = torch.full((groups, end + 64, 2), 7, dtype=dtype)
    assert gather_rows_to_tiles((ref.packed(levels), scales), chosen, (tiles, tile_scales), before, filled, block)
    made = torch.zeros(end - before, groups * 32, dtype=torch.uint8)
    made[:count] = levels[chosen]
    expected = torch.full_like(tiles, MARK)
    expected[before:end] = _tiles(made, block)
    expected_scales = torch.full_like(tile_scales, 7)
    expected_scales[:, before:end] = 0
    expected_scales[:, before : before + count] = scales[chosen].transpose(0, 1)
    assert torch.equal(tiles, expected)
    assert torch.equal(tile_scales, expected_scales)


@needs_kernels
@given(data=st.data())
def test_neurons_to_tiles(data: st.DataObject):
    stored, half_blocks = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 7))
    block, outputs = data.draw(st.sampled_from([32, 64])), 32 * half_blocks
    chosen, before, after = data.draw(st.composite(_chosen)(stored)), *data.draw(st.tuples(*2 * [st.integers(0, 70)]))
    torch.set_num_threads(data.draw(st.sampled_from([1, 2, 3])))
    levels, padded = _numbers(stored, outputs, high=16), -(-outputs // 64) * 64
    inputs = before + chosen.numel() + after
    inputs += inputs % 2
    tiles = torch.full((padded, inputs // 2), MARK, dtype=torch.uint8)
    assert gather_neurons_to_tiles(ref.packed(levels), chosen, tiles, before, block)
    made = torch.zeros(chosen.numel(), padded, dtype=torch.uint8)
    made[:, :outputs] = levels[chosen]
    expected = torch.full((padded // block, inputs, block // 2), MARK, dtype=torch.uint8)
    low, high = made.t().reshape(padded // block, 2, block // 2, chosen.numel()).unbind(1)
    expected[:, before : before + chosen.numel()] = (low | high << 4).transpose(1, 2)
    assert torch.equal(tiles, expected.view(tiles.shape))


def _tiles(levels: Tensor, block: int) -> Tensor:
    """Levels [O, I] in tiles [O, I / 2]: for each input of a block, output i (low) and i + half a block."""
    low, high = levels.reshape(-1, 2, block // 2, levels.shape[1]).unbind(1)
    return (low | high << 4).transpose(1, 2).reshape(levels.shape[0], levels.shape[1] // 2)


@needs_kernels
def test_columns_that_are_not_in_order_are_left_to_torch():
    source = _numbers(3, 100)
    for chosen in ([5, 4], [5, 5], [-1, 5]):
        assert not gather_columns(source, torch.tensor(chosen), torch.empty(3, 2, dtype=torch.uint8))


def test_columns_that_the_kernel_does_not_know_need_no_library(monkeypatch: pytest.MonkeyPatch):
    """Where there is none, asking for it warns."""
    monkeypatch.setattr(gathering, "library", lambda: pytest.fail("the library was asked for"))
    assert not gather_columns(torch.zeros(3, 100), torch.tensor([0, 1]), torch.empty(3, 2))


@needs_vbmi2
@pytest.mark.parametrize(
    ("chosen", "shape", "dtype"),
    [([0, 100], (3, 2), torch.uint8), ([0, 1], (3, 3), torch.uint8), ([0, 1], (2, 2), torch.uint8),
     ([0, 1], (3, 2), torch.int8)],
)  # fmt: skip
def test_columns_of_wrong_sizes_are_refused(chosen: list[int], shape: tuple[int, int], dtype: torch.dtype):
    with pytest.raises(ValueError, match="of 100 columns"):
        gather_columns(_numbers(3, 100), torch.tensor(chosen), torch.empty(shape, dtype=dtype))


@needs_kernels
@pytest.mark.parametrize(
    ("chosen", "start", "filled", "change"),
    [
        ([10], 0, 64, "none"),
        ([-1], 0, 64, "none"),
        ([1], 32, 64, "none"),
        ([1], 0, 40, "none"),
        ([1], 128, 64, "none"),
        ([1], 0, 64, "scales"),
        ([1], 0, 64, "tiles"),
        ([1], 0, 64, "tile_scales"),
    ],
)
def test_rows_of_wrong_sizes_are_refused(chosen: list[int], start: int, filled: int, change: str):
    parts = {
        "packed": _numbers(10, 48),
        "scales": torch.zeros(10, 3, 2),
        "tiles": _numbers(128, 48),
        "tile_scales": torch.zeros(3, 128, 2),
    }
    if change != "none":
        parts[change] = parts[change][:, :-1].contiguous()
    rows, tiles = (parts["packed"], parts["scales"]), (parts["tiles"], parts["tile_scales"])
    with pytest.raises(ValueError, match=r"must be|is asked for|do not fit"):
        gather_rows_to_tiles(rows, torch.tensor(chosen), tiles, start, filled, 64)


@needs_kernels
@pytest.mark.parametrize(
    ("chosen", "start", "outputs", "row_bytes"),
    [([10], 0, 64, 32), ([-1], 0, 64, 32), ([1, 2], 31, 64, 32), ([1], 0, 32, 32), ([1], 0, 64, 31)],
)
def test_neurons_of_wrong_sizes_are_refused(chosen: list[int], start: int, outputs: int, row_bytes: int):
    tiles = _numbers(outputs, 16)  # 32 neurons
    with pytest.raises(ValueError, match=r"must be|is asked for|do not fit"):
        gather_neurons_to_tiles(_numbers(10, row_bytes), torch.tensor(chosen), tiles, start, 64)
