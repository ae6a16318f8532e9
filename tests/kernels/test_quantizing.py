"""The kernels of quantize.c against torch, which does their work elsewhere: the same numbers, bit by bit (of int4
and fewer: but for ties)."""

import itertools
from contextlib import AbstractContextManager, nullcontext

import pytest
import quantised_reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from griffin_offload.errors import CheckpointError
from griffin_offload.formats import base
from griffin_offload.formats.compensation import Packed, Passing, known_of
from griffin_offload.formats.few_bits import INT2, INT3
from griffin_offload.formats.grouped import Grouped
from griffin_offload.formats.int4 import INT4, steps_of
from griffin_offload.formats.int8 import INT8
from griffin_offload.formats.translated import Codes
from griffin_offload.kernels import quantize as quantizing
from griffin_offload.kernels import table
from griffin_offload.kernels.library import library

needs_kernels = pytest.mark.skipif(library() is None, reason="another processor, or no compiler")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MARK = 77
in_groups = pytest.mark.parametrize("format", [INT4, INT3, INT2], ids=str)


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


def _by_torch() -> AbstractContextManager[None]:
    return table.leaving_out(lambda kernel: kernel.ours)


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
    scale = INT8.scale_of(weight, dtype, columns)
    INT8.write(weight, scale, out[:, :width], columns)
    with _by_torch():
        assert torch.equal(INT8.scale_of(weight, dtype, columns), scale)
        INT8.write(weight, scale, expected[:, :width], columns)
    assert torch.equal(out, expected)


def _importance(draw: st.DrawFn, width: int) -> Tensor | None:
    seed = draw(st.none() | st.integers(0, 9))
    return None if seed is None else torch.rand(width, generator=torch.Generator().manual_seed(seed)).square()


def _same_but_for_ties(found: Packed, expected: Packed) -> None:
    """The same bytes, but for a few groups: sums that are rounded in another order may take another one of two steps
    that lie as near. How little either way misses is held against plain grids in formats/."""
    differ = (found[1] != expected[1]).any(-1) | (found[0] != expected[0]).view(*found[1].shape[:2], -1).any(-1)
    assert differ.sum() <= 1 + 0.01 * differ.numel()


@needs_kernels
@in_groups
@settings(max_examples=60)
@given(weight=matrices(st.integers(1, 20), st.sampled_from([32, 64, 96, 512, 544, 1600])), data=st.data())
def test_rows(format: Grouped, weight: Tensor, data: st.DataObject):
    scale, importance = base.row_scale(weight, torch.float32), _importance(data.draw, weight.shape[1])
    found = format.quantize_rows(weight, scale, importance)
    with _by_torch():
        expected = format.quantize_rows(weight, scale, importance)
    _same_but_for_ties(found, expected)


@st.composite
def coded_rows(draw: st.DrawFn) -> Codes:
    """Of steps of any size, some below 0 or 0, that begin near 0 and far from it."""
    rows, groups, seed = draw(st.integers(1, 9)), draw(st.sampled_from([1, 3, 50])), draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (rows, groups * 16), generator=generator, dtype=torch.uint8)
    steps = torch.randn(rows, groups, generator=generator) * 10 ** draw(st.floats(-5, 3))
    steps[torch.rand(rows, groups, generator=generator) < 0.1] = 0
    spread = draw(st.sampled_from([0.0, 4.0, 30.0]))
    lowest = -8 * steps + spread * steps.abs().amax() * torch.randn(rows, groups, generator=generator)
    return Codes(packed, steps, lowest)


def _errors(codes: Codes, groups: Tensor, scale: Tensor) -> Tensor:
    """Squared, of each group in squares of its step, float64: of the pairs `groups` against the grids of `codes`."""
    step, offset = (part.double() for part in INT4.steps_of(groups, torch.float32))
    packed = codes.packed.view(*codes.steps.shape, 16)
    levels = torch.cat([packed & 15, packed >> 4], dim=-1).double()
    exact = (levels * codes.steps[..., None].double() + codes.lowest[..., None].double()) / scale[
        :, None, None
    ].double()
    turned = torch.where(codes.steps[..., None] < 0, 15 - levels, levels)
    return (((turned + offset) * step - exact) / step).square().sum(-1)


