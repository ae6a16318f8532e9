"""`QuantizedLinear`: the one module that replaces stock ones, swapped in once at load, for every linear in a layer.

Its tensors come in forms. The full one is what is stored: 16-bit floats where a checkpoint is quantised while it
runs, int8 or int4 rows and neurons where it was converted. The resident one is what decoding multiplies: int8, or
int4 tiles. A few rows go through a kernel, which reads each weight once: ours or torch's; many rows (prefill) are
multiplied in 16 bit or more: by ours, or by torch block by block.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from griffin_offload.errors import UnsupportedModel, one_line
from griffin_offload.kernels import few_rows, many_rows
from griffin_offload.kernels.compiled import needs_gradient
from griffin_offload.weights.int4_tiles import DOWN_GROUP, OUTPUT_MULTIPLE, cpu_block, multiply_tiles
from griffin_offload.weights.matmul import (
    Scratch,
    multiply,
    multiply_int4_neurons,
    multiply_int4_rows,
    multiply_tiles_by_blocks,
)
from griffin_offload.weights.quantize import (
    GROUP,
    int4_scale,
    int8_scale,
    neuron_scale,
    quantize_int4_neurons,
    quantize_int4_rows,
    quantize_int8,
    unpack_int4,
)

Precision = Literal["none", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("none", "int8", "int4")
"""From the most to the fewest bits."""
Form = many_rows.Form

# Up to so many rows torch's kernels are faster than translating the matrix (benchmarks/NOTES.md).
_KERNEL_ROWS = 4
# With other widths torch's int8 kernel reads past the end of a bfloat16 row and returns garbage (torch 2.13).
_INT8_KERNEL_MULTIPLE = 32
# It loads inputs, and with four of them weights, as if they were aligned, and crashes where they are not: weights in
# a mapped file, rows in the middle of a tensor (torch 2.13).
_INT8_KERNEL_ALIGNMENT = 64

Spec = tuple[tuple[int, ...], torch.dtype | None]
"""Shape and type of a tensor; None is the precision of the computation."""


def stored_form(precision: Precision, *, is_down: bool) -> Form:
    """The form of a full matrix in a checkpoint of `precision`."""
    if precision == "int4":
        return "int4_neurons" if is_down else "int4_rows"
    return "int8" if precision == "int8" else "float"


def resident_form(precision: Precision) -> Form:
    """The form that decoding multiplies."""
    forms: dict[Precision, Form] = {"none": "float", "int8": "int8", "int4": "int4_tiles"}
    return forms[precision]


def specs(form: Form, outputs: int, inputs: int, *, is_down: bool) -> dict[str, Spec]:
    """Tensors of a matrix [outputs, inputs] in `form`, without its bias."""
    if form == "float":
        return {"weight": ((outputs, inputs), None)}
    found: dict[str, Spec]
    if form == "int8":
        found = {"weight": ((outputs, inputs), torch.int8), "scale": ((outputs,), None)}
    elif form == "int4_rows":
        found = {"weight": ((outputs, inputs // 2), torch.uint8), "scale": ((outputs, inputs // GROUP, 2), None)}
    elif form == "int4_neurons":
        found = {"weight": ((inputs, outputs // 2), torch.uint8), "scale": ((outputs,), None)}
    else:
        padded, group = -(-outputs // OUTPUT_MULTIPLE) * OUTPUT_MULTIPLE, DOWN_GROUP if is_down else GROUP
        found = {"weight": ((padded, inputs // 2), torch.uint8), "scale": ((inputs // group, padded, 2), None)}
    if is_down:
        found["input_scale"] = ((inputs,), None)
    return found


def check_sizes(precision: Precision, outputs: int, inputs: int, where: str, *, is_down: bool) -> None:
    """UnsupportedModel when a matrix of these sizes has no such form."""
    size = outputs if is_down else inputs  # what groups run along
    if precision == "int4" and size % GROUP:
        raise UnsupportedModel(f"{where}: int4 needs rows in groups of {GROUP}, this one has {size} numbers: use int8")


class QuantizedLinear(nn.Module):
    """A linear layer [outputs, inputs] whose tensors (weight, bias, scale, input_scale) come in one of the forms."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    scale: nn.Parameter
    input_scale: nn.Parameter | None

    def __init__(
        self, outputs: int, inputs: int, *, is_down: bool, precision: Precision, stored: Precision, scratch: Scratch
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.is_down = outputs, inputs, is_down
        self.full_form = stored_form(stored, is_down=is_down)
        self.resident_form = resident_form(precision)
        self.form = self.full_form
        self.scratch = scratch
        for name in ("weight", "bias", "scale", "input_scale"):
            self.register_parameter(name, None)

    def declare_features(self) -> None:
        """Take the sizes from the tensors that were installed; rows that fill up int4 tiles are no features."""
        if self.is_down:
            neurons_first = self.form == "int4_neurons"
            self.in_features = self.weight.shape[0] if neurons_first else self.weight.shape[1]
            self.in_features *= 2 if self.form == "int4_tiles" else 1
        else:
            self.out_features = self.weight.shape[0]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, form={self.form}"

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs], in the type of x."""
        flat = x.reshape(-1, x.shape[-1])
        few = self._few_kernels(flat)
        if few is not None:
            return self._by_few(few, flat).view(*x.shape[:-1], -1)
        if self.input_scale is not None and self.form != "float":
            flat = flat * self.input_scale
        many = self._many_kernels(flat)
        if many is not None:
            outputs = self._by_many(many, flat)
        else:
            outputs = self._few(flat) if flat.shape[0] <= self._kernel_rows(flat) else self._many(flat)
        return outputs.view(*x.shape[:-1], -1)

    def _few_kernels(self, x: Tensor) -> few_rows.Kernels | None:
        """Ours for a few rows, if they are faster than anything else for rows like x."""
        rows = x.shape[0]
        few = self.form in ("int8", "int4_tiles") and rows <= few_rows.ROWS
        if not few or not x.is_cpu or x.dtype not in few_rows.TYPES or needs_gradient(x):
            return None
        many = self._many_kernels(x) if rows > 1 else None  # decoding does not wait for the answer
        return few_rows.kernels() if many is None or rows < many.from_rows(self.form) else None

    def _many_kernels(self, x: Tensor) -> many_rows.Kernels | None:
        """Ours for many rows, if they can multiply rows like x."""
        own = many_rows.kernels(self.scratch.dtype)
        return own if own is not None and own.take(self.form, x, self.weight) else None

    def _by_many(self, own: many_rows.Kernels, x: Tensor) -> Tensor:
        block = cpu_block() if self.form == "int4_tiles" else 1
        bias = _typed(self.bias, x.dtype)
        return own.multiply(self.form, x, self.weight, self.scale, bias, block, self.out_features)

    def _by_few(self, own: few_rows.Kernels, x: Tensor) -> Tensor:
        tensors = self._parameters  # without the search of a module's attribute, five times a product
        weight, scale, bias, input_scale = (tensors[name] for name in ("weight", "scale", "bias", "input_scale"))
        assert weight is not None
        assert scale is not None
        beside = _typed(bias, x.dtype), _typed(input_scale, x.dtype)
        if self.form == "int8":
            return own.multiply_int8(x, weight, scale, *beside)
        return own.multiply_int4(x, weight, scale, cpu_block(), *beside, self.out_features)

    def _kernel_rows(self, x: Tensor) -> int:
        """Up to how many rows like x a kernel of torch's multiplies faster than a translated matrix would be."""
        if self.form not in ("int8", "int4_tiles") or x.dtype == torch.float64:
            return 0
        return _KERNEL_ROWS if self.form == "int4_tiles" or _has_int8_kernel(x, self.weight) else 0

    def _few(self, x: Tensor) -> Tensor:
        product: Tensor
        if self.form == "int8":
            product = int8_kernel(x.device, x.dtype)(x.contiguous(), self.weight, self.scale)
        else:
            product = multiply_tiles(x.contiguous(), self.weight, self.scale)[:, : self.out_features]
        return product if self.bias is None else product + self.bias

    def _many(self, x: Tensor) -> Tensor:
        if self.form == "int4_rows":
            return multiply_int4_rows(x, self.weight, self.scale, self.scratch, self.bias)
        if self.form == "int4_neurons":
            return multiply_int4_neurons(x, self.weight, self.scale, self.scratch, self.bias)
        if self.form == "int4_tiles":
            if x.device.type != "cpu":
                return self._few(x)
            return multiply_tiles_by_blocks(x, self.weight, self.scale, self.scratch, self.out_features, self.bias)
        if self.form == "float" and self.scratch.dtype == self.weight.dtype:
            return nn.functional.linear(x, self.weight, self.bias)
        scale = self.scale if self.form == "int8" else None
        return multiply(x, self.weight, self.scratch, scale, self.bias)


