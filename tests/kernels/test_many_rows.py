"""The kernels of gemm.c against float64, over forms, shapes, types and threads, of both kinds of processors."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import quantised_reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from griffin_offload.kernels import gemm, table
from griffin_offload.kernels.library import library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("rows", "neurons", "strips")
FORMS = ("float", "int8", *(f"int{bits}_{kind}" for bits in (4, 3, 2) for kind in KINDS))
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


def _kernels(dtype: torch.dtype, tiles: bool = False) -> gemm.GemmKernels:
    assert LOADED is not None
    return gemm.GemmKernels(LOADED, dtype, tiles=tiles)


@dataclass(frozen=True)
class Matrix:
    """In a form, in float64, and its numbers' sizes before offsets are taken off."""

    weight: Tensor
    scale: Tensor | None
    groups: Tensor | None
    exact: Tensor
    size: Tensor


def _matrix(form: str, outputs: int, inputs: int, dtype: torch.dtype, x_dtype: torch.dtype) -> Matrix:
    generator = torch.Generator().manual_seed(outputs + inputs)
    if form == "float":
        weight = torch.randn(outputs, inputs, generator=generator).to(x_dtype)
        return Matrix(weight, None, None, weight.double(), weight.double().abs())
    if form == "int8":
        levels = torch.randint(-128, 128, (outputs, inputs), generator=generator)
        scale = torch.rand(outputs, generator=generator).add(0.1).to(dtype)
        exact = levels * scale.double()[:, None]
        return Matrix(levels.to(torch.int8), scale, None, exact, exact.abs())
    bits, lying = int(form[3]), form.removeprefix(form[:5])
    shape = (outputs, inputs) if lying == "rows" else (inputs, outputs)
    codes = torch.randint(0, 256, (shape[0], shape[1] * bits // 8), generator=generator, dtype=torch.uint8)
    groups = torch.randint(0, 256, (shape[0], shape[1] // 32, 2), generator=generator, dtype=torch.uint8)
    if bits == 4:
        groups[..., 0] %= 12 * 16  # steps of up to 2
    stored = ref.of_bytes(codes, groups)
    size = stored.step * (stored.levels + stored.offset.abs())
    if lying == "rows":
        scale = torch.rand(outputs, generator=generator).add(0.1).to(dtype)
        rows = scale.double()[:, None]
        return Matrix(codes, scale, groups, rows * stored.values, rows * size)
    if lying == "strips":
        codes, groups = ref.rows_as_strips(codes, groups)
    return Matrix(codes, None, groups, stored.values.t(), size.t())


def _check(
    form: str,
    kind: Kind,
    sizes: tuple[int, int, int],
    types: tuple[torch.dtype, torch.dtype],
    *,
    has_bias: bool = True,
    fewer: int = 0,
) -> None:
    """A product of `sizes` rows, outputs and inputs, or the next that the form has; `types` are of x and scales. Of
    strips the last outputs are not asked for."""
    (rows, outputs, inputs), dtype = sizes, kind[0]
    x_dtype, scale_dtype = types
    if dtype == torch.bfloat16:
        x_dtype, inputs = torch.bfloat16, inputs + inputs % 2
    if form == "float" and x_dtype == torch.float32:
        x_dtype = torch.float16
    if form.endswith("rows"):
        inputs *= 32
    if form.endswith(("neurons", "strips")):
        outputs += -outputs % 32
    features = outputs - fewer if form.endswith("strips") else outputs
    matrix = _matrix(form, outputs, inputs, scale_dtype, x_dtype)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator).to(x_dtype)
    bias = torch.randn(features, generator=generator).to(x_dtype) if has_bias else None
    kernels = _kernels(*kind)
    assert _takes(kind[0], form, x, matrix.weight)
    found = kernels.multiply(form, x, matrix.weight, matrix.scale, bias, matrix.groups, features)
    exact = x.double() @ matrix.exact[:features].t() + (0 if bias is None else bias.double())
    # Numbers of the matrix are rounded to what is multiplied, sums are in float32, and the product is rounded again.
    of_parts = torch.finfo(dtype).eps / 2 + 4 * inputs**0.5 * torch.finfo(torch.float32).eps
    limits = torch.finfo(x_dtype)
    smallest = limits.tiny * limits.eps + 1e-30  # what float16 rounds its smallest numbers to is above the last bit
    allowed = limits.eps * exact.abs() + of_parts * (x.double().abs() @ matrix.size[:features].t()) + smallest
    assert found.dtype == x_dtype
    assert found.shape == exact.shape
    assert torch.all(((found.double() - exact).abs() <= allowed) | (exact.abs() > limits.max / 2))


@needs_kernels
@of_all
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40)
@given(data=st.data(), sizes=st.tuples(st.integers(1, 20), st.integers(1, 200), st.integers(1, 80)))
def test_equals_float64(form: str, kind: Kind, data: st.DataObject, sizes: tuple[int, int, int]):
    if form == "float" and kind[0] == torch.bfloat16:
        pytest.skip("what is multiplied as it rests is left to torch")
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    types = data.draw(st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)))
    _check(form, kind, sizes, types, has_bias=data.draw(st.booleans()), fewer=data.draw(st.integers(0, 31)))


