"""The int4 format against its formula in float64: what bytes mean, how well they are chosen, and how they lie."""

from collections.abc import Callable, Iterator
from itertools import product
from unittest import mock

import pytest
import quantised_reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from griffin_offload.errors import CheckpointError
from griffin_offload.formats import base
from griffin_offload.formats.base import neuron_scale, row_scale
from griffin_offload.formats.int4 import INT4
from griffin_offload.kernels import table

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Numbers are divided and rounded in float32: so much of a level is lost, of numbers of one step.
SLACK = 1e-5
GROUP = ref.GROUP


@pytest.fixture(autouse=True, params=["kernels", "torch"])
def _by(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways, whichever this machine would choose."""
    with table.leaving_out(lambda kernel: kernel.ours and request.param == "torch"):
        yield


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Rows of any type and size: ordinary, far from zero, constant, with outliers of any size, partly zero."""
    rows, groups = draw(st.integers(1, 11)), draw(st.integers(1, 7))
    shape, generator = (rows, groups * GROUP), torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from(DTYPES))
    weight = torch.randn(shape, generator=generator, dtype=torch.float64) + draw(st.sampled_from([0, 0, 8, -300]))
    for _ in range(draw(st.integers(0, 3))):
        row, column = draw(st.integers(0, rows - 1)), draw(st.integers(0, shape[1] - 1))
        kind = draw(st.sampled_from(["outlier", "constant", "zero group", "zero row", "small group"]))
        group = slice(column // GROUP * GROUP, column // GROUP * GROUP + GROUP)
        if kind == "outlier":
            weight[row, column] *= draw(st.sampled_from([30, -30, 1000]))
        elif kind == "constant":
            weight[row, group] = weight[row, column].clone()
        elif kind == "small group":
            weight[row, group] *= 1e-5
        else:
            weight[row, group if kind == "zero group" else slice(None)] = 0
    gains = [1.0, 1e-3, 0.1] if dtype == torch.float16 else [1.0, 1e-12, 1e15, 1e-38]
    weight *= draw(st.sampled_from(gains))
    return weight.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


@st.composite
def importances(draw: st.DrawFn, width: int) -> Tensor | None:
    """None, or counts that are far apart; of some numbers, or all of a group, none."""
    kind = draw(st.sampled_from(["none", "apart", "some", "groups"]))
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    counts = torch.exp(3 * torch.randn(width, generator=generator))
    if kind == "some":
        counts[torch.rand(width, generator=generator) < 0.3] = 0
    elif kind == "groups":
        counts[:GROUP] = 0
    return counts


def _numbers(weight: Tensor, scale: Tensor) -> Tensor:
    """Over their rows' scale, [R, G, 32]; a row of zeros has none."""
    return (weight.double() / ref.divisor(scale)[:, None]).view(weight.shape[0], -1, GROUP)


def _plain(numbers: Tensor, counts: Tensor) -> Tensor:
    """Squared errors [R, G] of sixteen levels from the smallest to the largest of each group, brought to steps and
    offsets that can be stored. Where these lie between two that can, the worse: float32 may choose either."""
    low, high = numbers.amin(-1), numbers.amax(-1)
    wanted = torch.maximum((high - low) / 15, torch.maximum(high, -low) / 22)  # no offset reaches farther
    found = []
    for nudge, push in product((-SLACK, SLACK), (-8 * 22 * SLACK, 8 * 22 * SLACK)):
        step = ref.STEPS[(ref.STEPS - wanted[..., None] * (1 + nudge)).abs().argmin(-1)]
        # The middle of the range lies between levels 7 and 8.
        eighths = ((low + high + wanted) / 2 / step * 8 + push).round().clamp(-128, 127)
        grid = step[..., None] * (torch.arange(16).double() + eighths[..., None] / 8 - 8)
        errors = (numbers[..., None] - grid[:, :, None]).abs().amin(-1)
        rounding = (SLACK * (step[..., None] + numbers.abs().amax(-1, keepdim=True))).square()
        found.append(((errors.square() * 1.001 + rounding) * counts).sum(-1))
    return torch.stack(found).amax(0)


def _check(weight: Tensor, scale: Tensor, found: tuple[Tensor, Tensor], importance: Tensor | None) -> None:
    """Codes are the nearest, and the grids miss no more than the plain ones."""
    codes, groups = found
    assert codes.dtype == groups.dtype == torch.uint8
    assert codes.shape == (weight.shape[0], weight.shape[1] // 2)
    assert groups.shape == (weight.shape[0], weight.shape[1] // GROUP, 2)
    numbers, stored = _numbers(weight, scale), ref.Int4.of_bytes(codes, groups)
    missed = (stored.values.view(numbers.shape) - numbers).abs()
    flat = numbers.view(weight.shape)
    nearest = ref.Int4(stored.nearest(flat), stored.step, stored.offset)
    least = (nearest.values.view(numbers.shape) - numbers).abs()
    slack = SLACK * (stored.step.view(numbers.shape) + numbers.abs())
    assert torch.all(missed <= least + slack)
    counts = torch.ones(weight.shape[1]) if importance is None else importance
    counts = counts.double().view(-1, GROUP)
    assert torch.all((missed.square() * counts).sum(-1) <= _plain(numbers, counts))


@settings(max_examples=100)
@given(data=st.data(), weight=matrices(), dtype=st.sampled_from(DTYPES), block=st.sampled_from([1, 300, 2**20]))
def test_rows(data: st.DataObject, weight: Tensor, dtype: torch.dtype, block: int):
    if dtype == torch.float16 and not 1e-3 < weight.abs().max() < 6e4:
        return  # their scale is none of float16
    importance, before = data.draw(importances(weight.shape[1])), weight.clone()
    with mock.patch.object(base, "BLOCK_NUMBERS", block):
        scale = row_scale(weight, dtype)
        found = INT4.quantize_rows(weight, scale, importance)
    assert torch.equal(weight, before)
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    tiny = max(torch.finfo(dtype).smallest_normal * eps, 1.5e-45)  # scales are found in float32
    torch.testing.assert_close(scale.double(), ref.row_scale(weight), rtol=2 * eps, atol=tiny, check_dtype=False)
    if bool((scale[scale > 0] >= 1e-37).all()):  # one over it is a number
        _check(weight, scale, found, importance)


@settings(max_examples=100)
@given(data=st.data(), neurons=matrices(), dtype=st.sampled_from(DTYPES))
def test_neurons_are_rows(data: st.DataObject, neurons: Tensor, dtype: torch.dtype):
    """Of the matrix turned around, whichever way it lies in memory."""
    if dtype == torch.float16 and not 1e-3 < neurons.abs().max() < 6e4:
        return
    importance, columns = data.draw(importances(neurons.shape[1])), neurons.t()
    for lying in (columns, columns.contiguous()):
        scale = neuron_scale(lying, dtype)
        if bool((scale[scale > 0] >= 1e-37).all()):
            _check(neurons, scale, INT4.quantize_neurons(lying, scale, importance), importance)


@pytest.mark.parametrize("ratio", [8, 30, 100, 200])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("both", [False, True])
def test_outliers_come_back(ratio: int, sign: int, both: bool):
    """As many root mean squares as trained models have them, and far more; also one of either sign in a group."""
    weight = torch.randn(3, 2**16, generator=torch.Generator().manual_seed(0))
    weight[2, 70] = sign * ratio
    if both:
        weight[2, 71] = -sign * ratio
    scale = row_scale(weight, torch.float32)
    values = ref.Int4.of_bytes(*INT4.quantize_rows(weight, scale)).values * scale.double()[:, None]
    assert values[2, 70:72] == pytest.approx([float(weight[2, 70]), float(weight[2, 71])], rel=0.07, abs=ratio / 15)
    assert values[2, 70] == pytest.approx(sign * ratio, rel=0.07)
    others = torch.ones_like(weight, dtype=torch.bool)
    others[2, 64:96] = False
    assert (values - weight)[others].norm() < 0.1 * weight[others].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_down", [False, True])
def test_large_weights_that_do_not_come_back_are_counted(dtype: torch.dtype, is_down: bool):
    """Two beyond what the steps reach, side by side and of either sign; those within it are none of them."""
    rows = torch.zeros(3, 2**18, dtype=dtype)
    rows[0, :64], rows[1, 5] = 1, 7  # 512 of its root mean squares: of one sign, the offset helps
    rows[2, 40], rows[2, 41] = 3, -3  # 362
    matrix = rows.t().contiguous() if is_down else rows
    found = INT4.quantize(matrix, dtype, is_down=is_down)
    scale, stored = found["input_scale" if is_down else "scale"], (found["weight"], found["groups"])
    count, worst = INT4.missed(matrix, found, is_down=is_down)
    values = ref.Int4.of_bytes(*stored).values[2, 40:42] * scale[2].double()
    off = (values / rows[2, 40:42].double() - 1).abs()
    assert count == int((off > 0.25).sum()) == 2
    assert worst == pytest.approx(float(off.max()), rel=1e-3)


@given(weight=matrices())
def test_few_numbers_hold_no_large_weight(weight: Tensor):
    """None is farther out than the root of how many there are."""
    scale = row_scale(weight.double(), torch.float64)
    if weight.shape[1] < 256 and bool((scale[scale > 0] > 1e-30).all()):
        codes, groups = INT4.quantize_rows(weight, scale)
        found = {"weight": codes, "groups": groups, "scale": scale}
        assert INT4.missed(weight, found, is_down=False) == (0, 0.0)


def test_an_error_counts_by_the_importance_of_its_input():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    importance = torch.ones(256)
    importance[5::16] = 1e4
    scale = row_scale(weight, torch.float32)
    errors = []
    for counts in (None, importance):
        values = ref.Int4.of_bytes(*INT4.quantize_rows(weight, scale, counts)).values * scale.double()[:, None]
        errors.append((values - weight).square().mul(importance).sum())
    assert errors[1] < 0.7 * errors[0]


def test_zeros_stay_zeros():
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(2))
    weight[1], weight[3, 32:64] = 0, 0
    scale = row_scale(weight, torch.float32)
    assert scale[1] == 0
    values = ref.Int4.of_bytes(*INT4.quantize_rows(weight, scale)).values * scale.double()[:, None]
    assert not values[1].any()
    assert not values[3, 32:64].any()


def test_no_rows():
    codes, groups = INT4.quantize_neurons(torch.zeros(64, 0), torch.zeros(0))
    assert codes.shape == (0, 32)
    assert groups.shape == (0, 2, 2)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_down", [False, True])
def test_what_is_no_number_is_refused(value: float, dtype: torch.dtype, is_down: bool):
    weight = torch.ones(32, 64, dtype=dtype)
    weight[3, 41] = value
    with pytest.raises(CheckpointError, match=r"infinities or NaN.*--quantize none"):
        INT4.quantize(weight, dtype, is_down=is_down)


@st.composite
def stored_rows(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Any bytes: codes [R, C / 2] and groups [R, C / 32, 2]."""
    rows, groups = draw(st.integers(1, 40)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def some(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    return some(rows, 16 * groups), some(rows, groups, 2)


@given(rows=stored_rows(), dtype=st.sampled_from(DTYPES))
def test_unpacking_is_the_formula(rows: tuple[Tensor, Tensor], dtype: torch.dtype):
    stored = ref.Int4.of_bytes(*rows)
    found = INT4.unpack(*rows, torch.empty(stored.levels.shape, dtype=dtype))
    # Code and offset have eight bits together, so at most their product is rounded.
    assert torch.all((found.double() - stored.values).abs() <= torch.finfo(dtype).eps * stored.values.abs())
    codes, groups = ref.rows_as_strips(*rows)
    pairs = groups.view(-1, 2, *groups.shape[1:])
    strips = [
        INT4.unpack_strip(c, g, torch.empty(c.shape[0], 64, dtype=dtype)) for c, g in zip(codes, pairs, strict=True)
    ]
    assert torch.equal(torch.cat(strips, dim=1)[:, : found.shape[1]], found)


def test_the_reference_packs_what_it_unpacks():
    levels = torch.randint(0, 16, (5, 96), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ref.unpacked(ref.packed(levels)), levels)
    rows = ref.packed(levels), torch.randint(0, 256, (5, 3, 2), dtype=torch.uint8)
    codes, groups = ref.strips_as_rows(*ref.rows_as_strips(*rows))
    assert torch.equal(codes[:, :48], rows[0])
    assert torch.equal(groups[:, :3], rows[1])


Write = Callable[[tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor], int], None]


def _write_all(neurons: tuple[Tensor, Tensor], chosen: Tensor, strips: tuple[Tensor, Tensor], start: int) -> None:
    INT4.write_neurons((neurons[0][chosen], neurons[1][chosen]), strips, start)


@pytest.mark.parametrize("write", [INT4.gather_neurons, _write_all])
@given(neurons=stored_rows(), data=st.data())
def test_neurons_become_inputs_of_strips(write: Write, neurons: tuple[Tensor, Tensor], data: st.DataObject):
    """Those chosen, from a place on; nothing else is touched."""
    (codes, groups), stored = neurons, neurons[0].shape[0]
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, stored - 1), max_size=50)), dtype=torch.long)
    before, after = data.draw(st.integers(0, 70)), data.draw(st.integers(0, 70))
    room, strips = before + chosen.numel() + after, -(-groups.shape[1] // 2)
    out = (torch.full((strips, room, 32), 0xA5, dtype=torch.uint8), torch.full((2 * strips, room, 2), 0xA5).byte())
    write(neurons, chosen, out, before)
    made = ref.strips_as_rows(*out)
    for whole, expected in zip(made, (codes, groups), strict=True):
        part = whole[:, : expected.shape[1]]
        assert torch.equal(part[before : before + chosen.numel()], expected[chosen])
        assert torch.all(part[:before] == 0xA5)
        assert torch.all(part[before + chosen.numel() :] == 0xA5)