def _typed(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


@functools.cache
def int8_kernel(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What multiplies a few rows by int8 matrices where few_rows does not: on CUDA ours, if it can be compiled and is
    right, else torch's. The first call on CUDA compiles: it belongs to loading."""
    if device.type == "cuda":
        try:
            from griffin_offload.weights.int8_gemv import check_kernel, multiply_int8

            check_kernel(device, dtype)
            return multiply_int8
        except Exception as error:  # no Triton, no compiler for its launcher, a device it does not know
            warnings.warn(f"int8 is multiplied by torch's slower kernel: {one_line(error)}", stacklevel=2)
    return _torch_int8


def _torch_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    aligned = x if x.data_ptr() % _INT8_KERNEL_ALIGNMENT == 0 else x.clone()
    return torch._weight_int8pack_mm(aligned, weight, scale)


def _has_int8_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's kernel can multiply them, and is worth it. This build may have none: CUDA's came later."""
    device = x.device.type
    if device == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2" and x.dtype != torch.bfloat16:
        return False  # it has vectors for bfloat16 alone: others take four times as long as a translated matrix
    known = weight.data_ptr() % _INT8_KERNEL_ALIGNMENT == 0 and x.shape[1] % _INT8_KERNEL_MULTIPLE == 0
    return known and bool(torch._C._dispatch_has_kernel_for_dispatch_key("aten::_weight_int8pack_mm", device.upper()))


def row_norms(full: dict[str, Tensor], *, swapped: bool) -> Tensor:
    """Norms float32 [O] of the rows of a full matrix in any stored form but that of a down projection."""
    weight = full["weight"]
    if weight.is_floating_point():
        wide = torch.promote_types(weight.dtype, torch.float32)
        norms: Tensor = torch.linalg.vector_norm(weight, dim=0 if swapped else 1, dtype=wide)
        return norms.float()
    if weight.dtype == torch.int8:
        return torch.cat([part.float().norm(dim=1) for part in weight.split(256)]) * full["scale"].float()
    scale, offset = full["scale"].float().unbind(-1)
    rows = []
    for packed, steps, offsets in zip(weight, scale, offset, strict=True):
        row = unpack_int4(
            packed[None], torch.empty(1, 2 * packed.numel(), dtype=torch.float32, device=packed.device)
        ).view(-1, GROUP)
        rows.append(((row - 8) * steps[:, None] + offsets[:, None]).norm())
    return torch.stack(rows)


def column_norms(full: dict[str, Tensor], *, swapped: bool) -> Tensor:
    """Norms float32 [I] of the columns of a full down projection in any stored form, up to a factor common to all."""
    if "input_scale" in full:
        return full["input_scale"].float()  # that is how neuron_scale defines it
    return row_norms(full, swapped=False) if swapped else neuron_scale(full["weight"], torch.float32)


def quantized(weight: Tensor, precision: Precision, dtype: torch.dtype, *, is_down: bool) -> dict[str, Tensor]:
    """The stored tensors of a whole matrix [O, I] of floats; scales are of `dtype`."""
    if precision == "int4" and not is_down:
        packed, scales = quantize_int4_rows(weight, dtype)
        return {"weight": packed, "scale": scales}
    beside = {"input_scale": neuron_scale(weight, dtype)} if is_down else {}
    input_scale = beside.get("input_scale")
    if precision == "int4":
        assert input_scale is not None
        scale = int4_scale(weight, dtype, input_scale)
        return {"weight": quantize_int4_neurons(weight, input_scale, scale), "scale": scale, **beside}
    scale = int8_scale(weight, dtype, input_scale)
    numbers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    quantize_int8(weight, scale, numbers, input_scale)
    return {"weight": numbers, "scale": scale, **beside}
