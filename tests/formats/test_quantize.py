"""int8 and scales against the formulas in float64: every number on the nearest level of its row's grid."""

from collections.abc import Iterator
from unittest import mock

import pytest
import quantised_reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from griffin_offload.demo import demo_directory
from griffin_offload.errors import CheckpointError
from griffin_offload.formats import base
from griffin_offload.formats.base import neuron_scale, row_scale
from griffin_offload.formats.int8 import INT8
from griffin_offload.kernels import table

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Quotients are computed in float32: so much of a level is lost.
SLACK = 1e-4


@st.composite
def matrices(draw: st.DrawFn, outputs: st.SearchStrategy[int], inputs: st.SearchStrategy[int]) -> Tensor:
    """Any precision; ordinary, tiny, huge, far from zero; some rows and columns zero, some far larger than others."""
    shape = draw(outputs), draw(inputs)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from(DTYPES))
    gain = draw(st.sampled_from([1.0, 1e-3, 1e3] if dtype == torch.float16 else [1.0, 1e-12, 1e15]))
    weight = gain * (torch.randn(shape, generator=generator, dtype=torch.float64) + draw(st.sampled_from([0, 0, 8])))
    spread = draw(st.sampled_from([1.0, 1.0, 1e-3]))
    weight[torch.rand(shape[0], generator=generator) < 0.3] *= spread
    weight[:, torch.rand(shape[1], generator=generator) < 0.3] *= spread
    zeros = draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))
    weight[torch.rand(shape[0], generator=generator) < zeros] = 0
    weight[:, torch.rand(shape[1], generator=generator) < zeros] = 0
    return weight.to(dtype)


