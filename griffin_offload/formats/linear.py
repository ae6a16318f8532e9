"""`QuantizedLinear`: the one module that replaces stock ones, swapped in once at load, for every linear in a layer.

Its tensors come in forms. The full one is what is stored: 16-bit floats where a checkpoint is quantised while it
runs, int8 or int4 rows and neurons where it was converted. The resident one is what decoding multiplies: int8, or
int4 rows and strips. A few rows go through a kernel, which reads each weight once: ours or torch's; many rows (prefill)
are multiplied in 16 bit or more: by ours, or by torch block by block.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from griffin_offload.errors import UnsupportedModel, one_line
from griffin_offload.formats.int4 import GROUP, STRIP, quantize_neurons, quantize_rows, unpack, unpack_strip
from griffin_offload.formats.int8 import int8_scale, neuron_scale, quantize_int8, row_scale
from griffin_offload.kernels import gemm, gemv
from griffin_offload.kernels.library import needs_gradient

# Products with matrices that are not multiplied as they rest: translated block by block into a shared scratch.


class Scratch:
    """One buffer for all blocks of a model, which never compute at the same time."""

    def __init__(self, nbytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self._buffer = torch.empty(nbytes // dtype.itemsize, dtype=dtype, device=device)

    def rows(self, width: int) -> int:
        """Rows of `width` numbers that one block holds, at least one."""
        return max(self._buffer.numel() // width, 1)

    def block(self, *shape: int) -> Tensor:
        """A view of `shape`; a row longer than the scratch (the head of a tiny plan) gets memory of its own."""
        numbers = 1
        for size in shape:
            numbers *= size
        if numbers > self._buffer.numel():
            return torch.empty(shape, dtype=self.dtype, device=self._buffer.device)
        return self._buffer[:numbers].view(shape)


def multiply(x: Tensor, weight: Tensor, scratch: Scratch, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [M, I] times `weight` [O, I], of any type that converts to numbers, and its rows' `scale` [O]."""

    def fill(start: int, end: int) -> Tensor:
        part = weight[start:end]
        return scratch.block(*part.shape).copy_(part).t()

    return _by_outputs(x, weight.shape[0], scratch.rows(weight.shape[1]), scratch.dtype, fill, scale, bias)


