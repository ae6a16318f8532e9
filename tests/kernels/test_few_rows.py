"""The kernels of few_rows.c against float64, over shapes, types, threads and numbers of every size."""

import importlib.util
import math
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from griffin_offload.weights.int4_tiles import cpu_block
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from griffin_offload.kernels import few_rows
from griffin_offload.kernels.compiled import library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_kernels = pytest.mark.skipif(few_rows.kernels() is None, reason="another processor, or no compiler")
Kind = dict[str, bool]
of_all_processors = pytest.mark.parametrize(
    "kind",
    [{"wide": wide, "ahead": ahead} for wide in (False, True) for ahead in (False, True)],
    ids=["avx2", "avx2, ahead", "avx512", "avx512, ahead"],
)
"""Kernels for instructions that this processor has not are those of AVX2 again."""


def _kernels(**kind: bool) -> few_rows.Kernels:
    found = library()
    assert found is not None
    return few_rows.Kernels(found, **kind)


def _check(found: Tensor, x: Tensor, matrix: Tensor, sizes: Tensor, group: int) -> None:
    """Within some roundings of the type of what a row and an output add up in absolute numbers, and half a step of
    16 or 31 bits of a group's largest number; where the type holds that."""
    exact, size, limits = x.double() @ matrix.t(), x.double().abs() @ sizes.t(), torch.finfo(x.dtype)
    largest = torch.cat([p.abs().amax(1, keepdim=True).expand_as(p) for p in x.double().split(group, dim=1)], dim=1)
    step = 2.0**-30 if x.dtype == torch.float32 else 2.0**-15
    allowed = 4 * limits.eps * size + step / 2 * largest @ sizes.t() + limits.tiny
    assert found.dtype == x.dtype
    assert torch.all(((found.double() - exact).abs() <= allowed) | (size > limits.max / 2))


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
    x = data.draw(inputs_of(inputs))
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale = torch.rand(outputs, generator=generator).add(0.1).to(data.draw(st.sampled_from(DTYPES)))
    matrix = weight * scale.double()[:, None]
    _check(_kernels(**kind).multiply_int8(x, weight, scale), x, matrix, matrix.abs(), 128)


@needs_kernels
@of_all_processors
@pytest.mark.parametrize("scale_type", DTYPES)
@pytest.mark.parametrize("group", [32, 96, 128])
@given(data=st.data(), blocks=st.integers(1, 5), inputs=st.integers(1, 4), threads=st.integers(1, 3))
def test_int4(
    kind: Kind,
    group: int,
    scale_type: torch.dtype,
    data: st.DataObject,
    blocks: int,
    inputs: int,
    threads: int,
):
    """Both widths of blocks; numbers are packed here, as int4_tiles.py says. Some groups and types have kernels that
    were compiled for them."""
    torch.set_num_threads(threads)
    block, outputs = data.draw(st.sampled_from([32, 64])), 64 * blocks
    x = data.draw(inputs_of(inputs * group))
    generator = torch.Generator().manual_seed(blocks)
    levels = torch.randint(0, 16, (outputs, inputs * group), generator=generator)
    scales = torch.randn(inputs, outputs, 2, generator=generator).to(scale_type)
    low, high = levels.view(-1, 2, block // 2, inputs * group).unbind(1)
    tiles = (low | high << 4).to(torch.uint8).transpose(1, 2).reshape(outputs, -1).contiguous()
    scale, offset = (part.t().repeat_interleave(group, dim=1) for part in scales.double().unbind(-1))
    found = _kernels(**kind).multiply_int4(x, tiles, scales, block)
    _check(found, x, (levels - 8) * scale + offset, 8 * scale.abs() + offset.abs(), group)


@needs_kernels
@of_all_processors
@given(data=st.data(), outputs=st.integers(1, 300), inputs=st.integers(1, 300), threads=st.integers(1, 3))
def test_floats(kind: Kind, data: st.DataObject, outputs: int, inputs: int, threads: int):
    torch.set_num_threads(threads)
    x = data.draw(inputs_of(inputs))
    x = x.bfloat16() if x.dtype == torch.float32 else x
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, inputs, generator=generator).to(x.dtype)
    found, exact = _kernels(**kind).multiply_floats(x, weight), x.double() @ weight.double().t()
    size, limits = x.double().abs() @ weight.double().abs().t(), torch.finfo(x.dtype)
    allowed = limits.eps * exact.abs() + 32 * 2.0**-24 * size + limits.tiny
    assert found.dtype == x.dtype
    assert torch.all(((found.double() - exact).abs() <= allowed) | (exact.abs() > limits.max / 2))


@needs_kernels
@of_all_processors
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_scaled_inputs_and_features(kind: Kind, dtype: torch.dtype):
    """What is filled up to a whole block of tiles is no feature."""
    generator = torch.Generator().manual_seed(0)
    x, input_scale = torch.randn(3, 64, generator=generator).to(dtype), torch.rand(64, generator=generator).to(dtype)
    for features, int4 in ((70, False), (70, True), (128, True)):
        bias, own = torch.randn(features, generator=generator).to(dtype), _kernels(**kind)
        levels = torch.randint(0, 16, (128, 64), generator=generator)
        if int4:
            low, high = levels.view(2, 2, 32, 64).unbind(1)
            tiles = (low | high << 4).to(torch.uint8).transpose(1, 2).reshape(128, -1).contiguous()
            scales = torch.tensor([1.0, 0.0]).expand(2, 128, 2).contiguous()
            found = own.multiply_int4(x, tiles, scales, 64, bias, input_scale, features)
        else:
            weight = (levels - 8).to(torch.int8)[:features].contiguous()
            found = own.multiply_int8(x, weight, torch.ones(features), bias, input_scale)
        scaled = x.double() * input_scale.double()
        exact = scaled @ (levels[:features] - 8).double().t() + bias.double()
        assert found.shape == (3, features)
        torch.testing.assert_close(found.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=0.01)


