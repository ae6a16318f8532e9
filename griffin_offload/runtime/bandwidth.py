"""How fast this device reads weights when it decodes one token: a short trial per precision, for `plan -v`."""

import statistics
import time
from collections.abc import Callable

import torch

from griffin_offload.kernels import few_rows
from griffin_offload.kernels.compiled import HALVES
from griffin_offload.runtime.host_memory import untouched_zeros
from griffin_offload.runtime.threads import choose_threads, limited_threads
from griffin_offload.weights.matmul import Scratch
from griffin_offload.weights.quantized_linear import Precision, QuantizedLinear, resident_form, specs

# Larger than caches, made of several matrices; the same bytes in every precision.
_BYTES = 256 * 2**20
# Of toys there would be tens of thousands; so many of them tell what a call costs.
_MATRICES = 256
_SCRATCH_BYTES = 2**20  # for what has no kernel
_REPEATS = 5


def decode_bytes_per_s(
    precision: Precision,
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    device: torch.device,
    threads: int | None = None,
) -> float:
    """Bytes per second of one row times matrices [outputs, inputs] in the resident form.
    On the CPU by `threads`, or as many as loading would choose."""
    if device.type == "cpu" and threads is None:
        threads = choose_threads(inputs, outputs, dtype)
    scratch = Scratch(_SCRATCH_BYTES, dtype, device)
    layers: list[QuantizedLinear] = []
    made_bytes = 0
    while made_bytes < _BYTES and len(layers) < _MATRICES:
        layer = QuantizedLinear(outputs, inputs, is_down=False, precision=precision, stored="none", scratch=scratch)
        layer.form = resident_form(precision, is_down=False)
        for name, (shape, own) in specs(layer.form, outputs, inputs, is_down=False).items():
            tensor = untouched_zeros(shape, own or dtype, device).fill_(1)
            setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
            made_bytes += tensor.nbytes
        layers.append(layer)
    row = torch.ones(1, inputs, dtype=dtype, device=device)
    with torch.no_grad(), limited_threads(threads):
        kernels: list[Callable[[], object]] = [lambda: [layer(row) for layer in layers]]
        if precision == "none":
            kernels.append(lambda: [torch.mv(layer.weight, row[0]) for layer in layers])
            ours = few_rows.kernels() if device.type == "cpu" and dtype in HALVES else None
            if ours is not None:
                kernels.append(lambda: [ours.multiply_floats(row, layer.weight) for layer in layers])
        taken = [statistics.median(_seconds(kernel, device) for _ in range(_REPEATS)) for kernel in kernels]
    return made_bytes / min(taken)


def _seconds(compute: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    compute()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