@needs_kernels
@settings(max_examples=60)
@given(codes=coded_rows())
def test_codes_of_files(codes: Codes):
    """By the kernels as by torch: pairs that miss as little, and those out of reach, but for ones at the border."""
    own = [codes._replace(packed=codes.packed.clone()) for _ in range(2)]
    norms = table.call("quantize", "norms_of_codes", *codes)
    scale = torch.where(norms == 0, 1.0, norms)
    found = table.call("quantize", "pairs_of_codes", *own[0], scale)
    with _by_torch():
        torch.testing.assert_close(norms, table.call("quantize", "norms_of_codes", *codes), rtol=1e-5, atol=0)
        expected = table.call("quantize", "pairs_of_codes", *own[1], scale)
    assert torch.equal(own[0].packed, own[1].packed)
    errors = [_errors(codes, groups, scale) for groups, _ in (found, expected)]
    plain = codes.steps != 0
    settled = plain & ~found[1] & ~expected[1]
    torch.testing.assert_close(errors[0][settled], errors[1][settled], rtol=1e-3, atol=1e-3)
    border = plain & (found[1] != expected[1])
    assert ((errors[0][border] - 2).abs() < 0.01).all()


def _back(tensors: dict[str, Tensor], inputs: int) -> Tensor:
    out = torch.empty(tensors["weight"].shape[0], inputs)
    return INT4.unpack(tensors["weight"], tensors["groups"], out) * tensors["scale"][:, None]


@given(codes=coded_rows())
def test_codes_of_files_get_the_best_of_all_grids(codes: Codes):
    """Of 65,536 grids each, tried one by one in float64; a group that none comes near is rounded anew, and misses no
    more than if all were."""
    found = INT4.taken_over(codes._replace(packed=codes.packed.clone()), torch.float32)
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256)).to(torch.uint8)
    step, offset = (part.double() for part in steps_of(pairs, torch.float32))
    exact = codes.numbers().double().view(*codes.steps.shape, 32)
    back, stored = _back(found, exact.shape[1] * 32).double().view_as(exact), codes.packed.view(*exact.shape[:2], 16)
    for row, group in itertools.product(range(min(len(exact), 2)), range(min(exact.shape[1], 3))):
        numbers, scale = exact[row, group], float(found["scale"][row]) or 1.0
        packed = found["weight"].view(*codes.steps.shape, 16)[row, group]
        own = torch.cat([packed & 15, packed >> 4]).double()
        # Least squares of all grids at once, for these codes.
        low, wide = scale * step * offset, scale * step
        sums = own.square().sum() * wide**2 + 2 * wide * low * own.sum() + 32 * low**2
        errors = sums - 2 * (wide * (own * numbers).sum() + low * numbers.sum()) + numbers.square().sum()
        missed = (back[row, group] - numbers).square().sum()
        most = 1.001 * errors.min()
        if codes.steps[row, group] == 0:  # all the same
            most = 1e-4 * numbers.square().sum()
        elif not any(torch.equal(packed, was) for was in (stored[row, group], ~stored[row, group])):
            anew = INT4.quantize_rows(numbers[None].float(), torch.tensor([scale]))
            most = (INT4.unpack(*anew, torch.empty(1, 32)) * scale - numbers).square().sum()
        assert missed <= most + 1e-6 * numbers.square().sum()


@needs_kernels
@in_groups
@settings(max_examples=60)
@given(weight=matrices(st.sampled_from([32, 64, 160, 320]), st.integers(1, 100)), data=st.data())
def test_neurons(format: Grouped, weight: Tensor, data: st.DataObject):
    columns, importance = _norms(weight).float(), _importance(data.draw, weight.shape[0])
    found = format.quantize_neurons(weight, columns, importance)
    with _by_torch():
        expected = format.quantize_neurons(weight, columns, importance)
    _same_but_for_ties(found, expected)