@needs_kernels
@of_all
@pytest.mark.parametrize("form", FORMS[1:])
def test_more_rows_and_inputs_than_a_part_has(form: str, kind: Kind):
    inputs = 35 if form.endswith("rows") else 1111
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
_CODES, _PAIRS = torch.ones(64, 32, dtype=torch.uint8), torch.ones(64, 2, 2, dtype=torch.uint8)
_STRIPS, _STRIP_PAIRS = _CODES[None], torch.ones(2, 64, 2, dtype=torch.uint8)


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
        ("int4_rows", (_CODES, torch.ones(64), None)),
        ("int4_rows", (_CODES, None, None, _PAIRS)),
        ("int4_rows", (_CODES, torch.ones(63), None, _PAIRS)),
        ("int4_rows", (_CODES, torch.ones(64), None, _PAIRS[:, :1].contiguous())),
        ("int4_rows", (_CODES, torch.ones(64), None, _PAIRS.float())),
        ("int4_rows", (_CODES.t(), torch.ones(64), None, _PAIRS)),
        ("int4_rows", (_CODES[:, :16].contiguous(), torch.ones(64), None, _PAIRS)),
        ("int4_neurons", (_CODES, None)),
        ("int4_neurons", (_CODES[:32], None, None, _PAIRS[:32])),
        ("int4_neurons", (_CODES[:, :8].contiguous(), None, None, _PAIRS)),
        ("int4_neurons", (_CODES, None, None, _PAIRS[:, :1].contiguous())),
        ("int4_strips", (_STRIPS, None)),
        ("int4_strips", (_STRIPS[:, :32].contiguous(), None, None, _STRIP_PAIRS)),
        ("int4_strips", (_STRIPS, None, None, _STRIP_PAIRS[:1])),
        ("int4_strips", (_STRIPS, None, torch.ones(65).bfloat16(), _STRIP_PAIRS)),
    ],
)
def test_what_would_be_read_or_written_wrongly_is_refused(form: str, arguments: tuple[Any, ...]):
    with pytest.raises(ValueError, match=r"must be|needs its scales"):
        _kernels(torch.float32).multiply(form, _X, *arguments)


@needs_kernels
def test_what_they_take():
    floats, pairs = torch.float32, torch.bfloat16
    weight, odd = torch.ones(4, 64, dtype=torch.int8), torch.ones(4, 33, dtype=torch.int8)
    assert _takes(floats, "int8", torch.ones(3, 33), odd)
    assert not _takes(pairs, "int8", torch.ones(3, 33).bfloat16(), odd)
    assert _takes(pairs, "int8", _X, weight)
    assert not _takes(pairs, "int8", _X.half(), weight)
    assert not _takes(floats, "float", _X, weight.half())
    assert not _takes(floats, "int8", _X.double(), weight)
    assert not _takes(floats, "int8", _X.float().requires_grad_(), weight)


def _takes(computes: torch.dtype, layout: str, x: Tensor, weight: Tensor) -> bool:
    """Whether a row of the table does, on a processor that has what the row needs."""
    return any(
        x.dtype in kernel.numbers and kernel.takes(x, {"weight": weight})
        for kernel in table.rows()
        if kernel.ours and (kernel.operation, kernel.layout, kernel.computes) == ("gemm", layout, computes)
    )


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
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        table.forget()
        assert _applies(torch.float32) == (LOADED is not None and capability == "AVX2")
        assert _applies(torch.bfloat16) == (LOADED is not None and LOADED.sums_pairs)
        assert not _applies(torch.float64)
    table.forget()


def _applies(dtype: torch.dtype) -> bool:
    found = table.products("int8", table.MANY, torch.ones(1, 64, dtype=dtype), dtype, True)
    return any(kernel.ours and kernel.operation == "gemm" for kernel in found)
