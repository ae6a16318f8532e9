"""The kernels of quantizing.c against torch, which does their work elsewhere: the same numbers, bit by bit."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from griffin_offload.errors import CheckpointError
from griffin_offload.kernels import quantizing
from griffin_offload.kernels.compiled import library
from griffin_offload.weights import quantize

needs_kernels = pytest.mark.skipif(library() is None, reason="another processor, or no compiler")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MARK = 77


@st.composite
def matrices(draw: st.DrawFn, outputs: st.SearchStrategy[int], inputs: st.SearchStrategy[int]) -> Tensor:
    """Of any type, also with rows that lie apart; some rows and columns are zero."""
    rows, columns, apart = draw(outputs), draw(inputs), draw(st.sampled_from([0, 0, 5]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    weight = torch.randn(rows, columns + apart, generator=generator) + draw(st.sampled_from([0, 0, 3]))
    weight[torch.rand(rows, generator=generator) < 0.2] = 0
    weight[:, torch.rand(columns + apart, generator=generator) < 0.2] = 0
    torch.set_num_threads(draw(st.sampled_from([1, 2, 3])))
    return weight.to(draw(st.sampled_from(DTYPES)))[:, :columns]


def _by_torch() -> mock._patch:
    return mock.patch.object(quantizing, "library", return_value=None)


def _norms(weight: Tensor) -> Tensor:
    return torch.where((weight == 0).all(0), 0, 1 + torch.arange(weight.shape[1]) % 7).to(weight.dtype)


WIDTHS = st.integers(1, 40) | st.sampled_from([511, 512, 513, 1040, 2048, 2049, 4200])


@needs_kernels
@settings(max_examples=60)
@given(matrices(st.integers(1, 20), WIDTHS), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 9))
def test_int8(weight: Tensor, dtype: torch.dtype, scaled: bool, apart: int):
    """Also into rows that lie apart: what is between them stays."""
    columns = _norms(weight) if scaled else None
    rows, width = weight.shape
    out, expected = (torch.full((rows, width + apart), MARK, dtype=torch.int8) for _ in range(2))
    scale = quantize.int8_scale(weight, dtype, columns)
    quantize.quantize_int8(weight, scale, out[:, :width], columns)
    with _by_torch():
        assert torch.equal(quantize.int8_scale(weight, dtype, columns), scale)
        quantize.quantize_int8(weight, scale, expected[:, :width], columns)
    assert torch.equal(out, expected)


@needs_kernels
@settings(max_examples=60)
@given(matrices(st.integers(1, 20), st.sampled_from([32, 64, 96, 512, 544, 1600])), st.sampled_from(DTYPES))
def test_int4_rows(weight: Tensor, dtype: torch.dtype):
    packed, scales = quantize.quantize_int4_rows(weight, dtype)
    with _by_torch():
        expected, expected_scales = quantize.quantize_int4_rows(weight, dtype)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(packed, expected)


@needs_kernels
@settings(max_examples=60)
@given(matrices(st.sampled_from([32, 64, 160, 320]), st.integers(1, 100)), st.sampled_from(DTYPES))
def test_int4_neurons(weight: Tensor, dtype: torch.dtype):
    columns = _norms(weight)
    scale = torch.linspace(0, 1, weight.shape[0]).to(dtype)
    packed = quantize.quantize_int4_neurons(weight, columns, scale)
    with _by_torch():
        assert torch.equal(packed, quantize.quantize_int4_neurons(weight, columns, scale))


@needs_kernels
@settings(max_examples=60)
@given(matrices(st.integers(1, 20), WIDTHS))
def test_norms_of_columns(weight: Tensor):
    found = quantize.neuron_scale(weight, torch.float32)
    exact = weight.double().square().mean(0).sqrt()
    torch.testing.assert_close(found.double(), exact, rtol=1e-7, atol=0)
    with _by_torch():
        assert torch.equal(quantize.neuron_scale(weight, torch.float32), found)


@needs_kernels
@settings(max_examples=60)
@given(matrices(st.integers(1, 20), WIDTHS), st.sampled_from(DTYPES))
def test_scales_of_int4_neurons(weight: Tensor, dtype: torch.dtype):
    """Where two steps miss a row alike, sums in another order may choose the other one."""
    columns = _norms(weight)
    found = quantize.int4_scale(weight, dtype, columns).double()
    with _by_torch():
        expected = quantize.int4_scale(weight, dtype, columns).double()
    alike = torch.isclose(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    stride = max(1, weight.shape[1] // 512)
    sample = (weight.double() / torch.where(columns == 0, 1, columns))[:, ::stride]
    for row in (~alike).nonzero().flatten().tolist():
        missed = [_missed(sample[row], step) for step in (found[row], expected[row])]
        assert missed[0] == pytest.approx(missed[1], rel=1e-4)


def _missed(row: Tensor, step: Tensor) -> float:
    levels = (row / step + 7.5).round().clamp(0, 15)
    return float(((levels - 7.5) * step - row).square().sum())


@needs_kernels
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 1, 9, 31, 520, 543])
def test_one_number_that_is_none_is_found_anywhere(value: float, place: int):
    weight = torch.randn(64, 544, generator=torch.Generator().manual_seed(0))
    weight[33, place] = value
    columns = torch.ones(544)
    for quantise in (
        lambda: quantize.int8_scale(weight, torch.float32),
        lambda: quantize.int8_scale(weight, torch.float32, columns),
        lambda: quantize.neuron_scale(weight, torch.float32),
        lambda: quantize.quantize_int4_rows(weight, torch.float32),
        lambda: quantize.int4_scale(weight[:, place:], torch.float32, columns[place:]),
    ):
        with pytest.raises(CheckpointError, match="infinities or NaN"):
            quantise()


def test_an_offset_that_its_precision_cannot_hold_is_refused():
    """A group of large numbers that are all alike has a scale of zero."""
    for weight in (torch.full((1, 32), 1e8), torch.full((1, 32), 1e8, dtype=torch.float64)):
        with pytest.raises(CheckpointError, match="cannot be quantised"):
            quantize.quantize_int4_rows(weight, torch.float16)


@needs_kernels
def test_matrices_that_stay_torchs():
    ones = torch.ones(32, 64)
    for weight in (ones.double(), ones.t(), torch.ones(32, 32, device="meta")):
        assert quantizing.largest_of_rows(weight, None) is None
        assert quantizing.column_norms(weight) is None
        assert quantizing.quantize_int4_rows(weight, torch.float32) is None
    assert quantizing.quantize_int4_rows(ones, torch.float64) is None


@needs_kernels
def test_sizes_that_do_not_fit_are_refused():
    weight, ones = torch.ones(40, 48), torch.ones(48)
    bytes_of = torch.empty(40, 48, dtype=torch.int8)
    for wrong in (
        lambda: quantizing.largest_of_rows(weight, ones[1:]),
        lambda: quantizing.quantize_int8(weight, ones, bytes_of, None),
        lambda: quantizing.quantize_int8(weight, ones[:40], bytes_of[1:], None),
        lambda: quantizing.quantize_int8(weight, ones[:40], bytes_of.view(torch.uint8), None),
        lambda: quantizing.quantize_int4_rows(weight, torch.float32),
        lambda: quantizing.quantize_int4_neurons(weight, ones, ones[:40]),
        lambda: quantizing.int4_scales(torch.ones(2, 1025), torch.ones(1025), [0.3], 1),
    ):
        with pytest.raises(ValueError, match=r"must be|are known"):
            wrong()