@needs_kernels
@in_groups
@pytest.mark.parametrize("rows", [1, 15, 40])
def test_every_width_of_vectors_gives_the_same_bytes(format: Grouped, rows: int, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(rows)
    weight, found = torch.randn(rows, 96, generator=generator), []
    weight[0, 5] = 30  # one that is far from all others
    for wide in (True, False):
        monkeypatch.setattr(library(), "sums_bytes", wide and library().sums_bytes)
        found.append(
            (
                *format.quantize_rows(weight, base.row_scale(weight, torch.float32)),
                *format.quantize_neurons(weight.t(), base.row_scale(weight, torch.float32)),
            )
        )
    assert all(map(torch.equal, *found))


@needs_kernels
@pytest.mark.parametrize("format", [INT3, INT2], ids=str)
@pytest.mark.parametrize("wide", [True, False])
def test_few_bits_of_int4(format: Grouped, wide: bool, monkeypatch: pytest.MonkeyPatch):
    """As its numbers in float32 would be rounded, by the scale that the row has already."""
    monkeypatch.setattr(library(), "sums_bytes", wide and library().sums_bytes)
    weight = torch.randn(37, 160, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(160, generator=torch.Generator().manual_seed(1))
    packed = INT4.quantize_rows(weight, base.row_scale(weight, torch.float32))
    arguments = ("quantize", f"{format.name}_of_int4", *packed, importance, INT4)
    found = table.call(*arguments)
    numbers = INT4.unpack(*packed, torch.empty(37, 160))
    assert all(map(torch.equal, found, format.quantize_rows(numbers, torch.ones(37), importance)))
    with _by_torch():
        _same_but_for_ties(found, table.call(*arguments))


@needs_kernels
@in_groups
@settings(max_examples=30)
@given(weight=matrices(st.sampled_from([32, 96, 288]), st.integers(1, 70)), data=st.data())
def test_neurons_are_the_rows_of_the_matrix_turned_around(format: Grouped, weight: Tensor, data: st.DataObject):
    """Bit by bit, and each the same whatever lies beside it: a selection is quantised as the whole is."""
    columns, importance = _norms(weight).float(), _importance(data.draw, weight.shape[0])
    codes, groups = format.quantize_neurons(weight, columns, importance)
    rows = format.quantize_rows(weight.t().contiguous(), columns, importance)
    assert torch.equal(rows[0], codes)
    assert torch.equal(rows[1], groups)
    some = torch.arange(0, weight.shape[1], 3)
    chosen = format.quantize_neurons(weight[:, some].contiguous(), columns[some], importance)
    assert torch.equal(chosen[0], codes[some])
    assert torch.equal(chosen[1], groups[some])


@needs_kernels
@settings(max_examples=60)
@given(matrices(st.integers(1, 20), WIDTHS))
def test_norms_of_rows(weight: Tensor):
    found = base.row_scale(weight, torch.float32)
    exact = weight.double().square().mean(1).sqrt()
    torch.testing.assert_close(found.double(), exact, rtol=1e-7, atol=0)
    with _by_torch():
        torch.testing.assert_close(base.row_scale(weight, torch.float32), found, rtol=2e-7, atol=0)


@needs_kernels
@settings(max_examples=60)
@given(matrices(st.integers(1, 20), WIDTHS))
def test_norms_of_columns(weight: Tensor):
    found = base.neuron_scale(weight, torch.float32)
    exact = weight.double().square().mean(0).sqrt()
    torch.testing.assert_close(found.double(), exact, rtol=1e-7, atol=0)
    with _by_torch():
        assert torch.equal(base.neuron_scale(weight, torch.float32), found)


@needs_kernels
@settings(max_examples=60)
@given(matrices(st.integers(1, 20), WIDTHS))
def test_norms_of_columns_over_rows(weight: Tensor):
    found = INT8.input_scale_of(weight, torch.float32)
    torch.testing.assert_close(found.double(), ref.int8_input_scale(weight), rtol=3e-7, atol=0)
    with _by_torch():
        torch.testing.assert_close(INT8.input_scale_of(weight, torch.float32), found, rtol=3e-7, atol=0)


@needs_kernels
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 1, 9, 31, 520, 543])
def test_one_number_that_is_none_is_found_anywhere(value: float, place: int):
    weight = torch.randn(64, 544, generator=torch.Generator().manual_seed(0))
    weight[33, place] = value
    columns = torch.ones(544)
    for quantise in (
        lambda: INT8.scale_of(weight, torch.float32),
        lambda: INT8.scale_of(weight, torch.float32, columns),
        lambda: base.neuron_scale(weight, torch.float32),
        lambda: base.row_scale(weight, torch.float32),
    ):
        with pytest.raises(CheckpointError, match="infinities or NaN"):
            quantise()


