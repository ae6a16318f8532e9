"""The kernels of gather.c against torch's own indexing, over shapes, types and threads."""

import pytest
import quantised_reference as ref
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from griffin_offload.formats.int4 import INT4
from griffin_offload.kernels import table
from griffin_offload.kernels.gather import (
    columns_of_int4,
    gather_columns,
    gather_neurons_to_strips,
    takes_columns,
    takes_neurons,
)
from griffin_offload.kernels.library import library

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
    columns = source.view(dtype)[:, before:], chosen, room[:, : chosen.numel()]
    assert takes_columns(*columns)
    gather_columns(*columns)
    expected = torch.full_like(out, MARK)
    expected[:, : chosen.numel() * bytes_each] = source.view(rows, -1, bytes_each)[:, before + chosen].flatten(1)
    assert torch.equal(out, expected)


@needs_kernels
@given(data=st.data())
def test_neurons_to_strips(data: st.DataObject):
    """As what grouped.py describes; outputs that fill up the last strip and neurons beside those chosen stay."""
    stored, per_neuron, own = data.draw(st.tuples(st.integers(1, 300), st.integers(1, 7), st.sampled_from([8, 12, 16])))
    chosen, before, after = data.draw(st.composite(_chosen)(stored)), *data.draw(st.tuples(*2 * [st.integers(0, 70)]))
    torch.set_num_threads(data.draw(st.sampled_from([1, 2, 3])))
    codes, groups = _numbers(stored, per_neuron * own), _numbers(stored, per_neuron, 2)
    kept, strips = before + chosen.numel() + after, -(-per_neuron // 2)
    out = torch.full((strips, kept, 2 * own), MARK).byte(), torch.full((2 * strips, kept, 2), MARK).byte()
    assert takes_neurons((codes, groups))
    gather_neurons_to_strips((codes, groups), chosen, out, before)
    expected = torch.full((kept, strips * 2 * own), MARK).byte(), torch.full((kept, 2 * strips, 2), MARK).byte()
    inside = slice(before, before + chosen.numel())
    expected[0][inside, : per_neuron * own], expected[1][inside, :per_neuron] = codes[chosen], groups[chosen]
    for found, whole in zip(out, ref.rows_as_strips(*expected), strict=True):
        assert torch.equal(found, whole)


@needs_kernels
@given(data=st.data())
def test_columns_of_int4(data: st.DataObject):
    """The same to the last bit as torch's, in any order, several times, too."""
    rows, count = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 9))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, 32 * count - 1), min_size=1, max_size=100)))
    torch.set_num_threads(data.draw(st.sampled_from([1, 2, 3])))
    stored = _numbers(rows, 16 * count), _numbers(rows, count, 2), torch.rand(rows) * 0.01
    found, expected = (torch.empty(rows, chosen.numel(), dtype=dtype) for _ in range(2))
    columns_of_int4(*stored, chosen, found)
    INT4.columns_by_torch(*stored, chosen, expected)
    assert torch.equal(found, expected)


@needs_kernels
@pytest.mark.parametrize("change", range(6))
def test_columns_of_int4_of_wrong_sizes_are_refused(change: int):
    scale, chosen, out = torch.ones(3), torch.tensor([5, 63]), torch.empty(3, 2)
    tensors = [_numbers(3, 32), _numbers(3, 2, 2), scale, chosen, out]
    wrong = [_numbers(3, 31), _numbers(3, 2, 1), scale[:2], chosen + 1, out[:, :1], chosen - 6]
    tensors[min(change, 3) if change != 4 else 4] = wrong[change]
    with pytest.raises(ValueError, match=r"must be|is asked for"):
        columns_of_int4(*tensors)


@needs_kernels
def test_columns_that_are_not_in_order_are_left_to_torch():
    source = _numbers(3, 100)
    for chosen in ([5, 4], [5, 5], [-1, 5]):
        assert not takes_columns(source, torch.tensor(chosen), torch.empty(3, 2, dtype=torch.uint8))


def test_columns_that_the_kernel_does_not_know_need_no_library(monkeypatch: pytest.MonkeyPatch):
    """Where there is none, asking for it warns."""
    table.forget()
    monkeypatch.setattr(table, "library", lambda: pytest.fail("the library was asked for"))
    assert not any(kernel.ours for kernel in table.candidates("gather", "columns", torch.zeros(3, 100)))


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
    ("chosen", "start", "change"),
    [([10], 0, ""), ([-1], 0, ""), ([1, 2], 31, ""), *(([1], 0, f"{n}{axis}") for n in range(4) for axis in (0, 1))],
)
def test_neurons_of_wrong_sizes_are_refused(chosen: list[int], start: int, change: str):
    tensors = [_numbers(10, 48), _numbers(10, 3, 2), _numbers(2, 32, 32), _numbers(4, 32, 2)]  # of 96 outputs
    if change not in ("", "01"):
        which, axis = int(change[0]), int(change[1])
        tensors[which] = tensors[which].narrow(axis, 0, tensors[which].shape[axis] - 1).contiguous()
    elif change:
        tensors[0] = _numbers(10, 47)
    with pytest.raises(ValueError, match=r"must be|is asked for|do not fit"):
        gather_neurons_to_strips((tensors[0], tensors[1]), torch.tensor(chosen), (tensors[2], tensors[3]), start)


@needs_kernels
def test_neurons_that_do_not_lie_in_one_piece_are_left_to_torch():
    codes, out = _numbers(10, 96)[:, ::2], (_numbers(2, 32, 32), _numbers(4, 32, 2))
    assert not table.choose(
        "gather", "int4_strips", (codes, _numbers(10, 3, 2)), torch.tensor([1]), out, 0, like=codes
    ).ours
