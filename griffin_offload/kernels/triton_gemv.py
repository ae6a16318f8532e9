"""A few rows times an int8 matrix on CUDA, as a Triton kernel.

torch's own (`_weight_int8pack_mm`, torch 2.13) gives each output to one thread, so that neighbouring threads read a
row apart from each other; here neighbouring threads read neighbouring bytes. Imported on CUDA alone: torch's builds
for it bring Triton, others need not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_OUTPUTS, _BLOCK_INPUTS = 4, 1024


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    x, weight, scale, out, outputs, inputs, block_outputs: tl.constexpr, block_inputs: tl.constexpr
):
    """One program: some outputs of one row."""
    row = tl.program_id(1)
    which = tl.program_id(0) * block_outputs + tl.arange(0, block_outputs)
    there = which < outputs
    starts = which.to(tl.int64) * inputs
    total = tl.zeros((block_outputs, block_inputs), dtype=tl.float32)
    for start in range(0, inputs, block_inputs):
        at = start + tl.arange(0, block_inputs)
        inside = at < inputs
        numbers = tl.load(x + row * inputs + at, mask=inside, other=0.0).to(tl.float32)
        block = tl.load(weight + starts[:, None] + at[None, :], mask=there[:, None] & inside[None, :], other=0)
        total += block.to(tl.float32) * numbers[None, :]
    product = tl.sum(total, axis=1) * tl.load(scale + which, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * outputs + which, product.to(out.dtype.element_ty), mask=there)


def multiply_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [M, I] times int8 `weight` [O, I] and its rows' `scale` [O]: [M, O] in the type of x, summed in float32. All
    three are contiguous. For a few rows: each reads the matrix."""
    outputs, inputs = weight.shape
    product = x.new_empty(x.shape[0], outputs)
    programs = (triton.cdiv(outputs, _BLOCK_OUTPUTS), x.shape[0])
    _kernel[programs](
        x, weight, scale, product, outputs, inputs, block_outputs=_BLOCK_OUTPUTS, block_inputs=_BLOCK_INPUTS
    )
    return product


def check_kernel(device: torch.device, dtype: torch.dtype) -> None:
    """Compile it and compare it with a product of floats; RuntimeError, or what Triton raises, if it is of no use."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (64, 1024 + 64), generator=generator, dtype=torch.int8, device="cpu").to(device)
    x = torch.randn(2, weight.shape[1], generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)
    scale = (torch.rand(64, generator=generator, dtype=torch.float32, device="cpu") + 0.5).to(device, dtype)
    expected = x.double() @ weight.double().t() * scale.double()
    found = multiply_int8(x, weight, scale).double()
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= torch.finfo(dtype).eps:
        raise RuntimeError(f"wrong by {error:.2g} of the largest output")
