"""What a machine can do at best with a model's own shapes: read its files, copy to the device, multiply."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from griffin_offload.checkpoint.direct_io import DirectReader, Extent
from griffin_offload.devices.base import Device
from griffin_offload.devices.memory import block_buffer, untouched_zeros
from griffin_offload.devices.threads import limited_threads
from griffin_offload.engine.spec import ModelSpec
from griffin_offload.formats import Format, Layout
from griffin_offload.formats.linear import QuantizedLinear
from griffin_offload.kernels import table
from griffin_offload.kernels.by_blocks import Scratch

# How fast this device reads weights when it decodes one token: a short trial per precision, for `plan -v`.


# Larger than caches, made of several matrices; the same bytes in every precision.
_BYTES = 256 * 2**20
# Of toys there would be tens of thousands; so many of them tell what a call costs.
_MATRICES = 256
_SCRATCH_BYTES = 2**20  # for what has no kernel
_BANDWIDTH_REPEATS = 5


def decode_bytes_per_s(
    precision: Format,
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    device: Device,
    threads: int | None = None,
) -> float:
    """Bytes per second of one row times matrices [outputs, inputs] in the resident form, in the best of some trials.
    On the CPU by `threads`, or as many as loading would choose."""
    if threads is None:
        threads = device.choose_threads(inputs, outputs, dtype)
    scratch = Scratch(_SCRATCH_BYTES, dtype, device.torch_device)
    layers: list[QuantizedLinear] = []
    layout = precision.resident(is_down=False)
    made_bytes = 0
    while made_bytes < _BYTES and len(layers) < _MATRICES:
        layer = QuantizedLinear(outputs, inputs, is_down=False, full=layout, resident=layout, scratch=scratch)
        for name, (shape, own) in layout.specs(outputs, inputs, is_down=False).items():
            tensor = untouched_zeros(shape, own or dtype, device.torch_device).fill_(1)
            setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
            made_bytes += tensor.nbytes
        layers.append(layer)
    row = torch.ones(1, inputs, dtype=dtype, device=device.torch_device)
    with torch.no_grad(), limited_threads(threads):
        kernels: list[Callable[[], object]] = [lambda: [layer(row) for layer in layers]]
        if precision.is_plain:
            kernels.append(lambda: [torch.mv(layer.weight, row[0]) for layer in layers])
            kernels += [partial(_all_products, kernel.function, layers, row) for kernel in _of_floats(layout, row)]
        # What else runs on the machine makes a trial slower and none faster.
        return made_bytes / min(_seconds(kernel, device) for kernel in kernels for _ in range(_BANDWIDTH_REPEATS))


def _of_floats(layout: Layout, row: Tensor) -> tuple[table.Kernel, ...]:
    return table.products(layout.name, 1, row, None, True)


def _all_products(multiply: Callable[..., Tensor], layers: list[QuantizedLinear], row: Tensor) -> None:
    for layer in layers:
        multiply(row, layer._parameters, layer.out_features, None)


def _seconds(compute: Callable[[], object], device: Device) -> float:
    start = time.perf_counter()
    compute()
    device.synchronize()
    return time.perf_counter() - start


_READ_BYTES, _PIECE_BYTES, _READERS = 2 * 10**9, 8 * 2**20, 4
_COPY_BYTES = 256 * 2**20
_REPEATS = 5


@dataclass(frozen=True)
class Ceilings:
    """None: not measured, because it does not bind here or cannot be measured."""

    threads: int | None
    read_bytes_per_s: float | None
    """Of the disk, past the page cache."""
    copy_pageable_bytes_per_s: float | None
    copy_pinned_bytes_per_s: float | None
    """From the host to a device with asynchronous copies."""
    gemv_bytes_per_s: float | None
    """Bytes of matrices in the residents' precision, times one row."""
    gemm_flops_per_s: dict[int, float]
    """By tokens."""


def measure_ceilings(model_spec: ModelSpec, precision: Format, prompts: list[int], threads: int | None) -> Ceilings:
    """Before the model is loaded: a few hundred MB are needed for a moment. Threads: as loading would choose them."""
    shape, device, dtype = model_spec.shape, model_spec.hardware, model_spec.dtype
    hidden, neurons = shape.hidden_size, shape.width or shape.hidden_size  # of attention alone, where there is no FF
    if threads is None:
        threads = device.choose_threads(hidden, neurons, dtype)
    with limited_threads(threads), torch.no_grad():
        return Ceilings(
            threads=threads,
            read_bytes_per_s=read_bytes_per_s(list(model_spec.checkpoint.files)),
            copy_pageable_bytes_per_s=host_copy_rate(device, pinned=False),
            copy_pinned_bytes_per_s=host_copy_rate(device, pinned=True),
            gemv_bytes_per_s=decode_bytes_per_s(precision, hidden, neurons, dtype, device, threads),
            gemm_flops_per_s={tokens: _gemm_rate(tokens, hidden, neurons, dtype, device) for tokens in prompts},
        )


def read_bytes_per_s(paths: list[Path]) -> float | None:
    """Of up to 2 GB of the files, read once and past the page cache by several threads; None where that cannot be."""
    with contextlib.ExitStack() as stack:
        files = {str(path): stack.enter_context(path.open("rb")).fileno() for path in paths}
        try:
            for descriptor in files.values():
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            reader = stack.enter_context(contextlib.closing(DirectReader(files)))
        except (OSError, AttributeError):  # systems without these calls
            return None
        sizes = {path: os.fstat(descriptor).st_size for path, descriptor in files.items()}
        every = [
            Extent(path, at, min(_PIECE_BYTES, size - at))
            for path, size in sizes.items()
            for at in range(0, size, _PIECE_BYTES)
        ]
        extents = every[: -(-_READ_BYTES // _PIECE_BYTES)]
        targets = [block_buffer(_PIECE_BYTES) for _ in range(_READERS)]

        def read(worker: int) -> None:
            for extent in extents[worker::_READERS]:
                reader.copy(extent, targets[worker][: extent.nbytes])

        start = time.perf_counter()
        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(read, range(_READERS)))
        return sum(extent.nbytes for extent in extents) / (time.perf_counter() - start)


def host_copy_rate(device: Device, *, pinned: bool) -> float | None:
    """Bytes per second from the host to a device with asynchronous copies; None elsewhere."""
    if not device.asynchronous_copies:
        return None
    host = device.pinned(_COPY_BYTES) if pinned else torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cpu")
    host.fill_(1)
    target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device.torch_device)
    return _COPY_BYTES / _median_s(lambda: target.copy_(host, non_blocking=pinned), device)


def _gemm_rate(tokens: int, hidden: int, neurons: int, dtype: torch.dtype, device: Device) -> float:
    """The fastest of the types that the device has for the computation's."""
    rates = []
    for precision in device.gemm_dtypes(dtype):
        weight = untouched_zeros((neurons, hidden), precision, device.torch_device).fill_(0.01)
        rows = torch.ones(tokens, hidden, dtype=precision, device=device.torch_device)
        seconds = _median_s(_product(rows, weight), device)
        rates.append(2.0 * tokens * hidden * neurons / seconds)
    return max(rates)


def _product(rows: Tensor, weight: Tensor) -> Callable[[], object]:
    return lambda: torch.nn.functional.linear(rows, weight)


def _median_s(work: Callable[[], object], device: Device) -> float:
    taken = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        work()
        device.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])
