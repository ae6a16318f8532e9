"""The kernels of gemv.c against float64, over shapes, types, threads and numbers of every size."""

import importlib.util
import itertools
import math
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import quantised_reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from griffin_offload.kernels import gemv
from griffin_offload.kernels.library import library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_kernels = pytest.mark.skipif(gemv.kernels() is None, reason="another processor, or no compiler")
Kind = dict[str, bool]
KINDS = [
    pytest.param({"wide": wide, "ahead": ahead}, id=("avx512" if wide else "avx2") + ahead * ", ahead")
    for wide in (False, True)
    for ahead in (False, True)
]
of_all_processors = pytest.mark.parametrize("kind", KINDS)
"""Kernels for instructions that this processor has not are those of AVX2 again."""


def _no_bytes() -> bool:
    found = library()
    return found is None or not found.sums_bytes


LANES = pytest.param(
    {"lanes": True}, id="lanes", marks=pytest.mark.skipif(_no_bytes(), reason="a processor without AVX512-VNNI")
)


def _kernels(**kind: bool) -> gemv.GemvKernels:
    found = library()
    assert found is not None
    return gemv.GemvKernels(found, **kind)


def _largest(numbers: Tensor, block: int) -> Tensor:
    """Of each block along the last axis, for all of it."""
    return torch.cat([p.amax(-1, keepdim=True).expand_as(p) for p in numbers.split(block, dim=-1)], dim=-1)


def _check(found: Tensor, x: Tensor, matrix: Tensor, sizes: Tensor, group: int, bits: int = 16) -> None:
    """Within some roundings of the type of what a row and an output add up in absolute numbers, and half a step of
    `bits` bits, of float32 nearly twice as many, of a group's largest number; where the type holds that."""
    exact, size, limits = x.double() @ matrix.t(), x.double().abs() @ sizes.t(), torch.finfo(x.dtype)
    largest = torch.cat([p.abs().amax(1, keepdim=True).expand_as(p) for p in x.double().split(group, dim=1)], dim=1)
    step = 2.0 ** -(2 * bits - 2) if x.dtype == torch.float32 else 2.0 ** -(bits - 1)
    if bits == 8:
        step *= 128 / 127 * (2 if x.dtype == torch.float32 else 1)  # as many steps as that; and two roundings
    allowed = 4 * limits.eps * size + step / 2 * largest @ sizes.t() + limits.tiny
    assert found.dtype == x.dtype
    assert torch.all(((found.double() - exact).abs() <= allowed) | (size > limits.max / 2))


