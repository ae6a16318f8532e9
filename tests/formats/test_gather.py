"""Gathering commutes with quantising: chosen neurons of what is stored are what quantising the chosen ones gives."""

from itertools import product
from unittest import mock

import pytest
import quantised_reference as ref
import torch
from torch import Tensor

from griffin_offload.devices.threads import limited_threads
from griffin_offload.formats import FLOATS, Format, get
from griffin_offload.formats.base import Tensors, take
from griffin_offload.kernels import gather, table

HIDDEN, NEURONS, ROOM = 96, 200, 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KEPT = (0, 1, 70, NEURONS)

precisions = pytest.mark.parametrize("precision", ["int8", "int4"])
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True, params=[(128, True), (Format.chunk, True), (128, False), (Format.chunk, False)])
def _ways(request: pytest.FixtureRequest):
    """Several chunks, the last one incomplete, and one; by our kernels, where there are any, and without them."""
    chunk, ours = request.param
    with mock.patch.object(Format, "chunk", chunk):
        if ours:
            yield
            return
        with table.leaving_out(lambda kernel: kernel.ours):
            yield


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return (weight * torch.linspace(0.1, 3, shape[-1])).to(dtype)


def _chosen(kept: int) -> Tensor:
    return torch.randperm(NEURONS, generator=torch.Generator().manual_seed(kept))[:kept].sort().values


