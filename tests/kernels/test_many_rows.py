"""The kernels of many_rows.c against float64, over forms, shapes, types and threads, of both kinds of processors."""

import math
from typing import Any

import pytest
import quantised_reference as ref
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from griffin_offload.kernels import many_rows
from griffin_offload.kernels.compiled import library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("float", "int8", "int4_rows", "int4_neurons", "int4_tiles")
LOADED = library()
needs_kernels = pytest.mark.skipif(LOADED is None, reason="another processor, or no compiler")
needs_pairs = pytest.mark.skipif(
    LOADED is None or not LOADED.sums_pairs, reason="this processor multiplies no pairs of bfloat16 numbers"
)
needs_tiles = pytest.mark.skipif(
    LOADED is None or not LOADED.sums_tiles, reason="this processor multiplies no tiles of bfloat16 numbers"
)
Kind = tuple[torch.dtype, bool]
of_all = pytest.mark.parametrize(
    "kind",
    [
        (torch.float32, False),
        pytest.param((torch.bfloat16, False), marks=needs_pairs),
        pytest.param((torch.bfloat16, True), marks=needs_tiles),
    ],
    ids=["floats", "pairs", "tiles"],
)


def _kernels(dtype: torch.dtype, tiles: bool = False) -> many_rows.Kernels:
    assert LOADED is not None
    return many_rows.Kernels(LOADED, dtype, tiles=tiles)


def _matrix(
    form: str, outputs: int, inputs: int, group: int, block: int, dtype: torch.dtype, x_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Weight and scale in `form`, the matrix in float64, and its numbers' sizes before offsets are taken off."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    if form == "float":
        weight = torch.randn(outputs, inputs, generator=generator).to(x_dtype)
        return weight, None, weight.double(), weight.double().abs()
    if form == "int8":
        levels = torch.randint(-128, 128, (outputs, inputs), generator=generator)
        scale = torch.rand(outputs, generator=generator).add(0.1).to(dtype)
        matrix = levels * scale.double()[:, None]
        return levels.to(torch.int8), scale, matrix, matrix.abs()
    levels = torch.randint(0, 16, (outputs, inputs), generator=generator)
    if form == "int4_neurons":
        scale = torch.rand(outputs, generator=generator).add(0.1).to(dtype)
        matrix = (levels - 7.5) * scale.double()[:, None]
        return ref.packed(levels.t()), scale, matrix, matrix.abs()
    scales = torch.randn(outputs, inputs // group, 2, generator=generator).to(dtype)
    scale, offset = scales.double().repeat_interleave(group, dim=1).unbind(-1)
    matrix, size = (levels - 8) * scale + offset, 8 * scale.abs() + offset.abs()
    if form == "int4_rows":
        return ref.packed(levels), scales, matrix, size
    low, high = levels.view(-1, 2, block // 2, inputs).unbind(1)
    tiles = (low | high << 4).to(torch.uint8).transpose(1, 2).reshape(outputs, -1).contiguous()
    return tiles, scales.transpose(0, 1).contiguous(), matrix, size


def _check(
    form: str,
    kind: Kind,
    sizes: tuple[int, int, int],
    types: tuple[torch.dtype, torch.dtype],
    group: int = 32,
    block: int = 64,
    *,
    has_bias: bool = True,
) -> None:
    """A product of `sizes` rows, outputs and inputs, or the next that the form has; `types` are of x and scales."""
    (rows, features, inputs), dtype = sizes, kind[0]
    x_dtype, scale_dtype = types
    if dtype == torch.bfloat16:
        x_dtype, inputs = torch.bfloat16, inputs + inputs % 2
    if form == "float" and x_dtype == torch.float32:
        x_dtype = torch.float16
    if form in ("int4_rows", "int4_tiles"):
        group = 32 if form == "int4_rows" else group
        inputs *= group
    # What fills up a block of tiles is no feature.
    outputs = features + -features % {"int4_neurons": 32, "int4_tiles": 64}.get(form, 1)
    features = outputs if form == "int4_neurons" else features
    weight, scale, matrix, size = _matrix(form, outputs, inputs, group, block, scale_dtype, x_dtype)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator).to(x_dtype)
    bias = torch.randn(features, generator=generator).to(x_dtype) if has_bias else None
    kernels = _kernels(*kind)
    assert kernels.take(form, x, weight)
    found = kernels.multiply(form, x, weight, scale, bias, block, features)
    exact = x.double() @ matrix[:features].t() + (0 if bias is None else bias.double())
    # Numbers of the matrix are rounded to what is multiplied, sums are in float32, and the product is rounded again.
    of_parts = torch.finfo(dtype).eps / 2 + 4 * inputs**0.5 * torch.finfo(torch.float32).eps
    limits = torch.finfo(x_dtype)
    smallest = limits.tiny * limits.eps + 1e-30  # what float16 rounds its smallest numbers to is above the last bit
    allowed = limits.eps * exact.abs() + of_parts * (x.double().abs() @ size[:features].t()) + smallest
    assert found.dtype == x_dtype
    assert found.shape == exact.shape
    assert torch.all((found.double() - exact).abs() <= allowed)


@needs_kernels
@of_all
@pytest.mark.parametrize("form", FORMS)
@given(data=st.data(), sizes=st.tuples(st.integers(1, 20), st.integers(1, 200), st.integers(1, 80)))
def test_equals_float64(form: str, kind: Kind, data: st.DataObject, sizes: tuple[int, int, int]):
    if form == "float" and kind[0] == torch.bfloat16:
        pytest.skip("what is multiplied as it rests is left to torch")
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    types = data.draw(st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)))
    group, block = data.draw(st.sampled_from([2, 32, 128])), data.draw(st.sampled_from([32, 64]))
    _check(form, kind, sizes, types, group, block, has_bias=data.draw(st.booleans()))


