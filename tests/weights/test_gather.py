"""Gathering commutes with quantising: chosen neurons of what is stored are what quantising the chosen ones gives."""

from unittest import mock

import pytest
import quantised_reference as ref
import torch
from torch import Tensor

from griffin_offload.kernels import gathering
from griffin_offload.runtime.threads import limited_threads
from griffin_offload.weights import gather
from griffin_offload.weights.gather import gather_inputs, gather_outputs
from griffin_offload.weights.quantize import (
    int4_scale,
    int8_scale,
    neuron_scale,
    quantize_int4_neurons,
    quantize_int4_rows,
    quantize_int8,
)

HIDDEN, NEURONS, ROOM = 96, 200, 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KEPT = (0, 1, 70, NEURONS)

precisions = pytest.mark.parametrize("precision", ["int8", "int4"])
dtypes = pytest.mark.parametrize("dtype", DTYPES)
kept_neurons = pytest.mark.parametrize("kept", KEPT)


@pytest.fixture(autouse=True, params=[(128, True), (gather.CHUNK, True), (128, False), (gather.CHUNK, False)])
def _ways(request: pytest.FixtureRequest):
    """Several chunks, the last one incomplete, and one; by our kernels, where there are any, and without them."""
    chunk, ours = request.param
    with mock.patch.object(gather, "CHUNK", chunk):
        if ours:
            yield
            return
        with mock.patch.object(gathering, "library", return_value=None):
            yield


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return (weight * torch.linspace(0.1, 3, shape[-1])).to(dtype)


def _chosen(kept: int) -> Tensor:
    return torch.randperm(NEURONS, generator=torch.Generator().manual_seed(kept))[:kept].sort().values


def _rows_out(precision: str, parts: int, dtype: torch.dtype) -> dict[str, Tensor]:
    bias = torch.zeros(parts * ROOM, dtype=dtype)
    if precision == "int8":
        weight = torch.zeros(parts * ROOM, HIDDEN, dtype=torch.int8)
        return {"weight": weight, "scale": torch.zeros(parts * ROOM, dtype=dtype), "bias": bias}
    weight = torch.zeros(parts * ROOM, HIDDEN // 2, dtype=torch.uint8)
    return {"weight": weight, "scale": torch.zeros(HIDDEN // 32, parts * ROOM, 2, dtype=dtype), "bias": bias}


def _columns_out(precision: str, dtype: torch.dtype) -> dict[str, Tensor]:
    columns = torch.zeros(ROOM, dtype=dtype)
    if precision == "int8":
        weight = torch.zeros(HIDDEN, ROOM, dtype=torch.int8)
        return {"weight": weight, "scale": torch.zeros(HIDDEN, dtype=dtype), "input_scale": columns}
    weight = torch.zeros(128, ROOM // 2, dtype=torch.uint8)  # outputs in whole blocks of 64
    return {"weight": weight, "scale": torch.zeros(ROOM // 128, 128, 2, dtype=dtype), "input_scale": columns}


def _stored_rows(weight: Tensor, precision: str) -> dict[str, Tensor]:
    """The whole matrix quantised, as a conversion does."""
    if precision == "int4":
        packed, scale = quantize_int4_rows(weight, weight.dtype)
        return {"weight": packed, "scale": scale}
    levels, scale = torch.empty(weight.shape, dtype=torch.int8), int8_scale(weight, weight.dtype)
    quantize_int8(weight, scale, levels)
    return {"weight": levels, "scale": scale}


def _stored_columns(weight: Tensor, precision: str) -> dict[str, Tensor]:
    columns = neuron_scale(weight, weight.dtype)
    if precision == "int4":
        scale = int4_scale(weight, weight.dtype, columns)
        return {"weight": quantize_int4_neurons(weight, columns, scale), "scale": scale, "input_scale": columns}
    levels, scale = torch.empty(weight.shape, dtype=torch.int8), int8_scale(weight, weight.dtype, columns)
    quantize_int8(weight, scale, levels, columns)
    return {"weight": levels, "scale": scale, "input_scale": columns}


def _of_torch(levels: Tensor) -> Tensor:
    return torch._convert_weight_to_int4pack_for_cpu(levels.int().contiguous(), 1).view(levels.shape[0], -1)


@precisions
@dtypes
@kept_neurons
@pytest.mark.parametrize("parts", [1, 2])
def test_rows(precision: str, dtype: torch.dtype, kept: int, parts: int):
    weight, chosen = _random(parts * NEURONS, HIDDEN, dtype=dtype), _chosen(kept)
    stored = _stored_rows(weight, precision) | {"bias": _random(parts * NEURONS, dtype=dtype)}
    out = _rows_out(precision, parts, dtype)
    gather_outputs(stored, chosen, parts, out)
    index = torch.cat([chosen + part * NEURONS for part in range(parts)])
    place = torch.cat([torch.arange(kept) + part * ROOM for part in range(parts)])
    expected = _rows_out(precision, parts, dtype)
    expected["bias"][place] = stored["bias"][index]
    if precision == "int8":
        expected["weight"][place], expected["scale"][place] = stored["weight"][index], stored["scale"][index]
    else:
        levels = torch.zeros(parts * ROOM, HIDDEN)
        levels[place] = ref.unpacked(stored["weight"][index]).float()
        expected["weight"] = _of_torch(levels)
        expected["scale"][:, place] = stored["scale"][index].transpose(0, 1)
    _equal(out, expected)
    on_the_way = _rows_out(precision, parts, dtype)
    gather_outputs({"weight": weight, "bias": stored["bias"]}, chosen, parts, on_the_way)
    _equal(on_the_way, expected)


@precisions
@dtypes
@kept_neurons
@pytest.mark.parametrize("turned", [False, True])
def test_columns(precision: str, dtype: torch.dtype, kept: int, turned: bool):
    """Also of a matrix that is stored the other way around (GPT-2)."""
    weight, chosen = _random(HIDDEN, NEURONS, dtype=dtype), _chosen(kept)
    weight = weight.t().contiguous().t() if turned else weight
    stored, out = _stored_columns(weight, precision), _columns_out(precision, dtype)
    gather_inputs(stored, chosen, out)
    expected = _columns_out(precision, dtype)
    expected["input_scale"][:kept] = stored["input_scale"][chosen]
    if precision == "int8":
        expected["weight"][:, :kept], expected["scale"] = stored["weight"][:, chosen], stored["scale"]
    else:
        levels = torch.zeros(128, ROOM)
        levels[:HIDDEN, :kept] = ref.unpacked(stored["weight"][chosen]).t().float()
        expected["weight"] = _of_torch(levels)
        # The kernel's number is (level - 8) * scale + offset, and ours (level - 7.5) * scale.
        expected["scale"][:, :HIDDEN] = torch.stack([stored["scale"], stored["scale"] / 2], dim=-1)
    _equal(out, expected)
    on_the_way = _columns_out(precision, dtype)
    gather_inputs({"weight": weight}, chosen, on_the_way)
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
            gather_outputs({"weight": rows, "bias": bias}, chosen, 1, out[0])
            gather_inputs({"weight": columns}, chosen, out[1])
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
    with mock.patch.object(gather, "_SHARED_BYTES", 0), limited_threads(threads):
        gather.take(matrix, 1, chosen, out)
    assert torch.equal(out, matrix.index_select(1, chosen))