def _rows_out(precision: str, parts: int, dtype: torch.dtype) -> dict[str, Tensor]:
    rows = parts * ROOM
    beside = {"scale": torch.zeros(rows, dtype=dtype), "bias": torch.zeros(rows, dtype=dtype)}
    if precision == "int8":
        return {"weight": torch.zeros(rows, HIDDEN, dtype=torch.int8), **beside}
    weight = torch.zeros(rows, HIDDEN // 2, dtype=torch.uint8)
    return {"weight": weight, "groups": torch.zeros(rows, HIDDEN // 32, 2, dtype=torch.uint8), **beside}


def _columns_out(precision: str, dtype: torch.dtype) -> dict[str, Tensor]:
    columns = torch.zeros(ROOM, dtype=dtype)
    if precision == "int8":
        weight = torch.zeros(HIDDEN, ROOM, dtype=torch.int8)
        return {"weight": weight, "scale": torch.zeros(HIDDEN, dtype=dtype), "input_scale": columns}
    weight = torch.zeros(2, ROOM, 32, dtype=torch.uint8)  # 96 outputs in strips of 64
    return {"weight": weight, "groups": torch.zeros(4, ROOM, 2, dtype=torch.uint8), "input_scale": columns}


def _gather(
    precision: str, full: Tensors, chosen: Tensor, out: Tensors, stored_in: Format = FLOATS, *, parts: int = 1
) -> None:
    """No parts: of a down projection."""
    source = stored_in.stored(is_down=not parts)
    get(precision).gather(full, source, chosen, out, is_down=not parts, parts=parts or 1)


def _stored(weight: Tensor, precision: str, *, is_down: bool) -> dict[str, Tensor]:
    """The whole matrix quantised, as a conversion does."""
    return get(precision).quantize(weight, weight.dtype, is_down=is_down)


@precisions
@dtypes
@pytest.mark.parametrize("parts", [1, 2])
def test_rows(precision: str, dtype: torch.dtype, parts: int):
    for kept in KEPT:
        _check_rows(precision, dtype, kept, parts)


def _check_rows(precision: str, dtype: torch.dtype, kept: int, parts: int) -> None:
    weight, chosen = _random(parts * NEURONS, HIDDEN, dtype=dtype), _chosen(kept)
    stored = _stored(weight, precision, is_down=False) | {"bias": _random(parts * NEURONS, dtype=dtype)}
    out = _rows_out(precision, parts, dtype)
    _gather(precision, stored, chosen, out, get(precision), parts=parts)
    index = torch.cat([chosen + part * NEURONS for part in range(parts)])
    place = torch.cat([torch.arange(kept) + part * ROOM for part in range(parts)])
    expected = _rows_out(precision, parts, dtype)
    expected["bias"][place] = stored["bias"][index]
    for name in stored.keys() - {"bias"}:
        expected[name][place] = stored[name][index]
    _equal(out, expected)
    on_the_way = _rows_out(precision, parts, dtype)
    _gather(precision, {"weight": weight, "bias": stored["bias"]}, chosen, on_the_way, parts=parts)
    _equal(on_the_way, expected)


@precisions
@dtypes
@pytest.mark.parametrize("turned", [False, True])
def test_columns(precision: str, dtype: torch.dtype, turned: bool):
    """Also of a matrix that is stored the other way around (GPT-2)."""
    for kept in KEPT:
        _check_columns(precision, dtype, kept, turned)


def _check_columns(precision: str, dtype: torch.dtype, kept: int, turned: bool) -> None:
    weight, chosen = _random(HIDDEN, NEURONS, dtype=dtype), _chosen(kept)
    weight = weight.t().contiguous().t() if turned else weight
    stored, out = _stored(weight, precision, is_down=True), _columns_out(precision, dtype)
    _gather(precision, stored, chosen, out, get(precision), parts=0)
    expected = _columns_out(precision, dtype)
    expected["input_scale"][:kept] = stored["input_scale"][chosen]
    if precision == "int8":
        expected["weight"][:, :kept], expected["scale"] = stored["weight"][:, chosen], stored["scale"]
    else:
        codes, groups = ref.rows_as_strips(stored["weight"][chosen], stored["groups"][chosen])
        expected["weight"][:, :kept], expected["groups"][:, :kept] = codes, groups
    _equal(out, expected)
    on_the_way = _columns_out(precision, dtype)
    _gather(precision, {"weight": weight}, chosen, on_the_way, parts=0)
    _equal(on_the_way, expected)


@precisions
def test_a_second_prompt_leaves_nothing_of_the_first(precision: str):
    """The same tensors are filled again for every prompt, with as many neurons."""
    rows, columns = _random(NEURONS, HIDDEN, dtype=torch.float32), _random(HIDDEN, NEURONS, dtype=torch.float32)
    bias = _random(NEURONS, dtype=torch.float32)
    found = []
    for prompts in ([0], [7, 0]):
        out = _rows_out(precision, 1, torch.float32), _columns_out(precision, torch.float32)
        for seed in prompts:
            chosen = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(seed))[:70].sort().values
            _gather(precision, {"weight": rows, "bias": bias}, chosen, out[0])
            _gather(precision, {"weight": columns}, chosen, out[1], parts=0)
        found.append(out)
    for once, twice in zip(*found, strict=True):
        _equal(twice, once)


def _equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_columns_are_shared_by_threads(rows: int, threads: int):
    columns, generator = 50, torch.Generator().manual_seed(rows)
    matrix = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
    chosen = torch.randperm(columns, generator=generator)[: (columns + 1) // 2].sort().values
    out = torch.zeros(rows, chosen.numel(), dtype=torch.int8)
    with mock.patch.object(gather, "SHARED_BYTES", 0), limited_threads(threads):
        take(matrix, 1, chosen, out)
    assert torch.equal(out, matrix.index_select(1, chosen))


@dtypes
def test_a_down_projection_in_rows(dtype: torch.dtype):
    """Its neurons are those of its numbers, rounded anew, also in fewer bits than it has."""
    int4, neurons = get("int4"), 224  # whole groups
    stored = int4.quantize(_random(HIDDEN, neurons, dtype=dtype), dtype, is_down=False)
    numbers = ref.grouped_matrix(stored)
    every = torch.arange(neurons)
    floats = int4.chosen_floats(stored, every, dtype, is_down=True)
    torch.testing.assert_close(floats, numbers.to(dtype), rtol=max(torch.finfo(dtype).eps, 1e-6), atol=0)
    norms = int4.column_norms(stored)
    torch.testing.assert_close(norms / norms[0], (numbers.norm(dim=0) / numbers[:, 0].norm()).float())
    for kept, name, parts in product((0, 1, 70, neurons), ("int4", "int3"), (None, torch.rand(3, neurons) + 0.1)):
        chosen = torch.randperm(neurons)[:kept].sort().values
        format, beside = get(name), {"is_down": True, "importance": parts}
        specs = format.resident(is_down=True).specs(HIDDEN, 256, is_down=True)
        found, expected = ({n: torch.zeros(s, dtype=own or dtype) for n, (s, own) in specs.items()} for _ in range(2))
        format.gather(stored, int4.stored(is_down=False), chosen, found, **beside)
        format.gather({"weight": floats}, FLOATS.stored(is_down=True), chosen, expected, **beside)
        _equal(found, expected)
