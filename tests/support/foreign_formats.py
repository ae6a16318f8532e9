"""Matrices as other libraries pack them, with what they stand for: by the library itself where it runs on a CPU
(compressed-tensors, bitsandbytes), otherwise written here from its published layout, number by number in float64.

A packer takes a float32 matrix [O, I] and gives its tensors, by what follows the module's name, and the matrix that
they stand for, float32. Independent of the package.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Packed = tuple[dict[str, Tensor], Tensor]
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Foreign:
    """One format: what config.json says, and its packer."""

    said: dict[str, Any]
    pack: Callable[[Tensor], Packed]
    warns: bool = False
    """Whether its makers quantise activations, too, which is told."""


def _blocks(weight: Tensor, rows: int, columns: int) -> list[list[tuple[slice, slice]]]:
    return [
        [(slice(r, r + rows), slice(c, c + columns)) for c in range(0, weight.shape[1], columns)]
        for r in range(0, weight.shape[0], rows)
    ]


def fp8_blocks(weight: Tensor, rows: int = 48, columns: int = 20, scale_dtype: torch.dtype = torch.float32) -> Packed:
    """DeepSeek's kind; block by block, the last ones being smaller."""
    grid = _blocks(weight, rows, columns)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    full = torch.empty(weight.shape, dtype=torch.float64)
    scales = torch.empty(len(grid), len(grid[0]), dtype=torch.float32)
    for r, line in enumerate(grid):
        for c, place in enumerate(line):
            scale = (weight[place].abs().max().clamp(min=1e-6) / 448).to(scale_dtype).float()
            codes[place] = (weight[place] / scale).to(torch.float8_e4m3fn)
            full[place] = codes[place].double() * scale.double()
            scales[r, c] = scale
    return {"weight": codes, "weight_scale_inv": scales.to(scale_dtype)}, full.float()


def fp8_whole(weight: Tensor, suffix: str = "weight_scale", shape: tuple[int, ...] = (), **more: Tensor) -> Packed:
    """One scale for all, and what activations would need."""
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, suffix: scale.reshape(shape), **more}, (codes.double() * scale.double()).float()


