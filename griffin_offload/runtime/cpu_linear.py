"""16-bit linear layers on CPUs without 16-bit instructions.

There torch emulates the 16-bit GEMM at a third of the float32 rate, and at a hundredth for a few rows. Instead, a
block of the weight is translated into a float32 scratch that stays in the cache, and multiplied there; a single
row (decoding one token) goes through `torch.mv`. Sums are in float32 and rounded once, as in the emulation, so
results differ by the order of summation alone. Figures: benchmarks/NOTES.md.
"""

import torch
from torch import Tensor, nn

from griffin_offload.weights.matmul import Scratch, multiply

_HALVES = (torch.bfloat16, torch.float16)


def emulates_halves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this is a CPU that has no instructions for `dtype`, a 16-bit one."""
    if device.type != "cpu" or dtype not in _HALVES:
        return False
    # Other processors have other ways: only what was measured is replaced.
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    if dtype is torch.float16:
        return not torch.cpu._is_amx_fp16_supported()
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def translate_linears(model: nn.Module, scratch: Scratch) -> None:
    """Give every plain Linear of `model` a forward that multiplies in float32, block by block."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__dict__["forward"] = _Translated(module, scratch)


class _Translated:
    """The forward of one Linear; reads the weight at each call, because compact ones come and go."""

    def __init__(self, linear: nn.Linear, scratch: Scratch) -> None:
        self._linear, self._scratch = linear, scratch

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self._linear.weight, self._linear.bias
        if weight.numel() == 0 or x.dtype != weight.dtype:
            return nn.functional.linear(x, weight, bias)
        if x.numel() == x.shape[-1]:
            row = torch.mv(weight, x.reshape(-1)) if bias is None else torch.addmv(bias, weight, x.reshape(-1))
            return row.reshape(*x.shape[:-1], -1)
        return multiply(x.reshape(-1, x.shape[-1]), weight, self._scratch, None, bias).view(*x.shape[:-1], -1)
