"""16-bit linear layers on the CPU, that torch multiplies below the memory's rate, or far below the processor's.

A few rows (decoding a token) go through a kernel of ours. For many rows CPUs without 16-bit instructions emulate the
GEMM at a third of the float32 rate: there, a part of the weight is translated to float32 in the cache and multiplied,
by a kernel of ours or, block by block in a scratch, by torch. Sums are in float32 and rounded once, as in torch's, so
results differ by the order of summation alone. Figures: benchmarks/NOTES.md.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from griffin_offload.formats import FLOATS
from griffin_offload.kernels import table
from griffin_offload.kernels.by_blocks import Scratch
from griffin_offload.kernels.library import HALVES
from griffin_offload.transformers_api import StockModel


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
            module.__dict__["forward"] = _OwnLinear(module, scratch if translated else None)


class _OwnLinear:
    """The forward of one Linear; reads the weight at each call, because compact ones come and go. It does not keep the
    Linear alive, which would be a cycle: weights are freed with their model, not when the collector comes."""

    def __init__(self, linear: nn.Linear, scratch: Scratch | None) -> None:
        self._linear, self._scratch = weakref.ref(linear), scratch
        self._computes = None if scratch is None else scratch.dtype
        self._layout = FLOATS.stored(is_down=False).name

    def __call__(self, x: Tensor) -> Tensor:
        linear = self._linear()
        assert linear is not None, "its own forward runs"
        rows, tensors = x.numel() // max(x.shape[-1], 1), linear._parameters
        for kernel in table.products(self._layout, rows, x, self._computes, True):
            if kernel.takes is None or kernel.takes(x, tensors):
                product: Tensor = kernel.function(x, tensors, linear.out_features, self._scratch)
                return product
        raise AssertionError("torch multiplies what nothing else does")


# Attention of one token on the CPU: our kernel in place of torch's, for models that take theirs from transformers.


ATTENTION_NAME, STOCK_ATTENTION = "griffin_offload_one_token", "sdpa"


def use_own_attention(model: StockModel) -> None:
    """Let our kernel attend for single tokens where a model's attention is torch's, found by transformers' interface;
    others stay as they are."""
    if model.config._attn_implementation != STOCK_ATTENTION or not model._supports_attention_backend:
        return
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, ALL_MASK_ATTENTION_FUNCTIONS[STOCK_ATTENTION])
    model.set_attn_implementation(ATTENTION_NAME)


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward`: query [B, heads, T, D], key and value [B, kv heads, S, D] to [B, T, heads, D]."""
    found: tuple[Tensor, None]
    for kernel in table.candidates("attention", "one_token", query):
        if kernel.takes is None or kernel.takes(module, query, key, value, attention_mask, **kwargs):
            found = kernel.function(module, query, key, value, attention_mask, **kwargs)
            return found
    raise AssertionError("torch attends where nothing else does")


table.add(table.Kernel("attention", "one_token", "sdpa", sdpa_attention_forward, ours=False), last=True)


def attend_to_each(
    module: nn.Module, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], **kwargs: Any
) -> tuple[Tensor, None]:
    """`attention_forward` for every row of query [N, heads, 1, D], over keys and values of its own."""
    for kernel in table.candidates("attention", "each_token", query):
        if kernel.takes is None or kernel.takes(module, query, keys, values, **kwargs):
            found: tuple[Tensor, None] = kernel.function(module, query, keys, values, **kwargs)
            return found
    raise AssertionError("one after the other takes everything")


def _one_after_the_other(
    module: nn.Module, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], **kwargs: Any
) -> tuple[Tensor, None]:
    pairs = enumerate(zip(keys, values, strict=True))
    return torch.cat([attention_forward(module, query[i : i + 1], *pair, None, **kwargs)[0] for i, pair in pairs]), None


table.add(table.Kernel("attention", "each_token", "one after the other", _one_after_the_other, ours=False), last=True)


# Root mean square norms on the CPU: our kernel for a few rows in place of torch's operators, one by one.


def use_own_norms(model: nn.Module) -> None:
    """Let our kernel norm a few rows in every module that is seen to do what it does."""
    for module in model.modules():
        if _is_plain(module) and _agrees(module):
            module.__dict__["forward"] = CpuNorm(module)


def _is_plain(module: nn.Module) -> bool:
    """One weight and an epsilon, by the names that transformers gives them."""
    own = [name for name, _ in module.named_parameters()] == ["weight"] and hasattr(module, "variance_epsilon")
    return own and type(module).__name__.endswith("RMSNorm") and "forward" not in module.__dict__


def _agrees(module: nn.Module) -> bool:
    """Whether both give the same with a weight of any kind (the module's may still be on its way), up to a rounding:
    some norms add 1 to theirs."""
    own = module.weight
    assert isinstance(own, Tensor)
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(own.shape, generator=generator, dtype=torch.float32, device="cpu").mul_(3).to(own.dtype)
        for _ in range(2)
    )
    if own.dim() != 1 or not any(kernel.ours for kernel in table.candidates("rms_norm", "rows", x)):
        return False
    ours = table.call("rms_norm", "rows", x, weight, float(module.variance_epsilon), module)  # type: ignore[arg-type]
    stock = torch.func.functional_call(module, {"weight": weight}, (x,))
    step = torch.finfo(own.dtype).eps
    return stock.dtype == ours.dtype and torch.allclose(ours.float(), stock.float(), rtol=2 * step, atol=0)


class CpuNorm:
    """The forward of one norm, which it does not keep alive: that would be a cycle."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._epsilon = float(module.variance_epsilon)  # type: ignore[arg-type]

    def __call__(self, hidden_states: Tensor) -> Tensor:
        module = self._module()
        assert module is not None, "its own forward runs"
        weight = module.weight
        assert isinstance(weight, Tensor)
        for kernel in table.candidates("rms_norm", "rows", hidden_states):
            if kernel.takes is None or kernel.takes(hidden_states, weight):
                normed: Tensor = kernel.function(hidden_states, weight, self._epsilon, module)
                return normed
        raise AssertionError("a stock norm takes everything")


def _stock_norm(x: Tensor, weight: Tensor, epsilon: float, module: nn.Module) -> Tensor:
    normed: Tensor = type(module).forward(module, x)
    return normed


table.add(table.Kernel("rms_norm", "rows", "the stock module", _stock_norm, ours=False), last=True)