def multiply_int4_rows(
    x: Tensor, codes: Tensor, groups: Tensor, scratch: Scratch, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """x [M, I] times int4 rows, codes [O, I / 2], groups [O, I / 32, 2] and `scale` [O]."""
    inputs = 2 * codes.shape[1]

    def fill(start: int, end: int) -> Tensor:
        return unpack(codes[start:end], groups[start:end], scratch.block(end - start, inputs)).t()

    return _by_outputs(x, codes.shape[0], scratch.rows(inputs), scratch.dtype, fill, scale, bias)


def multiply_int4_strips(
    x: Tensor, codes: Tensor, groups: Tensor, scratch: Scratch, outputs: int, bias: Tensor | None
) -> Tensor:
    """x [M, I], which has the neurons' scale in it, times the first `outputs` outputs of int4 strips."""
    inputs, pairs = codes.shape[1], groups.view(-1, 2, *groups.shape[1:])

    def fill(start: int, _: int) -> Tensor:
        return unpack_strip(codes[start // STRIP], pairs[start // STRIP], scratch.block(inputs, STRIP))

    return _by_outputs(x, outputs, STRIP, scratch.dtype, fill, None, bias)


def multiply_int4_neurons(x: Tensor, codes: Tensor, groups: Tensor, scratch: Scratch, bias: Tensor | None) -> Tensor:
    """x [M, I], which has the neurons' scale in it, times int4 neurons, codes [I, O / 2] and groups [I, O / 32, 2]."""
    outputs = 2 * codes.shape[1]
    wide, step = x.to(scratch.dtype), scratch.rows(outputs)
    total = torch.zeros(x.shape[0], outputs, dtype=scratch.dtype, device=x.device)
    for start in range(0, codes.shape[0], step):
        part = slice(start, start + step)
        block = unpack(codes[part], groups[part], scratch.block(codes[part].shape[0], outputs))
        total.addmm_(wide[:, part], block)
    return (total if bias is None else total.add_(bias)).to(x.dtype)


def _by_outputs(
    x: Tensor,
    outputs: int,
    step: int,
    dtype: torch.dtype,
    fill: Callable[[int, int], Tensor],
    scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """`fill(start, end)` gives a block [I, outputs of it], at least those asked for."""
    wide = x.to(dtype)
    result = torch.empty(x.shape[0], outputs, dtype=x.dtype, device=x.device)
    for start in range(0, outputs, step):
        end = min(start + step, outputs)
        product = (wide @ fill(start, end))[:, : end - start]
        if scale is not None:
            product *= scale[start:end]
        if bias is not None:
            product += bias[start:end]
        result[:, start:end] = product
    return result


Precision = Literal["none", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("none", "int8", "int4")
"""From the most to the fewest bits."""
Form = gemm.Form

# Up to so many rows torch's kernels are faster than translating the matrix (benchmarks/NOTES.md).
_KERNEL_ROWS = 4
# With other widths torch's int8 kernel reads past the end of a bfloat16 row and returns garbage (torch 2.13).
_INT8_KERNEL_MULTIPLE = 32
# It loads inputs, and with four of them weights, as if they were aligned, and crashes where they are not: weights in
# a mapped file, rows in the middle of a tensor (torch 2.13).
_INT8_KERNEL_ALIGNMENT = 64

_TENSORS = ("weight", "groups", "scale", "bias", "input_scale")

Spec = tuple[tuple[int, ...], torch.dtype | None]
"""Shape and type of a tensor; None is the precision of the computation."""


def stored_form(precision: Precision, *, is_down: bool) -> Form:
    """The form of a full matrix in a checkpoint of `precision`."""
    if precision == "int4":
        return "int4_neurons" if is_down else "int4_rows"
    return "int8" if precision == "int8" else "float"


def resident_form(precision: Precision, *, is_down: bool) -> Form:
    """The form that decoding multiplies."""
    return "int4_strips" if precision == "int4" and is_down else stored_form(precision, is_down=is_down)


def specs(form: Form, outputs: int, inputs: int, *, is_down: bool) -> dict[str, Spec]:
    """Tensors of a matrix [outputs, inputs] in `form`, without its bias."""
    if form == "float":
        return {"weight": ((outputs, inputs), None)}
    found: dict[str, Spec]
    if form == "int8":
        found = {"weight": ((outputs, inputs), torch.int8), "scale": ((outputs,), None)}
        return found | {"input_scale": ((inputs,), None)} if is_down else found
    if form == "int4_rows":
        return _int4_specs((outputs, inputs // 2), (outputs, inputs // GROUP, 2)) | {"scale": ((outputs,), None)}
    if form == "int4_neurons":
        found = _int4_specs((inputs, outputs // 2), (inputs, outputs // GROUP, 2))
    else:
        strips = -(-outputs // STRIP)
        found = _int4_specs((strips, inputs, STRIP // 2), (strips * STRIP // GROUP, inputs, 2))
    return found | {"input_scale": ((inputs,), None)}


def _int4_specs(codes: tuple[int, ...], groups: tuple[int, ...]) -> dict[str, Spec]:
    return {"weight": (codes, torch.uint8), "groups": (groups, torch.uint8)}


def check_sizes(precision: Precision, outputs: int, inputs: int, where: str, *, is_down: bool) -> None:
    """UnsupportedModel when a matrix of these sizes has no such form."""
    size = outputs if is_down else inputs  # what groups run along
    if precision == "int4" and size % GROUP:
        raise UnsupportedModel(f"{where}: int4 needs rows in groups of {GROUP}, this one has {size} numbers: use int8")


class QuantizedLinear(nn.Module):
    """A linear layer [outputs, inputs]: weight, groups, bias, scale and input_scale, as one of the forms has them."""

    weight: nn.Parameter
    groups: nn.Parameter | None
    bias: nn.Parameter | None
    scale: nn.Parameter | None
    input_scale: nn.Parameter | None

    def __init__(
        self, outputs: int, inputs: int, *, is_down: bool, precision: Precision, stored: Precision, scratch: Scratch
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.is_down = outputs, inputs, is_down
        self.full_form = stored_form(stored, is_down=is_down)
        self.resident_form = resident_form(precision, is_down=is_down)
        self.form = self.full_form
        self.scratch = scratch
        self.importance: Tensor | None = None
        """[I] of the inputs, for int4 rows that are quantised from floats."""
        for name in ("weight", "groups", "bias", "scale", "input_scale"):
            self.register_parameter(name, None)

    def declare_features(self) -> None:
        """Take the sizes from the tensors that were installed."""
        if self.is_down:
            self.in_features = self.weight.shape[0 if self.form == "int4_neurons" else 1]
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

    def _few_kernels(self, x: Tensor) -> gemv.GemvKernels | None:
        """Ours for a few rows, if they are faster than anything else for rows like x."""
        rows = x.shape[0]
        few = self.form in ("int8", "int4_rows", "int4_strips") and rows <= gemv.ROWS
        if not few or not x.is_cpu or x.dtype not in gemv.TYPES or needs_gradient(x):
            return None
        many = self._many_kernels(x) if rows > 1 else None  # decoding does not wait for the answer
        return gemv.kernels() if many is None or rows < many.from_rows(self.form) else None

    def _many_kernels(self, x: Tensor) -> gemm.GemmKernels | None:
        """Ours for many rows, if they can multiply rows like x."""
        own = gemm.kernels(self.scratch.dtype)
        return own if own is not None and own.take(self.form, x, self.weight) else None

    def _by_many(self, own: gemm.GemmKernels, x: Tensor) -> Tensor:
        bias = _typed(self.bias, x.dtype)
        return own.multiply(self.form, x, self.weight, self.scale, bias, self.groups, self.out_features)

    def _by_few(self, own: gemv.GemvKernels, x: Tensor) -> Tensor:
        tensors = self._parameters  # without the search of a module's attribute, six times a product
        weight, groups, scale, bias, input_scale = (tensors[name] for name in _TENSORS)
        beside, inputs = _typed(bias, x.dtype), _typed(input_scale, x.dtype)
        assert weight is not None
        if self.form == "int8":
            assert scale is not None
            return own.multiply_int8(x, weight, scale, beside, inputs)
        assert groups is not None
        if self.form == "int4_rows":
            assert scale is not None
            return own.multiply_int4_rows(x, weight, groups, scale, beside)
        assert inputs is not None
        return own.multiply_int4_strips(x, weight, groups, inputs, beside, self.out_features)

    def _kernel_rows(self, x: Tensor) -> int:
        """Up to how many rows like x a kernel of torch's multiplies faster than a translated matrix would be."""
        wide = self.form != "int8" or x.dtype == torch.float64
        return 0 if wide or not _has_int8_kernel(x, self.weight) else _KERNEL_ROWS

    def _few(self, x: Tensor) -> Tensor:
        assert self.scale is not None
        product = int8_kernel(x.device, x.dtype)(x.contiguous(), self.weight, self.scale)
        return product if self.bias is None else product + self.bias

    def _many(self, x: Tensor) -> Tensor:
        if self.form not in ("float", "int8"):  # a full matrix of floats leaves the resident's groups where they are
            assert self.groups is not None
            return self._many_int4(x, self.groups)
        if self.form == "float" and self.scratch.dtype == self.weight.dtype:
            return nn.functional.linear(x, self.weight, self.bias)
        scale = self.scale if self.form == "int8" else None
        return multiply(x, self.weight, self.scratch, scale, self.bias)

    def _many_int4(self, x: Tensor, groups: Tensor) -> Tensor:
        if self.form == "int4_neurons":
            return multiply_int4_neurons(x, self.weight, groups, self.scratch, self.bias)
        if self.form == "int4_strips":
            return multiply_int4_strips(x, self.weight, groups, self.scratch, self.out_features, self.bias)
        assert self.scale is not None
        return multiply_int4_rows(x, self.weight, groups, self.scratch, self.scale, self.bias)


def _typed(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


@functools.cache
def int8_kernel(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What multiplies a few rows by int8 matrices where few_rows does not: on CUDA ours, if it can be compiled and is
    right, else torch's. The first call on CUDA compiles: it belongs to loading."""
    if device.type == "cuda":
        try:
            from griffin_offload.kernels.triton_gemv import check_kernel, multiply_int8

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
    return full["scale"].float() * math.sqrt(2 * weight.shape[1])  # the root mean square is int4's scale


def column_norms(full: dict[str, Tensor], *, swapped: bool) -> Tensor:
    """Norms float32 [I] of the columns of a full down projection in any stored form, up to a factor common to all."""
    if "input_scale" in full:
        return full["input_scale"].float()  # that is how neuron_scale defines it
    return row_norms(full, swapped=False) if swapped else neuron_scale(full["weight"], torch.float32)


def quantized(
    weight: Tensor, precision: Precision, dtype: torch.dtype, *, is_down: bool, importance: Tensor | None = None
) -> dict[str, Tensor]:
    """The stored tensors of a whole matrix [O, I] of floats; scales are of `dtype`. `importance` [I] of the inputs is
    for int4 rows."""
    if precision == "int4" and is_down:
        input_scale = neuron_scale(weight, dtype)
        codes, groups = quantize_neurons(weight, input_scale)
        return {"weight": codes, "groups": groups, "input_scale": input_scale}
    if precision == "int4":
        scale = row_scale(weight, dtype)
        codes, groups = quantize_rows(weight, scale, importance)
        return {"weight": codes, "groups": groups, "scale": scale}
    beside = {"input_scale": neuron_scale(weight, dtype)} if is_down else {}
    scale = int8_scale(weight, dtype, beside.get("input_scale"))
    numbers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    quantize_int8(weight, scale, numbers, beside.get("input_scale"))
    return {"weight": numbers, "scale": scale, **beside}