@needs_kernels
@of_all
@pytest.mark.parametrize("form", FORMS[1:])
def test_more_rows_and_inputs_than_a_part_has(form: str, kind: Kind):
    inputs = 35 if form in ("int4_rows", "int4_tiles") else 1111
    _check(form, kind, (530, 70, inputs), (torch.bfloat16, torch.float32))


@needs_kernels
def test_numbers_below_the_normal_ones_of_float16():
    _check("float", (torch.float32, False), (15, 73, 1), (torch.float16, torch.float32), has_bias=False)


@needs_kernels
@of_all
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_in_its_row(bad: float, kind: Kind):
    x = torch.ones(9, 34, dtype=torch.bfloat16)
    x[4, 33] = bad
    found = _kernels(*kind).multiply("int8", x, torch.ones(5, 34, dtype=torch.int8), torch.ones(5))
    assert not found[4].isfinite().any()
    assert torch.all(found[[0, 1, 2, 3, 5, 6, 7, 8]] == 34)


_X = torch.ones(3, 64).bfloat16()
_BYTES, _TILES = torch.ones(64, 32, dtype=torch.uint8), torch.ones(2, 64, 2)


@needs_kernels
@pytest.mark.parametrize(
    ("form", "arguments"),
    [
        ("float", (torch.ones(4, 64), None)),
        ("float", (torch.ones(4, 32).bfloat16(), None)),
        ("int8", (torch.ones(4, 64, dtype=torch.int8), None)),
        ("int8", (torch.ones(4, 64, dtype=torch.int8), torch.ones(3))),
        ("int8", (torch.ones(4, 64, dtype=torch.uint8), torch.ones(4))),
        ("int8", (torch.ones(4, 64, dtype=torch.int8), torch.ones(4), torch.ones(3).bfloat16())),
        ("int8", (torch.ones(4, 64, dtype=torch.int8), torch.ones(4), torch.ones(4))),
        ("int4_rows", (_BYTES, torch.ones(64, 1, 2))),
        ("int4_rows", (_BYTES.t(), torch.ones(64, 2, 2))),
        ("int4_neurons", (_BYTES, torch.ones(32))),
        ("int4_neurons", (torch.ones(64, 8, dtype=torch.uint8), torch.ones(16))),
        ("int4_tiles", (_BYTES, _TILES, None, 16)),
        ("int4_tiles", (_BYTES, torch.ones(3, 64, 2), None, 64)),
        ("int4_tiles", (_BYTES, torch.ones(64, 64, 2), None, 64)),
        ("int4_tiles", (_BYTES, torch.ones(0, 64, 2), None, 64)),
        ("int4_tiles", (_BYTES[:32], _TILES[:, :32].contiguous(), None, 32)),
    ],
)
def test_what_would_be_read_or_written_wrongly_is_refused(form: str, arguments: tuple[Any, ...]):
    with pytest.raises(ValueError, match=r"must be|in blocks of|needs its scales"):
        _kernels(torch.float32).multiply(form, _X, *arguments)


@needs_kernels
def test_what_they_take():
    floats, pairs = _kernels(torch.float32), _kernels(torch.bfloat16)
    weight, odd = torch.ones(4, 64, dtype=torch.int8), torch.ones(4, 33, dtype=torch.int8)
    assert floats.take("int8", torch.ones(3, 33), odd)
    assert not pairs.take("int8", torch.ones(3, 33).bfloat16(), odd)
    assert pairs.take("int8", _X, weight)
    assert not pairs.take("int8", _X.half(), weight)
    assert not floats.take("float", _X, weight.half())
    assert not floats.take("int8", _X.double(), weight)
    assert not floats.take("int8", _X.float().requires_grad_(), weight)


@needs_tiles
@pytest.mark.parametrize("rows", [5, 40])
def test_torch_and_ours_leave_each_other_their_tiles(rows: int):
    """Both tell the processor how large its tiles are, in the same threads, one after the other."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 256, generator=generator).bfloat16()
    weight = torch.randint(-127, 128, (256, 256), generator=generator, dtype=torch.int8)
    scale, halves = torch.ones(256), weight.bfloat16()
    for _ in range(3):
        ours, own = _kernels(torch.bfloat16, tiles=True).multiply("int8", x, weight, scale), halves[:rows].clone()
        torch.testing.assert_close(ours, x @ halves.t(), rtol=2**-7, atol=1)
        torch.testing.assert_close(own @ halves, (own.double() @ halves.double()).bfloat16(), rtol=2**-7, atol=64)


def test_which_processor_has_which(monkeypatch: pytest.MonkeyPatch):
    """Only what was measured is replaced."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    many_rows.kernels.cache_clear()
    assert (many_rows.kernels(torch.float32) is None) == (LOADED is None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    many_rows.kernels.cache_clear()
    assert many_rows.kernels(torch.float32) is None
    assert (many_rows.kernels(torch.bfloat16) is None) == (LOADED is None or not LOADED.sums_pairs)
    assert many_rows.kernels(torch.float64) is None
    many_rows.kernels.cache_clear()
