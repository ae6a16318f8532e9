"""Neurons gathered into the resident form of a quantised matrix: taken where they are quantised already, else
quantised on the way, with the scales of the full matrix.

A projection's tensors are given by name: weight, groups, bias, scale, input_scale. The resident ones are allocated with
zeros and hold at least as many neurons as are chosen; what fills them up to whole blocks stays zero.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from griffin_offload.formats.int4 import gather_neurons, quantize_neurons, quantize_rows
from griffin_offload.formats.int8 import int8_scale, neuron_scale, quantize_int8, row_scale
from griffin_offload.kernels.gather import gather_columns

Tensors = dict[str, Tensor]
# Neurons that are on their way at once: a multiple of every block, and small enough for a cache.
CHUNK = 1024
# One thread is done with less than that before a second one has begun.
_SHARED_BYTES = 2**20


def take(source: Tensor, axis: int, index: Tensor, out: Tensor) -> None:
    """`source.index_select(axis, index)` of a matrix or a vector into `out`."""
    if axis == 0 or source.device.type != "cpu":
        torch.index_select(source, axis, index, out=out)
        return
    if gather_columns(source, index, out):
        return
    # Other processors and numbers: numpy's take is 4x torch's index_select (benchmarks/NOTES.md), and one thread's
    # work, so each of torch's takes a share of the rows. It knows no bfloat16: bits are moved as integers. Mode "wrap"
    # because "raise" would buffer the whole output.
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[source.element_size()]
    columns, target, chosen = source.view(bits).numpy(), out.view(bits).numpy(), index.numpy()

    def take_rows(rows: slice) -> None:
        np.take(columns[rows], chosen, axis=1, out=target[rows], mode="wrap")

    threads = torch.get_num_threads() if out.nbytes >= _SHARED_BYTES else 1
    step = -(-source.shape[0] // threads)
    if not out.is_contiguous():
        step = min(step, CHUNK)  # a buffer is copied to such rows
    parts = [slice(start, start + step) for start in range(0, source.shape[0], step)]
    if len(parts) == 1:
        take_rows(parts[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(take_rows, parts))


def gather_outputs(full: Tensors, chosen: Tensor, parts: int, out: Tensors, importance: Tensor | None = None) -> None:
    """Rows `chosen` (sorted indices [K]) of each of the `parts` stacked matrices (gate and up) of `full`; what is
    quantised to int4 on the way counts errors by the `importance` [I] of their input."""
    neurons, padded = (tensors["weight"].shape[0] // parts for tensors in (full, out))
    for part in range(parts):
        index, base = chosen + part * neurons, part * padded
        if "bias" in out:
            out["bias"][base : base + index.numel()] = full["bias"][index]
        for start in range(0, index.numel(), CHUNK):
            _gather_rows(full, index[start : start + CHUNK], base + start, out, importance)


def _gather_rows(full: Tensors, index: Tensor, start: int, out: Tensors, importance: Tensor | None) -> None:
    target = slice(start, start + index.numel())
    if not full["weight"].is_floating_point():
        for name in ("weight", "groups"):
            if name in full:
                take(full[name], 0, index, out[name][target])
        out["scale"][target] = full["scale"][index]
        return
    rows = full["weight"].index_select(0, index)
    if out["weight"].dtype == torch.int8:
        out["scale"][target] = scale = int8_scale(rows, out["scale"].dtype)
        quantize_int8(rows, scale, out["weight"][target])
    else:
        out["scale"][target] = scale = row_scale(rows, out["scale"].dtype)
        counts = None if importance is None else importance.to(rows.device)
        out["weight"][target], out["groups"][target] = quantize_rows(rows, scale, counts)


def gather_inputs(full: Tensors, chosen: Tensor, out: Tensors) -> None:
    """Columns `chosen` of a down projection."""
    if "groups" in out:
        _gather_int4_columns(full, chosen, out)
        return
    weight, dtype = full["weight"], out["scale"].dtype
    if weight.is_floating_point():
        input_scale = neuron_scale(weight, dtype)
        scale = int8_scale(weight, dtype, input_scale)
    else:
        input_scale, scale = full["input_scale"].to(dtype), full["scale"].to(dtype)
    kept = input_scale[chosen]
    out["input_scale"][: chosen.numel()] = kept
    out["scale"].copy_(scale)
    _gather_int8_columns(weight, chosen, kept, scale, out["weight"])


def _gather_int8_columns(weight: Tensor, chosen: Tensor, kept: Tensor, scale: Tensor, out: Tensor) -> None:
    target = out[:, : chosen.numel()]
    if not weight.is_floating_point():
        take(weight, 1, chosen, target)
        return
    room = weight.new_empty(min(CHUNK, weight.shape[0]), chosen.numel())  # one for all: new memory is slow
    for start in range(0, weight.shape[0], CHUNK):
        rows = weight[start : start + CHUNK]
        columns = room[: rows.shape[0]]
        take(rows, 1, chosen, columns)
        quantize_int8(columns, scale[start : start + CHUNK], target[start : start + CHUNK], kept)


def _gather_int4_columns(full: Tensors, chosen: Tensor, out: Tensors) -> None:
    weight, strips = full["weight"], (out["weight"], out["groups"])
    stored = not weight.is_floating_point()
    room = weight.new_empty(weight.shape[0], 0 if stored else min(CHUNK, chosen.numel()))
    for start in range(0, chosen.numel(), CHUNK):
        index = chosen[start : start + CHUNK]
        target = out["input_scale"][start : start + index.numel()]
        if stored:
            target.copy_(full["input_scale"][index])
            gather_neurons((weight, full["groups"]), index, strips, start)
            continue
        columns = room[:, : index.numel()]
        take(weight, 1, index, columns)
        target.copy_(neuron_scale(columns, target.dtype))
        everything = torch.arange(index.numel(), dtype=torch.int64, device=weight.device)
        gather_neurons(quantize_neurons(columns, target), everything, strips, start)
