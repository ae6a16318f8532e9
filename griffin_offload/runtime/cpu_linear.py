"""16-bit linear layers on CPUs without 16-bit instructions.

There torch emulates the 16-bit GEMM at a third of the float32 rate, and at a hundredth for a few rows. Instead, a
block of the weight is translated into a float32 scratch that stays in the cache, and multiplied there; a single
row (decoding one token) goes through `torch.mv`. Sums are in float32 and rounded once, as in the emulation, so
results differ by the order of summation alone. Figures: benchmarks/NOTES.md.
"""

import torch
from torch import Tensor, nn

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


def translate_linears(model: nn.Module, scratch_bytes: int) -> None:
    """Give every plain Linear of `model` a forward that multiplies in float32, block by block, sharing one scratch."""
    scratch = torch.empty(scratch_bytes // torch.float32.itemsize)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__dict__["forward"] = _Translated(module, scratch)


class _Translated:
    """The forward of one Linear; reads the weight at each call, because compact ones come and go."""

    def __init__(self, linear: nn.Linear, scratch: Tensor) -> None:
        self._linear, self._scratch = linear, scratch

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self._linear.weight, self._linear.bias
        if weight.numel() == 0 or x.dtype != weight.dtype:
            return nn.functional.linear(x, weight, bias)
        if x.numel() == x.shape[-1]:
            row = torch.mv(weight, x.reshape(-1)) if bias is None else torch.addmv(bias, weight, x.reshape(-1))
            return row.reshape(*x.shape[:-1], -1)
        return self._by_blocks(x, weight, bias)

    def _by_blocks(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        outputs, inputs = weight.shape
        rows = max(self._scratch.numel() // inputs, 1)
        # A row longer than the scratch (the head of a tiny plan) gets a scratch of its own.
        scratch = self._scratch if self._scratch.numel() >= inputs else torch.empty(inputs)
        wide = x.float()
        output = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
        for start in range(0, outputs, rows):
            part = weight[start : start + rows]
            block = scratch[: part.numel()].view(part.shape).copy_(part)
            offset = None if bias is None else bias[start : start + rows].float()
            output[..., start : start + rows] = nn.functional.linear(wide, block, offset)
        return output
