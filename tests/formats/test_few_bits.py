"""int3 and int2 against their formula in float64, and what they are made from: floats, and other formats' neurons."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import quantised_reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from griffin_offload.config import LoadConfig
from griffin_offload.engine.spec import examine
from griffin_offload.errors import CheckpointError, UnsupportedModel
from griffin_offload.formats import Format, every, get
from griffin_offload.formats.base import neuron_scale, row_scale
from griffin_offload.formats.compensation import Compensation
from griffin_offload.formats.few_bits import INT2, INT3, FewBits
from griffin_offload.kernels import table

GROUP, HALF = ref.GROUP, ref.GROUP // 2
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
formats = pytest.mark.parametrize("format", [INT3, INT2], ids=str)
some_format = st.sampled_from([INT3, INT2])


@pytest.fixture(autouse=True, params=["kernels", "torch"])
def _by(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways, whichever this machine would choose."""
    with table.leaving_out(lambda kernel: kernel.ours and request.param == "torch"):
        yield


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Rows [R, C] of any type: ordinary, far from zero, with outliers and zeros, and all but zero."""
    rows, groups = draw(st.integers(1, 11)), draw(st.integers(1, 7))
    weight = _random(rows, groups * GROUP, seed=draw(st.integers(0, 2**20)))
    weight += draw(st.sampled_from([0, 0, 8, -300]))
    for _ in range(draw(st.integers(0, 3))):
        row, column = draw(st.integers(0, rows - 1)), draw(st.integers(0, weight.shape[1] - 1))
        half = slice(column // HALF * HALF, column // HALF * HALF + HALF)
        kind = draw(st.sampled_from(["outlier", "constant", "zero half", "zero row", "small half"]))
        if kind == "outlier":
            weight[row, column] *= draw(st.sampled_from([30, -30]))
        elif kind == "constant":
            weight[row, half] = weight[row, column].clone()
        elif kind == "small half":
            weight[row, half] *= 1e-5
        else:
            weight[row, half if kind == "zero half" else slice(None)] = 0
    return (weight * draw(st.sampled_from([1.0, 1e-3, 0.1]))).to(draw(st.sampled_from(DTYPES)))


def _plain(numbers: Tensor, counts: Tensor, bits: int) -> Tensor:
    """Squared errors [R, H] of levels from the smallest to the largest of each half [R, H, 16], brought to steps and
    offsets that can be stored."""
    highest, steps, offsets = 2**bits - 1, ref.few_bits_steps(bits), ref.few_bits_offsets(bits) + (2**bits - 1) / 2
    low, high = numbers.amin(-1), numbers.amax(-1)
    # No offset reaches farther.
    wanted = torch.maximum((high - low) / highest, torch.maximum(high, -low) / (highest / 2 + offsets.max()))
    found = []
    # Where the range lies between two that can be stored, the worse: float32 may choose either.
    for nudge, push in product((-1e-4, 1e-4), (-1e-4, 1e-4)):
        step = steps[(steps - wanted[..., None] * (1 + nudge)).abs().argmin(-1)]
        middle = offsets[(offsets - ((low + high) / 2 / step + push)[..., None]).abs().argmin(-1)]
        levels = step[..., None] * (torch.arange(highest + 1) - highest / 2 + middle[..., None])
        errors = (numbers[..., None] - levels[:, :, None]).abs().amin(-1)
        found.append(((errors.square() * 1.001 + 1e-9) * counts).sum(-1))
    return torch.stack(found).amax(0)


def _check(format: FewBits, weight: Tensor, scale: Tensor, found: tuple[Tensor, Tensor], counts: Tensor | None) -> None:
    """Codes are the nearest, and no half is missed by more than plain levels miss it by."""
    codes, groups = found
    bits, rows = format.code_bits, weight.shape[0]
    assert codes.dtype == groups.dtype == torch.uint8
    assert codes.shape == (rows, weight.shape[1] * bits // 8)
    assert groups.shape == (rows, weight.shape[1] // GROUP, 2)
    numbers, stored = weight.double() / ref.divisor(scale)[:, None], ref.FewBits.of_bytes(codes, groups)
    missed = (stored.values - numbers).abs()
    every_level = stored.step[..., None] * (torch.arange(2**bits) + stored.offset[..., None])
    least = (every_level - numbers[..., None]).abs().amin(-1)
    assert torch.all(missed <= least + 1e-5 * (stored.step + numbers.abs()))
    own = (torch.ones(weight.shape[1]) if counts is None else counts).double().view(-1, HALF)
    halves = numbers.view(rows, -1, HALF)
    errors = (missed.view_as(halves).square() * own).sum(-1)
    assert torch.all(errors <= _plain(halves, own, bits))


@settings(max_examples=100)
@given(data=st.data(), format=some_format, weight=matrices(), dtype=st.sampled_from(DTYPES))
def test_rows_and_neurons(data: st.DataObject, format: FewBits, weight: Tensor, dtype: torch.dtype):
    """Whichever way columns lie in memory."""
    counts = None
    if data.draw(st.booleans()):
        counts = torch.exp(2 * _random(weight.shape[1], seed=1))
        counts[: HALF * data.draw(st.integers(0, 1))] = 0
    scale = row_scale(weight, dtype)
    if dtype == torch.float16 and not 1e-3 < float(scale.float().amax()) < 1e3:
        return  # no scale of float16
    _check(format, weight, scale, format.quantize_rows(weight, scale, counts), counts)
    columns = weight.t()
    for lying in (columns, columns.contiguous()):
        scale = neuron_scale(lying, dtype)
        _check(format, weight, scale, format.quantize_neurons(lying, scale, counts), counts)


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_err_as_much_as_they_may(format: FewBits, dtype: torch.dtype):
    """Less than uniform levels of whole groups of 32 between their extremes, by their bits."""
    weight = _random(64, 1024).to(dtype)
    stored = format.quantize(weight, dtype, is_down=False)
    error = (ref.grouped_matrix(stored) - weight.double()).norm() / weight.double().norm()
    assert error < {3: 0.14, 2: 0.275}[format.code_bits]
    groups = weight.double().view(64, -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / (2**format.code_bits - 1)
    plain = (((groups - low) / step).round() * step + low - groups).norm() / groups.norm()
    assert error < 0.83 * plain


@formats
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("is_down", [False, True])
def test_weights_of_30_rms_come_back(format: FewBits, sign: int, is_down: bool):
    """And those that cannot are counted."""
    rows = _random(3, 2**14)
    rows[1, 70], rows[2, 5] = sign * 30, sign * 34
    matrix = rows.t().contiguous() if is_down else rows
    found = format.quantize(matrix, torch.float32, is_down=is_down)
    values = ref.grouped_matrix(found)
    values = values.t() if is_down else values
    assert float(values[1, 70]) == pytest.approx(sign * 30, rel=0.2)
    assert float(values[2, 5]) == pytest.approx(sign * 34, rel=0.2)
    assert format.missed(matrix, found, is_down=is_down) == (0, pytest.approx(0, abs=0.2))
    rows[1, 70] = sign * 90
    matrix = rows.t().contiguous() if is_down else rows
    count, worst = format.missed(matrix, format.quantize(matrix, torch.float32, is_down=is_down), is_down=is_down)
    assert count == 1
    assert 0.25 < worst < 1


@formats
def test_zeros_stay_zeros(format: FewBits):
    weight = _random(6, 96)
    weight[1], weight[3, 32:48] = 0, 0
    values = ref.grouped_matrix(format.quantize(weight, torch.float32, is_down=False))
    assert not values[1].any()
    assert not values[3, 32:48].any()


@formats
def test_no_rows(format: FewBits):
    codes, groups = format.quantize_neurons(torch.zeros(64, 0), torch.zeros(0))
    assert codes.shape == (0, 8 * format.code_bits)
    assert groups.shape == (0, 2, 2)
    assert format.unpack(codes, groups, torch.zeros(0, 64)).shape == (0, 64)
    assert format.pack(torch.zeros(0, 64, dtype=torch.uint8)).shape == codes.shape


@formats
def test_bytes_are_bits_a_number(format: FewBits):
    layout = format.stored(is_down=False)
    assert layout.nbytes(64, 1024, torch.bfloat16, is_down=False) == 64 * (1024 * (format.code_bits + 0.5) / 8 + 2)


@given(format=some_format, data=st.data(), dtype=st.sampled_from(DTYPES))
def test_unpacking_is_the_formula(format: FewBits, data: st.DataObject, dtype: torch.dtype):
    rows, groups = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    codes = torch.randint(0, 256, (rows, 4 * format.code_bits * groups), generator=generator, dtype=torch.uint8)
    pairs = torch.randint(0, 256, (rows, groups, 2), generator=generator, dtype=torch.uint8)
    stored = ref.FewBits.of_bytes(codes, pairs)
    found = format.unpack(codes, pairs, torch.empty(stored.levels.shape, dtype=dtype))
    assert torch.all((found.double() - stored.values).abs() <= torch.finfo(dtype).eps * stored.values.abs())
    assert torch.equal(format.pack(stored.levels.byte()), codes)
    strip_codes, strip_pairs = ref.rows_as_strips(codes, pairs)
    for strip, own in zip(range(len(strip_codes)), strip_pairs.view(-1, 2, rows, 2), strict=True):
        values = format.unpack_strip(strip_codes[strip], own, torch.empty(rows, 64, dtype=dtype))
        there = found[:, 64 * strip : 64 * strip + 64]
        assert torch.equal(values[:, : there.shape[1]], there)


HIDDEN, NEURONS = 96, 200


def _out(format: Format, kept: int, dtype: torch.dtype, *, is_down: bool) -> dict[str, Tensor]:
    layout, room = format.resident(is_down=is_down), -(-kept // 64) * 64
    sizes = (HIDDEN, room) if is_down else (room, HIDDEN)
    return {name: torch.zeros(s, dtype=d or dtype) for name, (s, d) in layout.specs(*sizes, is_down=is_down).items()}


@pytest.mark.parametrize(
    ("format", "source"), [(INT3, "int8"), (INT3, "int4"), (INT2, "int8"), (INT2, "int4"), (INT2, "int3")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_down", [False, True])
def test_a_neuron_is_demoted_as_if_its_floats_were_quantised(
    format: FewBits, source: str, dtype: torch.dtype, is_down: bool, monkeypatch: pytest.MonkeyPatch
):
    """Of what is stored in more bits, chunk by chunk, and never the whole matrix."""
    monkeypatch.setattr(Format, "chunk", 64)
    weight = (_random(HIDDEN, NEURONS) if is_down else _random(NEURONS, HIDDEN)).to(dtype)
    stored = get(source).quantize(weight, dtype, is_down=is_down)
    chosen = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(1))[:150].sort().values
    found, expected = (_out(format, 150, dtype, is_down=is_down) for _ in range(2))
    seen: list[int] = []
    whole, called = type(get(source)).chosen_floats, table.call

    def chosen_floats(self: Format, full: dict[str, Tensor], index: Tensor, *of: object, **more: object) -> Tensor:
        seen.append(index.numel())
        return whole(self, full, index, *of, **more)

    def call(operation: str, layout: str, *of: Any, **more: Any) -> Any:
        if layout.endswith("_of_int4"):  # from codes to codes
            seen.append(len(of[0]))
        return called(operation, layout, *of, **more)

    monkeypatch.setattr(type(get(source)), "chosen_floats", chosen_floats)
    monkeypatch.setattr(table, "call", call)
    format.gather(stored, get(source).stored(is_down=is_down), chosen, found, is_down=is_down)
    assert seen == [64, 64, 22]
    floats = whole(get(source), stored, torch.arange(NEURONS), dtype, is_down=is_down)
    torch.testing.assert_close(floats.double(), _values(source, stored), rtol=2 * torch.finfo(dtype).eps, atol=0)
    plain = get("none").stored(is_down=is_down)
    format.gather({"weight": floats}, plain, chosen, expected, is_down=is_down)
    if source != "int4":
        assert all(torch.equal(found[name], expected[name]) for name in found)
        return
    # Its codes are read by the scales that they have, so no byte need be the same; what is missed is.
    scale = "input_scale" if is_down else "scale"
    assert torch.equal(found[scale][:150], stored[scale][chosen])
    if not is_down:
        values = (ref.grouped_matrix({name: out[name][:150] for name in out}) for out in (found, expected))
        errors = [float((value - floats[chosen]).norm()) for value in values]
        assert errors[0] < 1.01 * errors[1]


def _values(source: str, stored: dict[str, Tensor]) -> Tensor:
    if source != "int8":
        return ref.grouped_matrix(stored)
    columns = stored.get("input_scale", torch.ones(stored["weight"].shape[1])).double()
    return stored["weight"].double() * stored["scale"].double()[:, None] * columns


@formats
@pytest.mark.parametrize("source", ["int8", "int4"])
def test_what_demoting_costs(format: FewBits, source: str):
    """Against quantising the original: little beside what the fewer bits cost."""
    weight = _random(256, 1024)
    twice = _values(source, get(source).quantize(weight, torch.float32, is_down=False))
    errors = []
    for floats in (weight, twice.float()):
        found = ref.grouped_matrix(format.quantize(floats, torch.float32, is_down=False))
        errors.append(float((found - weight).norm() / weight.norm()))
    assert (
        errors[1]
        < {("int8", 3): 1.002, ("int8", 2): 1.001, ("int4", 3): 1.2, ("int4", 2): 1.06}[source, format.code_bits]
        * errors[0]
    )


@formats
def test_inputs_make_up_for_what_others_miss(format: FewBits):
    weight, generator = _random(96, 256, seed=8), torch.Generator().manual_seed(3)
    x = torch.randn(400, 256, generator=generator) + torch.randn(400, 8, generator=generator) @ _random(8, 256)
    for is_down in (False, True):
        ways = [
            format.quantize(weight, torch.float32, is_down=is_down, compensation=own)
            for own in (format.compensation(x, is_down=is_down), None)
        ]
        errors = [float((x.double() @ (ref.grouped_matrix(way) - weight).t()).norm()) for way in ways]
        assert errors[0] < 0.75 * errors[1]
    assert isinstance(format.compensation(x, is_down=False), Compensation)


@formats
@pytest.mark.parametrize("is_down", [False, True])
def test_what_is_no_number_is_refused(format: FewBits, is_down: bool):
    weight = torch.ones(32, 64)
    weight[3, 41] = float("nan")
    with pytest.raises(CheckpointError, match=r"infinities or NaN.*--quantize none"):
        format.quantize(weight, torch.float32, is_down=is_down)
    with pytest.raises(UnsupportedModel, match=f"fc: {format} needs rows in groups of 32, this one has 40 numbers"):
        format.check(40, 40, "fc", is_down=is_down)


def test_they_are_taken_only_where_they_are_named(checkpoints):
    """ "auto" knows what it knew before."""
    planned = [
        {shape.precision.name for shape in examine(checkpoints("llama2"), LoadConfig(device="cpu", **of)).shapes}
        for of in ({}, {"quantize": "int3"})
    ]
    assert planned == [{"none", "int8", "int4"}, {"int3"}]
    assert {format.name for format in every()} >= {"int3", "int2"}