@needs_kernels
@of_all_processors
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_none(kind: Kind, bad: float, dtype: torch.dtype):
    """In the row that has it and in no other."""
    x = torch.ones(3, 256, dtype=dtype)
    x[1, 200] = bad
    weight, scale = torch.ones(40, 256, dtype=torch.int8), torch.ones(40, dtype=dtype)
    tiles, scales = torch.ones(64, 128, dtype=torch.uint8), torch.ones(8, 64, 2, dtype=dtype)
    own = _kernels(**kind)
    for found in (own.multiply_int8(x, weight, scale), own.multiply_int4(x, tiles, scales, cpu_block())):
        assert found[1].isnan().all()
        assert found[::2].isfinite().all()


@needs_kernels
@of_all_processors
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-31, 1e-29, 1e30])
def test_numbers_of_any_size(kind: Kind, size: float):
    x = torch.full((1, 128), size)
    found = _kernels(**kind).multiply_int8(x, torch.full((1, 128), 2, dtype=torch.int8), torch.ones(1))
    torch.testing.assert_close(found, torch.full((1, 1), 256 * size), rtol=1e-6, atol=1e-27)


@needs_kernels
@of_all_processors
def test_largest_sums(kind: Kind):
    """No 32-bit sum overflows: the largest group, largest weights, largest numbers, one sign."""
    x = torch.full((1, 256), 3.0)
    for sign in (1, -1):
        weight = torch.full((64, 256), 127 * sign, dtype=torch.int8)
        assert torch.all(_kernels(**kind).multiply_int8(x, weight, torch.ones(64)) == 3 * 127 * 256 * sign)
    for level in (0, 15):
        tiles = torch.full((64, 128), level * 17, dtype=torch.uint8)
        scales = torch.tensor([1.0, 0.0]).expand(2, 64, 2).contiguous()
        assert torch.all(_kernels(**kind).multiply_int4(x, tiles, scales, cpu_block()) == 3 * 256 * (level - 8))


_INT8, _INT4 = torch.ones(4, 64, dtype=torch.int8), torch.ones(64, 32, dtype=torch.uint8)


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
        ("int4", (torch.ones(1, 256), torch.ones(64, 128, dtype=torch.uint8), torch.ones(1, 64, 2), 32)),
        ("int4", (torch.ones(1, 256), torch.ones(48, 128, dtype=torch.uint8), torch.ones(8, 48, 2), 32)),
        ("int4", (torch.ones(1, 96), torch.ones(96, 48, dtype=torch.uint8), torch.ones(3, 96, 2), 96)),
        ("int4", (torch.ones(1, 6), torch.ones(64, 3, dtype=torch.uint8), torch.ones(2, 64, 2), 64)),
        ("int4", (torch.ones(1, 128), _INT4, torch.ones(4, 64, 2), 64)),
        ("int4", (torch.ones(1, 64), _INT4, torch.ones(2, 64, 1), 64)),
        ("floats", (torch.ones(1, 64), torch.ones(64, 64))),
        ("floats", (torch.ones(1, 64).bfloat16(), torch.ones(64, 64).half())),
        ("floats", (torch.ones(1, 64).bfloat16(), torch.ones(64, 32).bfloat16())),
        ("floats", (torch.ones(1, 64).bfloat16(), torch.ones(64, 64).bfloat16().t())),
    ],
)
def test_what_would_be_read_or_written_wrongly_is_refused(function: str, arguments: tuple[Any, ...]):
    with pytest.raises(ValueError, match=r"must be|in blocks of"):
        getattr(_kernels(), f"multiply_{function}")(*arguments)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux" or shutil.which("cc") is None, reason="cannot be compiled"
)
def test_installing_compiles():
    assert importlib.util.find_spec("griffin_offload.kernels._library") is not None
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert few_rows.kernels() is not None


def test_without_them_torchs_are_used_and_that_is_said(monkeypatch: pytest.MonkeyPatch):
    if platform.machine() != "x86_64":
        pytest.skip("torch's are the only ones here")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for cached in (library, few_rows.kernels):
        cached.cache_clear()
    try:
        with pytest.warns(UserWarning, match="torch's slower kernels, without ours: they were not compiled: install"):
            assert few_rows.kernels() is None
    finally:
        for cached in (library, few_rows.kernels):
            cached.cache_clear()


@needs_kernels
def test_there_is_one_pool_of_threads(tmp_path: Path):
    """A second OpenMP runtime would spin on the same cores."""
    code = (
        "import os, torch; from griffin_offload.kernels import few_rows; torch.set_num_threads(2);"
        "torch.ones(999, 999).sum(); before = len(os.listdir('/proc/self/task'));"
        "few_rows.kernels().multiply_int8(torch.ones(1, 64), torch.ones(640, 64, dtype=torch.int8), torch.ones(640));"
        "print(before, len(os.listdir('/proc/self/task')))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    before, after = map(int, found.stdout.split())
    assert before == after >= 2