def gptq(
    weight: Tensor, bits: int, group: int, *, symmetric: bool, shuffled: bool, plus: int = 1, zero: int | None = None
) -> Packed:
    """AutoGPTQ's and GPTQModel's: words along the inputs, zero points along the outputs."""
    outputs, inputs = weight.shape
    groups, most, per_word = -(-inputs // group), 2**bits - 1, 32 // bits
    index = torch.arange(inputs) // group
    if shuffled:
        index = index[torch.randperm(inputs, generator=torch.Generator().manual_seed(1))]
    scales = torch.empty(groups, outputs, dtype=torch.float16)
    zeros = torch.empty(groups, outputs, dtype=torch.int64)
    full = torch.empty(outputs, inputs, dtype=torch.float64)
    codes = torch.empty(inputs, outputs, dtype=torch.int64)
    for g in range(groups):
        block = weight[:, index == g].double()
        low, high = block.min(1).values.clamp(max=0), block.max(1).values.clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scales[g] = ((high - low) / most).half()
        step = scales[g].double()
        zeros[g] = 2 ** (bits - 1) if symmetric else (-low / step).round().clamp(0, most).long()
        found = (block / step[:, None] + zeros[g][:, None]).round().clamp(0, most)
        codes[index == g] = found.long().t()
        full[:, index == g] = (found - zeros[g][:, None]) * step[:, None]
    words = torch.zeros(inputs // per_word, outputs, dtype=torch.int64)
    for k in range(inputs):
        words[k // per_word] |= codes[k] << (bits * (k % per_word))
    points = torch.zeros(groups, -(-outputs // per_word), dtype=torch.int64)
    for o in range(outputs):
        points[:, o // per_word] |= ((zeros[:, o] - plus) & most) << (bits * (o % per_word))
    tensors = {"qweight": _int32(words), "qzeros": _int32(points), "scales": scales, "g_idx": index.int()}
    return tensors, full.float()


def awq(weight: Tensor, group: int = 16) -> Packed:
    """AutoAWQ's layout for products of matrices: outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight from the lowest bits on."""
    outputs, inputs = weight.shape
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    _, full = gptq(weight, 4, group, symmetric=False, shuffled=False)
    tensors, _ = gptq(weight, 4, group, symmetric=False, shuffled=False)
    scales, groups = tensors["scales"], tensors["scales"].shape[0]
    zeros = torch.empty(groups, outputs, dtype=torch.int64)
    for g in range(groups):  # the zero points again, as GPTQ's packing hides them
        block = weight[:, g * group : (g + 1) * group].double()
        zeros[g] = (-block.min(1).values.clamp(max=0) / scales[g].double()).round().clamp(0, 15).long()
    step = scales.double().repeat_interleave(group, 0)[:inputs]
    codes = (full.double().t() / step).round().long() + zeros.repeat_interleave(group, 0)[:inputs]
    words, points = (torch.zeros(n, outputs // 8, dtype=torch.int64) for n in (inputs, groups))
    for column in range(outputs // 8):
        for place, output in enumerate(order):
            words[:, column] |= codes[:, column * 8 + output] << (4 * place)
            points[:, column] |= zeros[:, column * 8 + output] << (4 * place)
    return {"qweight": _int32(words), "qzeros": _int32(points), "scales": scales}, full.float()


def _int32(words: Tensor) -> Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def fp4_of_modelopt(weight: Tensor) -> Packed:
    """NVFP4: E2M1 in groups of 16 with an FP8 scale, and one float32 that multiplies all."""
    whole = (weight.abs().max() / (6 * 448)).float().reshape(())
    outputs, inputs = weight.shape
    blocks = weight.view(outputs, inputs // 16, 16).double()
    scales = (blocks.abs().amax(-1) / 6 / whole).clamp(min=2**-9).to(torch.float8_e4m3fn)
    step = (scales.double() * whole.double())[..., None]
    table = torch.tensor([*_FP4, *(-number for number in _FP4)], dtype=torch.float64)
    codes = ((blocks / step)[..., None] - table).abs().argmin(-1)
    full = (table[codes] * step).view(outputs, inputs)
    codes = codes.view(outputs, inputs // 2, 2)
    packed = (codes[..., 0] | codes[..., 1] << 4).to(torch.uint8)
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": whole}, full.float()


# By the libraries themselves.


def compressed(weight: Tensor, kind: str, actorder: bool = False, **args: Any) -> Packed:
    """compressed-tensors' own `compress` and `decompress`; `args` are those of its weights."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format=kind)
    outputs, inputs = weight.shape
    state = {"weight": weight}
    if args.get("strategy") == "block":
        rows, columns = args["block_structure"]
        low, high = (
            torch.stack(
                [
                    torch.stack([getattr(weight[place], way)() for place in line])
                    for line in _blocks(weight, rows, columns)
                ]
            )
            for way in ("min", "max")
        )
    elif args.get("strategy") == "tensor":
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    else:
        grouped = weight.view(outputs, -1, args.get("group_size") or inputs)
        low, high = grouped.amin(-1), grouped.amax(-1)
    if kind == "nvfp4-pack-quantized":
        state["weight_global_scale"] = (448 * 6 / weight.abs().max()).float().reshape(1)
        state["weight_scale"], _ = calculate_qparams(low, high, arguments, global_scale=state["weight_global_scale"])
    else:
        state["weight_scale"], zeros = calculate_qparams(low, high, arguments)
        if not args.get("symmetric", True):
            state["weight_zero_point"] = zeros
    compressor = BaseCompressor.get_value_from_registry(kind)
    made = compressor.compress(state, scheme)
    if kind == "nvfp4-pack-quantized":  # `decompress` computes in bfloat16: its two steps in float32
        codes = unpack_fp4_from_uint8(made["weight_packed"], *weight.shape, dtype=torch.float32)
        whole = made["weight_global_scale"]
        full = dequantize(codes, made["weight_scale"].float(), None, arguments, torch.float32, whole)
    else:
        full = compressor.decompress(dict(made), scheme)["weight"].float().contiguous()
    return {name: tensor.contiguous() for name, tensor in made.items()}, full


def bitsandbytes(weight: Tensor, kind: str = "nf4", nested: bool = False, block: int = 32) -> Packed:
    """The library's own, on the CPU. Its CPU kernel is wrong where a row is shorter than a block (0.50)."""
    functional = pytest.importorskip("bitsandbytes.functional")
    if kind == "int8":
        scales = weight.abs().amax(1)
        codes = (weight * (127 / scales[:, None])).round().to(torch.int8)
        full = codes.double() * scales.double()[:, None] / 127
        return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}, full.float()
    codes, state = functional.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=kind)
    more = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return {"weight": codes, **more}, functional.dequantize_4bit(codes, state).float()


def _groups(kind: str, **args: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": args, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _compressed(kind: str, **args: Any) -> Foreign:
    return Foreign(_groups(kind, **args), lambda weight: compressed(weight, kind, **args))


def _gptq_format(said: dict[str, Any], **options: Any) -> Foreign:
    base = {"quant_method": "gptq", "bits": options["bits"], "group_size": options["group"], "desc_act": False}
    return Foreign(base | said, lambda weight: gptq(weight, **options))


_GPTQ = {"bits": 4, "group": 16}
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_INT = {"type": "int", "symmetric": True}
FORMATS: dict[str, Foreign] = {
    "fp8 blocks": Foreign(_FP8 | {"weight_block_size": [48, 20]}, fp8_blocks, warns=True),
    "fp8 blocks, scales of powers": Foreign(
        _FP8 | {"weight_block_size": [48, 20]},
        lambda weight: fp8_blocks(weight, scale_dtype=torch.float8_e8m0fnu),
        warns=True,
    ),
    "fp8": Foreign(
        _FP8 | {"activation_scheme": "static", "weight_block_size": None},
        lambda weight: fp8_whole(weight, "weight_scale_inv", activation_scale=torch.tensor(1.0)),
        warns=True,
    ),
    "fp8 of modelopt": Foreign(
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
        lambda weight: fp8_whole(weight, input_scale=torch.tensor(1.0)),
        warns=True,
    ),
    "nvfp4 of modelopt": Foreign({"quant_method": "modelopt", "quant_algo": "NVFP4"}, fp4_of_modelopt, warns=True),
    "compressed fp8 rows": _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "compressed fp8": _compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "compressed fp8 blocks": _compressed(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[48, 20]
    ),
    "compressed int8 rows": _compressed("int-quantized", num_bits=8, strategy="channel", **_INT),
    "compressed int8 asymmetric": _compressed(
        "int-quantized", num_bits=8, strategy="channel", type="int", symmetric=False
    ),
    "compressed 4 bit": _compressed("pack-quantized", num_bits=4, strategy="group", group_size=16, **_INT),
    "compressed 4 bit asymmetric": _compressed(
        "pack-quantized", num_bits=4, strategy="group", group_size=16, type="int", symmetric=False
    ),
    "compressed 8 bit": _compressed("pack-quantized", num_bits=8, strategy="channel", **_INT),
    "compressed nvfp4": _compressed(
        "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True
    ),
    "compressed mxfp4": _compressed(
        "mxfp4-pack-quantized",
        num_bits=4,
        type="float",
        strategy="group",
        group_size=32,
        symmetric=True,
        scale_dtype="torch.uint8",
        zp_dtype="torch.uint8",
    ),
    "gptq": _gptq_format({"sym": True}, **_GPTQ, symmetric=True, shuffled=False),
    "gptq asymmetric, in order of activation": _gptq_format(
        {"sym": False, "desc_act": True}, **_GPTQ, symmetric=False, shuffled=True
    ),
    "gptq v2": _gptq_format({"checkpoint_format": "gptq_v2"}, **_GPTQ, symmetric=False, shuffled=False, plus=0),
    "gptq 8 bit": _gptq_format({}, bits=8, group=32, symmetric=False, shuffled=False),
    "awq": Foreign({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}, awq),
    "nf4": Foreign({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, bitsandbytes),
    "nf4 nested": Foreign(
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, lambda weight: bitsandbytes(weight, nested=True)
    ),
    "fp4 of bitsandbytes": Foreign(
        {"quant_method": "bitsandbytes", "load_in_4bit": True}, lambda weight: bitsandbytes(weight, "fp4")
    ),
    "int8 of bitsandbytes": Foreign(
        {"quant_method": "bitsandbytes", "load_in_8bit": True}, lambda weight: bitsandbytes(weight, "int8")
    ),
}


def write_foreign(source: Path, directory: Path, foreign: Foreign, left_out: str = "layers.1.mlp.down_proj") -> Path:
    """A checkpoint with the linear layers of `source` packed, and beside it, as the returned path says, the same model
    in floats. The matrix named `left_out` is not packed."""
    plain = directory.with_name(f"{directory.name} in floats")
    for one in (directory, plain):
        shutil.copytree(source, one)
    for file in source.glob("*.safetensors"):
        packed, full = {}, {}
        for name, tensor in load_file(file).items():
            module = name.removesuffix(".weight")
            if tensor.dim() == 2 and name.endswith("_proj.weight") and not module.endswith(left_out):
                tensors, full[name] = foreign.pack(tensor)
                packed |= {f"{module}.{suffix}": one.clone() for suffix, one in tensors.items()}
            else:
                packed[name] = full[name] = tensor
        save_file(packed, directory / file.name)
        save_file(full, plain / file.name)
    for index in directory.glob("*.index.json"):
        index.unlink()
    config = json.loads((directory / "config.json").read_text())
    said = config | {"quantization_config": foreign.said}
    (directory / "config.json").write_text(json.dumps(said))
    return plain