@pytest.fixture(autouse=True, params=["kernels", "torch"])
def _by(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways, whichever this machine would choose."""
    with table.leaving_out(lambda kernel: kernel.ours and request.param == "torch"):
        yield


@st.composite
def small_blocks(draw: st.DrawFn) -> int:
    """Numbers in a block: one row, some, the whole matrix."""
    return draw(st.sampled_from([1, 100, 2**20]))


def _close_to_exact(found: Tensor, exact: Tensor) -> None:
    """`found` is `exact`, rounded to its precision after a calculation in float32."""
    eps = max(torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps)
    tiny = torch.finfo(found.dtype).smallest_normal * eps
    torch.testing.assert_close(found.double(), exact, rtol=2 * eps, atol=tiny, check_dtype=False)


def _on_the_nearest_level(weight: Tensor, levels: Tensor, grid: ref.Quantised) -> Tensor:
    """Check each level, and return by how many levels its number is missed [O, I]."""
    assert levels.min() >= grid.lowest
    assert levels.max() <= grid.highest
    within = grid.quotient.clamp(grid.lowest, grid.highest)
    # Where the step is zero every level stands for the same number.
    assert torch.where(grid.step > 0, (levels - within).abs(), 0).max() <= 0.5 + SLACK * (1 + grid.quotient.abs().max())
    return torch.where(grid.step > 0, (grid.at(levels) - weight.double()).abs() / grid.step.clamp(1e-300), 0)


def _normal(scale: Tensor) -> Tensor:
    """Where `scale` is no number that its precision has but a few bits for."""
    return scale.abs() >= torch.finfo(scale.dtype).smallest_normal


@settings(max_examples=60)
@given(matrices(st.integers(1, 6), st.integers(1, 70)), st.sampled_from(DTYPES), small_blocks())
def test_int8_is_within_half_a_step(weight: Tensor, dtype: torch.dtype, block: int):
    if dtype == torch.float16 and weight.abs().max() > 1e6:
        return  # refused: see below
    levels = torch.empty(weight.shape, dtype=torch.int8)
    before = weight.clone()
    with mock.patch.object(base, "BLOCK_NUMBERS", block):
        scale = INT8.scale_of(weight, dtype)
        INT8.write(weight, scale, levels)
    assert torch.equal(weight, before)
    _close_to_exact(scale, ref.int8_scale(weight))
    error = _on_the_nearest_level(weight, levels, ref.int8(weight, scale))
    assert error[_normal(scale)].numel() == 0 or error[_normal(scale)].max() <= 0.5 + SLACK
    assert torch.all(levels[weight.abs().amax(1) == 0] == 0)


@settings(max_examples=60)
@given(matrices(st.integers(1, 6), st.integers(1, 70)), st.sampled_from(DTYPES), small_blocks())
def test_int8_of_a_down_projection_is_within_half_a_step(weight: Tensor, dtype: torch.dtype, block: int):
    if dtype == torch.float16 and weight.abs().max() > 1e4:
        return
    levels = torch.empty(weight.shape, dtype=torch.int8)
    with mock.patch.object(base, "BLOCK_NUMBERS", block):
        columns = INT8.input_scale_of(weight, dtype)
        scale = INT8.scale_of(weight, dtype, columns)
        INT8.write(weight, scale, levels, columns)
    _close_to_exact(columns, ref.int8_input_scale(weight))
    _close_to_exact(scale, ref.int8_scale(weight, columns))
    error = _on_the_nearest_level(weight, levels, ref.int8(weight, scale, columns))
    normal = _normal(scale)[:, None] & _normal(columns)
    assert error[normal].numel() == 0 or error[normal].max() <= 0.5 + SLACK


@settings(max_examples=30)
@given(matrices(st.integers(1, 40), st.integers(1, 40)), st.data())
def test_an_output_is_rounded_as_finely_however_large_the_others_are(weight: Tensor, data: st.DataObject):
    """Rows times powers of two have the same numbers in int8, and norms of neurons are those of what it holds."""
    gains = data.draw(st.lists(st.integers(-9, 9), min_size=weight.shape[0], max_size=weight.shape[0]))
    larger = weight * torch.tensor(gains).exp2()[:, None]
    one, other = (INT8.quantize(own, torch.float32, is_down=True) for own in (weight, larger))
    if _normal(one["scale"]).all() and _normal(other["scale"]).all():
        assert torch.equal(one["weight"], other["weight"])
        assert torch.equal(one["input_scale"], other["input_scale"])
    values = other["weight"].double() * other["scale"].double()[:, None] * other["input_scale"].double()
    if 1e-10 < larger.abs().max() < 1e10:
        torch.testing.assert_close(INT8.column_norms(other).double(), values.norm(dim=0), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("gain", [1e-30, 1e-17, 1.0, 1e17])
def test_norms_whose_squares_float32_cannot_hold(gain: float):
    weight = gain * torch.tensor([[1.0, 3e-5, 0.0], [0.5, -2e-5, 0.0]])
    _close_to_exact(neuron_scale(weight, torch.float32), ref.neuron_scale(weight))
    _close_to_exact(row_scale(weight.t(), torch.float32), ref.row_scale(weight.t()))
    _close_to_exact(row_scale(weight.t().contiguous(), torch.float32), ref.row_scale(weight.t()))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_infinities_are_refused(value: float, dtype: torch.dtype):
    weight = torch.ones(32, 32, dtype=dtype)
    weight[3, 5] = value
    columns = torch.ones(32, dtype=dtype)
    for quantise in (
        lambda: INT8.scale_of(weight, dtype),
        lambda: INT8.scale_of(weight, dtype, columns),
        lambda: neuron_scale(weight, dtype),
        lambda: INT8.input_scale_of(weight, dtype),
        lambda: row_scale(weight, dtype),
    ):
        with pytest.raises(CheckpointError, match=r"infinities or NaN.*--quantize none"):
            quantise()


def test_scales_that_their_precision_cannot_hold_are_refused():
    weight = torch.full((32, 32), 1e8)
    weight[:, ::2] = -1e8
    for quantise in (INT8.scale_of, neuron_scale, row_scale):
        with pytest.raises(CheckpointError, match="cannot be quantised"):
            quantise(weight, torch.float16)


def test_int8_loses_less_than_a_percent_of_every_matrix_of_the_demo():
    model = AutoModelForCausalLM.from_pretrained(demo_directory(), dtype=torch.bfloat16)
    matrices = ref.layer_matrices(model)
    assert len(matrices) == 6 * 7
    for name, weight in matrices.items():
        weight = weight.detach()
        columns = INT8.input_scale_of(weight, torch.bfloat16) if name.endswith("down_proj") else None
        scale = INT8.scale_of(weight, torch.bfloat16, columns)
        levels = torch.empty(weight.shape, dtype=torch.int8)
        INT8.write(weight, scale, levels, columns)
        values = levels.double() * scale.double()[:, None]
        values = values if columns is None else values * columns.double()
        assert (values - weight.double()).norm() < 0.01 * weight.double().norm(), name