def _packed(rows: int, groups: int, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Codes and groups of rows of any numbers, of int4 with steps of up to 2."""
    generator = torch.Generator().manual_seed(rows + groups)
    if bits < 4:
        shapes = (rows, 4 * bits * groups), (rows, groups, 2)
        codes, pairs = (torch.randint(0, 256, s, generator=generator, dtype=torch.uint8) for s in shapes)
        return codes, pairs
    codes = torch.randint(0, 256, (rows, 16 * groups), generator=generator, dtype=torch.uint8)
    steps = torch.randint(0, 12 * 16, (rows, groups), generator=generator, dtype=torch.uint8)
    offsets = torch.randint(0, 256, (rows, groups), generator=generator, dtype=torch.uint8)
    return codes, torch.stack([steps, offsets], dim=-1)


@st.composite
def inputs_of(draw: st.DrawFn, columns: int) -> Tensor:
    """Rows of random numbers, of which some groups are of another size altogether and some numbers stand out."""
    rows, seed = draw(st.integers(1, 9)), draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    for at in draw(st.lists(st.integers(0, columns - 1), max_size=3)):
        x[:, at:] *= 10.0 ** draw(st.integers(-3, 2))
        x[:, at] *= draw(st.sampled_from([0, 1, 100]))
    return x.clamp(-6e4, 6e4).to(draw(st.sampled_from(DTYPES)))


@needs_kernels
@of_all_processors
@given(data=st.data(), outputs=st.integers(1, 300), inputs=st.integers(1, 300), threads=st.integers(1, 3))
def test_int8(kind: Kind, data: st.DataObject, outputs: int, inputs: int, threads: int):
    torch.set_num_threads(threads)
    _check_int8(_kernels(**kind), data.draw(inputs_of(inputs)), outputs, data.draw(st.sampled_from(DTYPES)))


def _check_int8(own: gemv.GemvKernels, x: Tensor, outputs: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randint(-127, 128, (outputs, x.shape[1]), generator=generator, dtype=torch.int8)
    scale = torch.rand(outputs, generator=generator).add(0.1).to(dtype)
    matrix = weight * scale.double()[:, None]
    _check(own.multiply_int8(x, weight, scale), x, matrix, matrix.abs(), 128)


@needs_kernels
@of_all_processors
def test_every_rest_of_a_row_and_of_the_outputs(kind: Kind):
    """Of vectors and blocks of any length: a hundred draws meet thirty sizes."""
    own, generator = _kernels(**kind), torch.Generator().manual_seed(0)
    sizes = [*((5, inputs) for inputs in range(1, 130)), *((outputs, 33) for outputs in range(1, 70))]
    for at, (outputs, inputs) in enumerate(sizes):
        x = torch.randn(1 + at % 5, inputs, generator=generator)
        _check_int8(own, x.to(DTYPES[at % 3]), outputs, DTYPES[at % 2])
        _check_floats(own, x.to(DTYPES[1 + at % 2]), outputs)


@needs_kernels
@of_all_processors
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
def test_inputs_that_crowd_the_first_cache(kind: Kind, rows: int):
    """Their weights are brought to the second one before, in blocks, of which the last is no whole one."""
    seed = rows + 10 * kind["wide"] + 20 * kind["ahead"]  # what another kind has left in memory is no right answer here
    x = torch.randn(rows, 13696, generator=torch.Generator().manual_seed(seed)).bfloat16()
    _check_int8(_kernels(**kind), x[:, :8333], 37, torch.float32)
    _check_rows(_kernels(**kind), x, 37, torch.float32, 4)


@needs_kernels
@pytest.mark.parametrize("kind", [*KINDS, LANES])
@pytest.mark.parametrize("bits", [4, 3, 2])
@settings(max_examples=20)  # of each of fifteen
@given(data=st.data(), outputs=st.integers(1, 300), groups=st.integers(1, 40), threads=st.integers(1, 3))
def test_rows(kind: Kind, bits: int, data: st.DataObject, outputs: int, groups: int, threads: int):
    """Numbers of groups that are no multiple of anything, any number of outputs."""
    torch.set_num_threads(threads)
    x = data.draw(inputs_of(groups * 32))
    _check_rows(_kernels(**kind), x, outputs, data.draw(st.sampled_from(DTYPES)), bits)


def _check_rows(own: gemv.GemvKernels, x: Tensor, outputs: int, dtype: torch.dtype, bits: int) -> None:
    codes, pairs = _packed(outputs, x.shape[1] // 32, bits)
    generator = torch.Generator().manual_seed(outputs)
    scale = torch.rand(outputs, generator=generator).add(0.1).to(dtype)
    stored, scales = ref.of_bytes(codes, pairs), scale.double()[:, None]
    sizes = scales * stored.step * (stored.levels.double() + stored.offset.abs())  # which are added up apart
    found = own.multiply_rows(x, codes, pairs, scale, bits=bits)
    _check(found, x, scales * stored.values, sizes, 32 if bits == 4 else 16, 8)


@needs_kernels
@pytest.mark.parametrize("kind", [*KINDS, LANES])
@pytest.mark.parametrize("bits", [4, 3, 2])
@settings(max_examples=20)  # of each of fifteen
@given(data=st.data(), groups=st.integers(1, 7), sixteens=st.integers(1, 20), threads=st.integers(1, 3))
def test_strips(kind: Kind, bits: int, data: st.DataObject, groups: int, sixteens: int, threads: int):
    torch.set_num_threads(threads)
    inputs = 16 * sixteens
    x, neurons = data.draw(inputs_of(inputs)), _packed(inputs, groups, bits)
    scale = torch.rand(inputs, generator=torch.Generator().manual_seed(inputs)).add(0.1).to(x.dtype)
    stored, own = ref.of_bytes(*neurons), _kernels(**kind)
    found = own.multiply_strips(x, *ref.rows_as_strips(*neurons), scale, features=32 * groups, bits=bits)
    sizes = (stored.step * (stored.levels.double() + stored.offset.abs())).t()
    # A block of neurons has one scale, of its largest product of input and step, or of the largest ones of both.
    in_bytes = "lanes" in kind and bits == 4 and x.dtype != torch.float32
    by_scale = (x.double() * scale.double()).abs()[:, None]
    if in_bytes:
        largest = _largest(by_scale, 32) * _largest(stored.step.t()[None], 32)  # [M, O, I]
    else:
        largest = _largest(by_scale * stored.step.t(), 128 if own.uses_bytes else 32)
    levels = (stored.levels.double() + stored.offset.abs()).t()
    exact, size = (x.double() * scale.double()) @ stored.values, (x.double() * scale.double()).abs() @ sizes.t()
    limits, step = torch.finfo(x.dtype), 2.0**-30 if x.dtype == torch.float32 else 2.0**-15
    if in_bytes or bits < 4 or not own.uses_bytes:  # by numbers of 8 bits
        step = 128 / 127 * (2.0**-13 if x.dtype == torch.float32 else 2.0**-7)
    allowed = 4 * limits.eps * size + step / 2 * (largest * levels).sum(2) + limits.tiny
    assert found.dtype == x.dtype
    assert found.shape == exact.shape
    assert torch.all(((found.double() - exact).abs() <= allowed) | (size > limits.max / 2))


@needs_kernels
@of_all_processors
@given(data=st.data(), outputs=st.integers(1, 300), inputs=st.integers(1, 300), threads=st.integers(1, 3))
def test_floats(kind: Kind, data: st.DataObject, outputs: int, inputs: int, threads: int):
    torch.set_num_threads(threads)
    x = data.draw(inputs_of(inputs))
    _check_floats(_kernels(**kind), x.bfloat16() if x.dtype == torch.float32 else x, outputs)


def _check_floats(own: gemv.GemvKernels, x: Tensor, outputs: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, x.shape[1], generator=generator).to(x.dtype)
    found, exact = own.multiply_floats(x, weight), x.double() @ weight.double().t()
    size, limits = x.double().abs() @ weight.double().abs().t(), torch.finfo(x.dtype)
    allowed = limits.eps * exact.abs() + 32 * 2.0**-24 * size + limits.tiny
    assert found.dtype == x.dtype
    assert torch.all(((found.double() - exact).abs() <= allowed) | (exact.abs() > limits.max / 2))


@pytest.mark.skipif(_no_bytes(), reason="a processor without AVX512-VNNI, or no compiler")
@settings(max_examples=15)
@given(rows=st.integers(1, 20), sixteens=st.integers(1, 12), groups=st.integers(1, 5), seed=st.integers(0, 99))
def test_strips_by_bytes_of_whole_numbers_round_nothing(rows: int, sixteens: int, groups: int, seed: int):
    """Where each block's largest input is 127 of some unit and its steps are alike, but for the last rounding."""
    generator, inputs = torch.Generator().manual_seed(seed), 16 * sixteens
    x = torch.randint(-127, 128, (rows, inputs), generator=generator).bfloat16()
    x[:, ::16] = 127
    codes, pairs = _packed(inputs, groups)
    pairs[..., 0] = (
        100 + torch.randint(0, 9, (inputs // 16, groups), generator=generator)[::2].repeat_interleave(32, 0)[:inputs]
    )
    stored = ref.of_bytes(codes, pairs)
    found = _kernels(lanes=True).multiply_strips(
        x, *ref.rows_as_strips(codes, pairs), torch.ones(inputs).bfloat16(), features=32 * groups
    )
    exact, size = x.double() @ stored.values, x.double().abs() @ stored.values.abs()
    assert torch.all((found.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-20 * size)


@pytest.mark.skipif(_no_bytes(), reason="a processor without AVX512-VNNI, or no compiler")
@settings(max_examples=15)
@given(rows=st.integers(2, 20), sixteens=st.integers(1, 12), seed=st.integers(0, 99))
def test_strips_by_bytes_are_the_same_however_many_rows_there_are(rows: int, sixteens: int, seed: int):
    """And rows that are no numbers leave the others alone."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 16 * sixteens, generator=generator).bfloat16()
    strips, scale = ref.rows_as_strips(*_packed(16 * sixteens, 3)), torch.ones(16 * sixteens).bfloat16()
    own = _kernels(lanes=True)
    found = own.multiply_strips(x, *strips, scale)
    assert torch.equal(found, torch.cat([own.multiply_strips(x[i : i + 1], *strips, scale) for i in range(rows)]))
    broken = x.clone()
    broken[0, seed % x.shape[1]] = [float("nan"), float("inf")][seed % 2]
    again = own.multiply_strips(broken, *strips, scale)
    assert again[0].isnan().all()
    assert torch.equal(again[1:], found[1:])


@needs_kernels
@pytest.mark.parametrize("kind", [*KINDS, LANES])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_rows_are_the_same_however_many_there_are(kind: Kind, bits: int):
    """To the last bit, though some are multiplied at once and others ask for weights behind: 13 groups, 37 outputs."""
    generator = torch.Generator().manual_seed(bits)
    x, (codes, pairs) = torch.randn(9, 13 * 32, generator=generator).bfloat16(), _packed(37, 13, bits)
    own, scale = _kernels(**kind), torch.rand(37, generator=generator).add(0.1)
    alone = torch.cat([own.multiply_rows(row[None], codes, pairs, scale, bits=bits) for row in x])
    assert alone.isfinite().all()
    for rows in range(2, 10):
        assert torch.equal(own.multiply_rows(x[:rows], codes, pairs, scale, bits=bits), alone[:rows]), rows


def _by_tiles() -> gemv.GemvKernels:
    found = library()
    assert found is not None
    return gemv.GemvKernels(found, tiles=True)


def _no_tiles() -> bool:
    found = library()
    return found is None or not found.sums_tiles


@pytest.mark.skipif(_no_tiles(), reason="a processor without AMX, or no compiler")
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 16), outputs=st.integers(1, 300), inputs=st.integers(1, 300), seed=st.integers(0, 99))
def test_tiles_are_what_the_others_are(rows: int, outputs: int, inputs: int, seed: int):
    """But for the order of sums; and of a row the same to the last bit, however many there are."""
    generator = torch.Generator().manual_seed(seed)
    groups, whole = -(-inputs // 32), -(-inputs // 16) * 16
    drawn = torch.randn(rows, 32 * groups, generator=generator).bfloat16()
    weight = torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    floats = torch.randn(outputs, inputs, generator=generator).bfloat16()
    scale, (codes, pairs) = torch.rand(outputs, generator=generator), _packed(outputs, groups)
    strips, own = ref.rows_as_strips(*_packed(whole, -(-outputs // 32))), drawn[:, :whole].abs().clone()
    bias, features = torch.ones(outputs).bfloat16(), outputs
    calls = {
        "int8": lambda k, x: k.multiply_int8(x[:, :inputs], weight, scale, bias),
        "floats": lambda k, x: k.multiply_floats(x[:, :inputs], floats, bias),
        "rows": lambda k, x: k.multiply_rows(x, codes, pairs, scale, bias),
        "strips": lambda k, x: k.multiply_strips(x[:, :whole], *strips, own[0], bias, features),
    }
    for name, call in calls.items():
        found, expected = call(_by_tiles(), drawn), call(_kernels(), drawn)
        assert found.shape == (rows, outputs)
        size = expected.float().abs().max()
        assert (found.float() - expected.float()).abs().max() <= 2**-7 * size, name  # a rounding
        one_by_one = torch.cat([call(_by_tiles(), drawn[i : i + 1]) for i in range(rows)])
        assert torch.equal(found, one_by_one), name


@pytest.mark.skipif(_no_tiles(), reason="a processor without AMX, or no compiler")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_tiles_leave_what_is_no_number_in_its_row(bad: float):
    x = torch.ones(3, 256, dtype=torch.bfloat16)
    x[1, 200] = bad
    own, rows, neurons = _by_tiles(), _packed(40, 8), _packed(256, 2)
    for found in (
        own.multiply_int8(x, torch.ones(40, 256, dtype=torch.int8), torch.ones(40)),
        own.multiply_rows(x, *rows, torch.ones(40)),
        own.multiply_strips(x, *ref.rows_as_strips(*neurons), torch.ones(256).bfloat16()),
    ):
        assert found[1].isnan().all()
        assert found[::2].isfinite().all()
    with pytest.raises(ValueError, match="are known, with AMX"):
        own.multiply_rows(x.float(), *rows, torch.ones(40))


@needs_kernels
@of_all_processors
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["int8", "int4_rows", "int4_strips"])
def test_bias_scaled_inputs_and_features(kind: Kind, form: str, dtype: torch.dtype):
    """What fills up the last strip is no feature."""
    generator, own = torch.Generator().manual_seed(0), _kernels(**kind)
    x, input_scale = torch.randn(3, 64, generator=generator).to(dtype), torch.rand(64, generator=generator).to(dtype)
    scaled = x.double() if form == "int4_rows" else x.double() * input_scale.double()
    for features in (70, 128):
        bias = torch.randn(features, generator=generator).to(dtype)
        levels = torch.randint(0, 16, (128, 64), generator=generator)
        codes, groups = ref.packed(levels), torch.tensor([11 * 16, 0], dtype=torch.uint8).expand(128, 2, 2)
        if form == "int4_rows":
            rows = codes[:features].contiguous(), groups[:features].contiguous()
            found = own.multiply_rows(x, *rows, torch.ones(features), bias)
        elif form == "int4_strips":
            neurons = ref.packed(levels.t()), torch.tensor([11 * 16, 0], dtype=torch.uint8).expand(64, 4, 2)
            found = own.multiply_strips(x, *ref.rows_as_strips(*neurons), input_scale, bias, features)
        else:
            weight = (levels - 8).to(torch.int8)[:features].contiguous()
            found = own.multiply_int8(x, weight, torch.ones(features), bias, input_scale)
        exact = scaled @ (levels[:features] - 8).double().t() + bias.double()
        assert found.shape == (3, features)
        by_bytes = form == "int4_rows" or (form == "int4_strips" and not own.uses_bytes)
        coarse = by_bytes and dtype != torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1 if coarse else 0.01)


@needs_kernels
@pytest.mark.parametrize("kind", [*KINDS, LANES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_none(kind: Kind, bad: float, dtype: torch.dtype):
    """In the row that has it and in no other."""
    x = torch.ones(3, 256, dtype=dtype)
    x[1, 200] = bad
    weight, scale = torch.ones(40, 256, dtype=torch.int8), torch.ones(40, dtype=dtype)
    rows, neurons, own = _packed(40, 8), _packed(256, 2), _kernels(**kind)
    for found in (
        own.multiply_int8(x, weight, scale),
        own.multiply_rows(x, *rows, scale),
        own.multiply_strips(x, *ref.rows_as_strips(*neurons), torch.ones(256, dtype=dtype)),
    ):
        assert found[1].isnan().all()
        assert found[::2].isfinite().all()


@needs_kernels
@of_all_processors
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-31, 1e-29, 1e30])
def test_numbers_of_any_size(kind: Kind, size: float):
    x = torch.full((1, 128), size)
    found = _kernels(**kind).multiply_int8(x, torch.full((1, 128), 2, dtype=torch.int8), torch.ones(1))
    torch.testing.assert_close(found, torch.full((1, 1), 256 * size), rtol=1e-6, atol=1e-27)
    one, codes = torch.tensor([11 * 16, 0], dtype=torch.uint8), torch.full((1, 64), 0xAA, dtype=torch.uint8)
    found = _kernels(**kind).multiply_rows(x, codes, one.repeat(1, 4, 1), torch.ones(1))
    torch.testing.assert_close(found, torch.full((1, 1), 256 * size), rtol=1e-4, atol=1e-27)
    strips = torch.full((1, 128, 32), 0xAA, dtype=torch.uint8), one.repeat(2, 128, 1)
    found = _kernels(**kind).multiply_strips(x, *strips, torch.ones(128))
    torch.testing.assert_close(found, torch.full((1, 64), 256 * size), rtol=1e-4, atol=1e-27)


@needs_kernels
@of_all_processors
def test_largest_sums(kind: Kind):
    """No 32-bit sum overflows: the largest group, largest weights, largest numbers, one sign."""
    x = torch.full((1, 256), 3.0)
    for sign in (1, -1):
        weight = torch.full((64, 256), 127 * sign, dtype=torch.int8)
        assert torch.all(_kernels(**kind).multiply_int8(x, weight, torch.ones(64)) == 3 * 127 * 256 * sign)
    one = torch.tensor([11 * 16, 0], dtype=torch.uint8)  # the step 1
    for level in (0, 15):
        codes, exact = torch.full((64, 128), level * 17, dtype=torch.uint8), 3.0 * 256 * (level - 8)
        found = _kernels(**kind).multiply_rows(x, codes, one.repeat(64, 8, 1), torch.ones(64))
        torch.testing.assert_close(found, torch.full((1, 64), exact), rtol=1e-4, atol=0)
        strips = codes.view(1, 256, 32), one.repeat(2, 256, 1)
        found = _kernels(**kind).multiply_strips(x, *strips, torch.ones(256))
        torch.testing.assert_close(found, torch.full((1, 64), exact), rtol=1e-4, atol=0)


_INT8, _CODES = torch.ones(4, 64, dtype=torch.int8), torch.ones(4, 32, dtype=torch.uint8)
_PAIRS, _STRIP = torch.ones(4, 2, 2, dtype=torch.uint8), torch.ones(1, 64, 32, dtype=torch.uint8)
_STRIP_PAIRS = torch.ones(2, 64, 2, dtype=torch.uint8)


@needs_kernels
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("int8", (torch.ones(1, 64), _INT8.t().contiguous().t(), torch.ones(4))),
        ("int8", (torch.ones(1, 256), _INT8, torch.ones(4))),
        ("int8", (torch.ones(1, 64), _INT8, torch.ones(3))),
        ("int8", (torch.ones(1, 64), _INT8.byte(), torch.ones(4))),
        ("int8", (torch.ones(1, 64), _INT8, torch.ones(4), torch.ones(1))),
        ("int8", (torch.ones(1, 64), _INT8, torch.ones(4), torch.ones(1).expand(4))),
        ("int8", (torch.ones(1, 64), _INT8, torch.ones(4), torch.ones(8)[::2])),
        ("int8", (torch.ones(1, 64), _INT8, torch.ones(4), torch.ones(4).half())),
        ("int8", (torch.ones(1, 64), _INT8, torch.ones(4), None, torch.ones(128)[::2])),
        ("rows", (torch.ones(1, 128), _CODES, _PAIRS, torch.ones(4))),
        ("rows", (torch.ones(1, 48), _CODES[:, :24].contiguous(), _PAIRS, torch.ones(4))),
        ("rows", (torch.ones(1, 64), _CODES, _PAIRS[:, :1].contiguous(), torch.ones(4))),
        ("rows", (torch.ones(1, 64), _CODES, _PAIRS[:3], torch.ones(4))),
        ("rows", (torch.ones(1, 64), _CODES, _PAIRS.view(torch.int8), torch.ones(4))),
        ("rows", (torch.ones(1, 64), _CODES.view(torch.int8), _PAIRS, torch.ones(4))),
        ("rows", (torch.ones(1, 64), _CODES.t().contiguous().t(), _PAIRS, torch.ones(4))),
        ("rows", (torch.ones(1, 64), _CODES, _PAIRS, torch.ones(5))),
        ("rows", (torch.ones(1, 64), _CODES, _PAIRS, torch.ones(4), torch.ones(5))),
        ("strips", (torch.ones(1, 32), _STRIP, _STRIP_PAIRS, torch.ones(32))),
        ("strips", (torch.ones(1, 64), _STRIP, _STRIP_PAIRS[:1], torch.ones(64))),
        ("strips", (torch.ones(1, 64), _STRIP, _STRIP_PAIRS, torch.ones(32))),
        ("strips", (torch.ones(1, 64), _STRIP, _STRIP_PAIRS, torch.ones(64), torch.ones(63))),
        ("strips", (torch.ones(1, 64), _STRIP, _STRIP_PAIRS, torch.ones(64), None, 65)),
        ("strips", (torch.ones(33, 64), _STRIP, _STRIP_PAIRS, torch.ones(64))),
        (
            "strips",
            (torch.ones(1, 40), _STRIP[:, :40].contiguous(), _STRIP_PAIRS[:, :40].contiguous(), torch.ones(40)),
        ),
        ("floats", (torch.ones(1, 64), torch.ones(64, 64))),
        ("floats", (torch.ones(1, 64).bfloat16(), torch.ones(64, 64).half())),
        ("floats", (torch.ones(1, 64).bfloat16(), torch.ones(64, 32).bfloat16())),
        ("floats", (torch.ones(1, 64).bfloat16(), torch.ones(64, 64).bfloat16().t())),
    ],
)
def test_what_would_be_read_or_written_wrongly_is_refused(function: str, arguments: tuple[Any, ...]):
    with pytest.raises(ValueError, match=r"must be|are known"):
        getattr(_kernels(), f"multiply_{function}")(*arguments)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux" or shutil.which("cc") is None, reason="cannot be compiled"
)
def test_installing_compiles():
    assert importlib.util.find_spec("griffin_offload.kernels._library") is not None
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert gemv.kernels() is not None


def test_without_them_torchs_are_used_and_that_is_said(monkeypatch: pytest.MonkeyPatch):
    if platform.machine() != "x86_64":
        pytest.skip("torch's are the only ones here")
    monkeypatch.setattr("griffin_offload.kernels.library.built", lambda directory: None)
    for cached in (library, gemv.kernels):
        cached.cache_clear()
    try:
        with pytest.warns(UserWarning, match="torch's slower kernels, without ours: they were not compiled: install"):
            assert gemv.kernels() is None
    finally:
        for cached in (library, gemv.kernels):
            cached.cache_clear()


@needs_kernels
def test_there_is_one_pool_of_threads(tmp_path: Path):
    """A second OpenMP runtime would spin on the same cores."""
    code = (
        "import os, torch; from griffin_offload.kernels import gemv as few_rows; torch.set_num_threads(2);"
        "torch.ones(999, 999).sum(); before = len(os.listdir('/proc/self/task'));"
        "few_rows.kernels().multiply_int8(torch.ones(1, 64), torch.ones(640, 64, dtype=torch.int8), torch.ones(640));"
        "print(before, len(os.listdir('/proc/self/task')))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    before, after = map(int, found.stdout.split())
    assert before == after >= 2


def _matrix(layout: str, outputs: int, inputs: int, dtype: torch.dtype, seed: int) -> dict[str, Tensor | None]:
    """Tensors of a matrix in a layout, which differ by `seed`."""
    generator, bits = torch.Generator().manual_seed(seed), int(layout[3]) if layout != "float" else 16
    bias = torch.randn(outputs, generator=generator).to(dtype)
    found: dict[str, Tensor | None] = {"groups": None, "scale": None, "input_scale": None, "bias": bias}
    if layout == "float":
        return found | {"weight": torch.randn(outputs, inputs, generator=generator).to(dtype)}
    scale = torch.rand(outputs, generator=generator)
    if layout == "int8":
        weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
        return found | {"weight": weight, "scale": scale}
    if layout.endswith("_rows"):
        codes, groups = _packed(outputs + seed, inputs // 32, bits)
        return found | {"weight": codes[seed:], "groups": groups[seed:], "scale": scale}
    codes, groups = _packed(inputs + seed, -(-outputs // 32), bits)
    codes, groups = ref.rows_as_strips(codes[seed:].contiguous(), groups[seed:].contiguous())
    return found | {"weight": codes, "groups": groups, "input_scale": torch.rand(inputs, generator=generator).to(dtype)}


LAYOUTS = ["int8", "float", *(f"int{bits}_{form}" for bits in (4, 3, 2) for form in ("rows", "strips"))]


@needs_kernels
@of_all_processors
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=12)
@given(data=st.data(), threads=st.integers(1, 3), outputs=st.integers(1, 200), groups=st.integers(1, 9))
def test_several_matrices_are_what_each_is_alone(
    kind: Kind, layout: str, data: st.DataObject, threads: int, outputs: int, groups: int
):
    """To the last bit, and each row as if it were the only one, whichever matrices have the same rows."""
    torch.set_num_threads(threads)
    dtypes = DTYPES[1:] if layout == "float" else DTYPES
    own, dtype, rows = _kernels(**kind), data.draw(st.sampled_from(dtypes)), data.draw(st.integers(1, 7))
    x = torch.randn(rows, 32 * groups, generator=torch.Generator().manual_seed(rows)).to(dtype)
    ends = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=3))})
    ranges = [(first, end - first) for first, end in itertools.pairwise(ends)]
    asked = [own for own in ranges for _ in range(data.draw(st.integers(1, 3)))]
    kept = [_matrix(layout, outputs, 32 * groups, dtype, seed) for seed in range(len(asked))]
    matrices = [gemv.checked_matrix(layout, tensors, outputs, dtype) for tensors in kept]
    found = own.multiply_several(x, matrices, asked)
    alone = [
        own.multiply(x[i : i + 1], one)
        for one, (start, n) in zip(matrices, asked, strict=True)
        for i in range(start, start + n)
    ]
    assert torch.equal(found, torch.cat([x.new_empty(0, outputs), *alone]))


@needs_kernels
def test_several_that_do_not_go_together_are_refused():
    own, x = _kernels(), torch.ones(2, 64)
    tensors = _matrix("int4_rows", 8, 64, torch.float32, 0)
    matrix = gemv.checked_matrix("int4_rows", tensors, 8, torch.float32)
    other = gemv.checked_matrix("int3_rows", _matrix("int3_rows", 8, 64, torch.float32, 0), 8, torch.float32)
    for asked in ([(0, 3)], [(2, 1)], [(-1, 1)], [(0, 2), (1, 1)], [(1, 1), (0, 1)]):
        with pytest.raises(ValueError, match="rows from"):
            own.multiply_several(x, len(asked) * [matrix], asked)
    with pytest.raises(ValueError, match="beside"):
        own.multiply_several(x, [matrix, other], [(0, 1), (0, 1)])
    with pytest.raises(ValueError, match="x, "):
        own.multiply_several(x.half(), [matrix], [(0, 1)])
    for name, tensor in tensors.items():
        if tensor is not None:
            with pytest.raises(ValueError, match="must be"):
                gemv.checked_matrix("int4_rows", tensors | {name: tensor[1:]}, 8, torch.float32)