@needs_kernels
def test_matrices_that_stay_torchs():
    ones = torch.ones(32, 64)
    for weight in (ones.double(), ones.t(), torch.ones(32, 32, device="meta")):
        for made in (
            "largest_of_rows",
            "column_norms",
            "row_norms",
            "int8",
            *(f"int{b}_{form}" for b in (4, 3, 2) for form in ("rows", "neurons")),
        ):
            assert not table.choose("quantize", made, weight).ours
            assert table.choose("quantize", made, ones).ours


@needs_kernels
def test_sizes_that_do_not_fit_are_refused():
    weight, ones = torch.ones(40, 48), torch.ones(48)
    bytes_of = torch.empty(40, 48, dtype=torch.int8)
    for wrong in (
        lambda: quantizing.largest_of_rows(weight, ones[1:]),
        lambda: quantizing.quantize_int8(weight, ones, bytes_of, None),
        lambda: quantizing.quantize_int8(weight, ones[:40], bytes_of[1:], None),
        lambda: quantizing.quantize_int8(weight, ones[:40], bytes_of.view(torch.uint8), None),
        lambda: quantizing.quantize_rows(4, weight, ones[:40], None),
        lambda: quantizing.quantize_rows(4, weight[:, :32], ones, None),
        lambda: quantizing.quantize_rows(4, weight[:, :32], ones[:40], ones),
        lambda: quantizing.quantize_neurons(4, weight, ones, None),
        lambda: quantizing.quantize_neurons(4, weight[:32], ones[:40], None),
        lambda: quantizing.quantize_neurons(4, weight[:32], ones, ones),
        lambda: quantizing.quantize_rows(4, weight[:, :32], ones[:40], None, torch.ones(2, 31)),
        lambda: quantizing.quantize_neurons(4, weight[:32], ones, None, torch.ones(2, 48), None, torch.zeros(33)),
        lambda: quantizing.quantize_neurons(4, weight[:32], ones, None, torch.ones(2, 48), torch.zeros(2).int() - 1),
        lambda: quantizing.quantize_neurons(4, weight[:32], ones, None, torch.ones(2, 48), torch.tensor([2, 0]).int()),
        lambda: quantizing.quantize_rows(4, weight[:, :32], ones[:40], None, torch.ones(2, 32), torch.zeros(1).long()),
    ):
        with pytest.raises(ValueError, match="must be"):
            wrong()


@needs_kernels
@in_groups
@pytest.mark.parametrize("outputs", [1, 37])
def test_errors_that_are_made_up_for_are_the_same_everywhere(
    format: Grouped, outputs: int, monkeypatch: pytest.MonkeyPatch
):
    """By vectors of any width, any threads, and torch; inputs are no whole groups in a down projection."""
    generator, found = torch.Generator().manual_seed(outputs), []
    weight, columns = torch.randn(outputs, 160, generator=generator), torch.randn(320, 45, generator=generator)
    known = known_of(torch.randn(50, 1, generator=generator) * torch.randn(160, generator=generator) + 0.1)
    scales, some = (base.row_scale(weight, torch.float32), base.neuron_scale(columns, torch.float32)), torch.arange(45)
    for wide, threads in ((True, 1), (False, 3), (None, 1)):
        monkeypatch.setattr(library(), "sums_bytes", bool(wide) and library().sums_bytes)
        torch.set_num_threads(threads)
        with _by_torch() if wide is None else nullcontext():
            rows = format.quantize_rows(weight, scales[0], known)
            found.append((*rows, *format.quantize_neurons(columns, scales[1], passing=Passing.of(known, some, 1024))))
    assert all(map(torch.equal, found[0], found[1]))
    for ours, by_torch in ((found[0][:2], found[2][:2]), (found[0][2:], found[2][2:])):
        _same_but_for_ties(ours, by_torch)
    assert not torch.equal(found[0][0], format.quantize_rows(weight, scales[0], known[0])[0])
