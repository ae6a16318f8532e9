"""16-bit linear layers on the CPU, that torch multiplies below the memory's rate, or far below the processor's.

A few rows (decoding a token) go through a kernel of ours. For many rows CPUs without 16-bit instructions emulate the
GEMM at a third of the float32 rate: there, a part of the weight is translated to float32 in the cache and multiplied,
by a kernel of ours or, block by block in a scratch, by torch. Sums are in float32 and rounded once, as in torch's, so
results differ by the order of summation alone. Figures: benchmarks/NOTES.md.
"""

import weakref

import torch
from torch import Tensor, nn

from griffin_offload.kernels import few_rows, many_rows
from griffin_offload.kernels.compiled import HALVES, needs_gradient
from griffin_offload.weights.matmul import Scratch, multiply

# Up to so many rows ours are faster than torch's with 16-bit instructions, and than translated matrices without.
_ROWS, _ROWS_EMULATED = 2, 32


def emulates_halves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this is a CPU that has no instructions for `dtype`, a 16-bit one."""
    if device.type != "cpu" or dtype not in HALVES:
        return False
    # Other processors have other ways: only what was measured is replaced.
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    if dtype is torch.float16:
        return not torch.cpu._is_amx_fp16_supported()
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def use_own_linears(model: nn.Module, scratch: Scratch, *, translated: bool) -> None:
    """Give every plain Linear of `model` a forward that multiplies a few rows by our kernel; and, if `translated`, many
    of them in float32, block by block."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__dict__["forward"] = _OwnForward(module, scratch if translated else None)


class _OwnForward:
    """The forward of one Linear; reads the weight at each call, because compact ones come and go. It does not keep the
    Linear alive, which would be a cycle: weights are freed with their model, not when the collector comes."""

    def __init__(self, linear: nn.Linear, scratch: Scratch | None) -> None:
        self._linear, self._scratch = weakref.ref(linear), scratch
        self._kernels = few_rows.kernels()
        self._most = 0 if self._kernels is None else _ROWS if scratch is None else _ROWS_EMULATED

    def __call__(self, x: Tensor) -> Tensor:
        linear = self._linear()
        assert linear is not None, "its own forward runs"
        weight, bias = linear.weight, linear.bias
        own = x.dtype == weight.dtype and x.dtype in HALVES and x.numel() and weight.numel() and not needs_gradient(x)
        rows = x.numel() // x.shape[-1] if own else 0
        if own and rows <= self._most and self._kernels is not None and weight.shape[1] == x.shape[-1]:
            return self._kernels.multiply_floats(x.reshape(rows, -1), weight, bias).view(*x.shape[:-1], -1)
        if own and self._scratch is not None:
            return self._translated(x.reshape(rows, -1), weight, bias, self._scratch).view(*x.shape[:-1], -1)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def _translated(x: Tensor, weight: Tensor, bias: Tensor | None, scratch: Scratch) -> Tensor:
        own = many_rows.kernels(scratch.dtype)
        if own is not None and own.take("float", x, weight):
            return own.multiply("float", x, weight, None, bias)
        return multiply(x, weight, scratch, None, bias)
