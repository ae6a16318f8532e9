"""What other libraries make of a matrix: their tensors, checked against each other, as one that is decoded.

Which tensors belong to a matrix says what it is packed as; config.json has the bits and the sizes of groups and blocks.
All sizes are checked here, so that decoding reads nothing that is not there.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from griffin_offload.checkpoint.base import StoredTensor
from griffin_offload.checkpoint.decoding import (
    Blocks4,
    Fp4Rows,
    Grid,
    Numbers,
    PackedAcross,
    PackedColumns,
    PackedGrid,
    PackedRows,
    Rows,
    Scaled,
    Spread,
    SpreadByIndex,
)
from griffin_offload.checkpoint.direct_io import Extent
from griffin_offload.checkpoint.mapped import FileMaps
from griffin_offload.errors import CheckpointError, UnsupportedModel
from griffin_offload.formats.translated import Decode, EachExpert

_F8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_INT32, _U8, _I8 = (torch.int32,), (torch.uint8,), (torch.int8,)
_MX_SCALES = (torch.uint8, torch.float8_e8m0fnu)
_WORD_BITS = 32
_FP4_GROUP, _MX_GROUP = 16, 32
_BLOCKS = "_blocks"
_MOST_STATE_BYTES = 10_000
_NF4_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")


@dataclass(frozen=True)
class Packing:
    """What config.json says of all matrices."""

    bits: int = 8
    row_blocks: tuple[int, ...] = ()
    """How many outputs may share a scale."""
    groups: tuple[int, ...] = ()
    """How many inputs may; more than one where matrices differ."""
    adds_one: bool = True
    """GPTQ's first layout: zero points are stored less one."""


@dataclass(frozen=True)
class Module:
    """The tensors of one matrix, by what follows its name."""

    name: str
    tensors: Mapping[str, StoredTensor]
    maps: FileMaps

    def there(self, suffix: str) -> StoredTensor:
        """The tensor, of any type and shape; CheckpointError for none."""
        if suffix not in self.tensors:
            raise CheckpointError(f"{self.name} lacks its {suffix}: download the checkpoint again")
        return self.tensors[suffix]

    def need(self, suffix: str, types: Sequence[torch.dtype], *shape: int | None) -> StoredTensor:
        """The tensor, of one of these types and this shape, None being any size; CheckpointError otherwise."""
        found = self.there(suffix)
        fits = len(found.shape) == len(shape) and all(
            wanted in (None, size) for wanted, size in zip(shape, found.shape, strict=True)
        )
        if not fits or found.dtype not in types or 0 in found.shape:
            raise self.wrong(suffix, " or ".join(_short(dtype) for dtype in types), shape)
        return found

    def wrong(self, suffix: str, types: str, shape: Sequence[int | None]) -> CheckpointError:
        """The error for a tensor of another kind than expected."""
        found = self.tensors[suffix]
        wanted = "x".join("?" if size is None else str(size) for size in shape) or "a single number"
        return CheckpointError(
            f"{self.name}.{suffix} is {_short(found.dtype)} {list(found.shape)}, it has to be {types} {wanted}"
        )

    def numbers(self, suffix: str) -> Tensor:
        """The few numbers of a tensor that says what others look like: read now."""
        return self.tensors[suffix].tensor(self.maps)


Reader = Callable[[Module, Packing, torch.dtype], StoredTensor]
"""Makes the matrix of a module, in a type. Errors: CheckpointError, UnsupportedModel."""
ExpertReader = Callable[[Module, Packing, torch.dtype], Iterator[tuple[str, StoredTensor]]]
"""The same of the matrices of all experts of a module, by what follows its name."""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _made(shape: tuple[int, int], dtype: torch.dtype, tensors: Sequence[StoredTensor], decode: Decode) -> StoredTensor:
    return StoredTensor(shape, dtype, tuple(tensor.parts[0] for tensor in tensors), decode=decode)


def _block(module: Module, suffix: str, size: int, count: int, candidates: Sequence[int]) -> int:
    """How many of `size` neighbours share one of `count` scales; the last block may be smaller. Never size / count:
    448 rows in blocks of 128 have 4 scales, too."""
    if count in (1, size):
        return size // count
    fitting = {block for block in candidates if -(-size // block) == count}
    if len(fitting) != 1:
        said = ", ".join(map(str, candidates)) or "no size of blocks"
        raise CheckpointError(
            f"{module.name}.{suffix} has {count} numbers for {size} of the matrix: config.json says {said}"
        )
    return fitting.pop()


# One number each, in FP8 or int8, with scales of tensors, rows, groups or blocks.


def read_scaled(module: Module, packing: Packing, dtype: torch.dtype) -> StoredTensor:
    """FP8 and int8 of compressed-tensors, modelopt, fbgemm and DeepSeek's kind."""
    weight = module.need("weight", (*_F8, *_I8), None, None)
    outputs, inputs = weight.shape
    suffix = next((name for name in ("weight_scale_inv", "weight_scale") if name in module.tensors), "weight_scale")
    scales, scale_grid = _grid(module, suffix, 1, (outputs, inputs), packing)
    tensors, zeros = [weight, scales], None
    if "weight_zero_point" in module.tensors:
        points, zeros = _grid(module, "weight_zero_point", 2, (outputs, inputs), packing)
        tensors.append(points)
    spread: list[Rows] = [grid for grid in (scale_grid, zeros) if grid is not None]
    tensors, spread = _by_index(module, tensors, spread, inputs)
    codes = Numbers(0, weight.dtype, inputs)
    return _made((outputs, inputs), dtype, tensors, Scaled(codes, *spread))


def _grid(
    module: Module, suffix: str, part: int, size: tuple[int, int], packing: Packing
) -> tuple[StoredTensor, Spread]:
    """The scales, or zero points, of a matrix of `size`, of which there may be one for all."""
    found = module.there(suffix)
    types = (*_FLOATS, *_F8, *_I8, torch.float8_e8m0fnu)
    rows, columns = (*found.shape, 1, 1)[:2]
    if len(found.shape) > 2 or found.dtype not in types or 0 in found.shape or rows > size[0] or columns > size[1]:
        raise module.wrong(suffix, "floats of at most", size)
    block_rows = _block(module, suffix, size[0], rows, packing.row_blocks)
    group = _block(module, suffix, size[1], columns, packing.groups)
    return found, Spread(Grid(part, found.dtype, columns, block_rows), group, size[1])


def _by_index(
    module: Module, tensors: list[StoredTensor], spread: list[Rows], inputs: int, suffix: str = "weight_g_idx"
) -> tuple[list[StoredTensor], list[Rows]]:
    """Both with the module's order of activation, where it has one."""
    if suffix not in module.tensors:
        return tensors, spread
    index = module.need(suffix, _INT32, inputs)
    found: list[Rows] = []
    for rows in spread:
        assert isinstance(rows, Spread)
        groups = -(-inputs // rows.group)
        found.append(
            rows if groups == 1 else SpreadByIndex(rows.inner, len(tensors), groups, rows, f"{module.name}.{suffix}")
        )
    return [*tensors, index], found


# compressed-tensors' words of codes.


def read_packed(module: Module, packing: Packing, dtype: torch.dtype) -> StoredTensor:
    """compressed-tensors' pack-quantized of 2, 4 and 8 bits, with scales of rows or groups."""
    words = module.need("weight_packed", _INT32, None, None)
    outputs, inputs = _written_shape(module, words)
    bits = _bits_of(module, words.shape[1], inputs)
    scales, grid = _grid(module, "weight_scale", 1, (outputs, inputs), packing)
    tensors, spread, half = [words, scales], [grid], 2 ** (bits - 1)
    if "weight_zero_point" in module.tensors:
        columns = grid.inner.columns if isinstance(grid.inner, Grid) else 1
        packed = module.need("weight_zero_point", _INT32, -(-outputs * bits // _WORD_BITS), columns)
        tensors.append(packed)
        spread.append(Spread(PackedGrid(2, bits, columns, half), grid.group, inputs))
    tensors, rows = _by_index(module, tensors, list(spread), inputs)
    codes = PackedRows(0, bits, words.shape[1], inputs, half)
    return _made((outputs, inputs), dtype, tensors, Scaled(codes, *rows))


def _written_shape(module: Module, words: StoredTensor) -> tuple[int, int]:
    module.need("weight_shape", (torch.int64, torch.int32), 2)
    outputs, inputs = (int(size) for size in module.numbers("weight_shape"))
    most = words.shape[1] * _WORD_BITS
    if outputs != words.shape[0] or not 0 < inputs <= most:
        raise CheckpointError(
            f"{module.name}.weight_shape says {outputs}x{inputs}, its weight_packed is {list(words.shape)}"
        )
    return outputs, inputs


def _bits_of(module: Module, words: int, inputs: int) -> int:
    """Of codes of which so many words hold those of a row."""
    for bits in range(1, 9):
        if -(-inputs * bits // _WORD_BITS) == words:
            if bits not in (2, 4, 8):
                raise UnsupportedModel(
                    f"{module.name} is packed in {bits} bits, which compressed-tensors has laid out in two ways: "
                    "take the original, and --quantize int4"
                )
            return bits
    raise CheckpointError(f"{module.name}.weight_packed has {words} words a row for {inputs} numbers: no bits fit")


# FP4.


def read_fp4(module: Module, packing: Packing, dtype: torch.dtype) -> StoredTensor:
    """NVFP4 of compressed-tensors and modelopt, and compressed-tensors' MXFP4."""
    name = "weight_packed" if "weight_packed" in module.tensors else "weight"
    codes = module.need(name, _U8, None, None)
    outputs, inputs = codes.shape[0], 2 * codes.shape[1]
    if "pre_quant_scale" in module.tensors:
        raise UnsupportedModel(
            f"{module.name} scales its inputs (pre_quant_scale, modelopt's AWQ): take the original, and --quantize int4"
        )
    scales = module.tensors.get("weight_scale")
    if scales is not None and scales.dtype in _MX_SCALES:
        scales = module.need("weight_scale", _MX_SCALES, outputs, -(-inputs // _MX_GROUP))
        grid = Grid(1, torch.float8_e8m0fnu, scales.shape[1])
        spread = Spread(grid, _MX_GROUP, inputs)
        return _made((outputs, inputs), dtype, [codes, scales], Scaled(Fp4Rows(0, inputs), spread))
    scales = module.need("weight_scale", _F8[:1], outputs, -(-inputs // _FP4_GROUP))
    divides = "weight_global_scale" in module.tensors
    whole = module.tensors.get("weight_global_scale" if divides else "weight_scale_2")
    if whole is None or whole.dtype != torch.float32 or math.prod(whole.shape) != 1:
        raise CheckpointError(
            f"{module.name} lacks its weight_global_scale or weight_scale_2, one float32: download the checkpoint again"
        )
    grid = Grid(1, scales.dtype, scales.shape[1], factor=None if divides else 2, divisor=2 if divides else None)
    spread = Spread(grid, _FP4_GROUP, inputs)
    return _made((outputs, inputs), dtype, [codes, scales, whole], Scaled(Fp4Rows(0, inputs), spread))


def read_mxfp4_experts(module: Module, packing: Packing, dtype: torch.dtype) -> Iterator[tuple[str, StoredTensor]]:
    """gpt-oss' experts, by what follows the module's name: of each matrix blocks [E, O, I / 32, 16], two numbers
    a byte, and their scales [E, O, I / 32]; the model has it turned around."""
    for name in (suffix.removesuffix(_BLOCKS) for suffix in module.tensors if suffix.endswith(_BLOCKS)):
        blocks = module.need(f"{name}{_BLOCKS}", _U8, None, None, None, _MX_GROUP // 2)
        scales = module.need(f"{name}_scales", _MX_SCALES, *blocks.shape[:3])
        experts, outputs, groups, _ = blocks.shape
        inputs = groups * _MX_GROUP
        spread = Spread(Grid(1, torch.float8_e8m0fnu, groups), _MX_GROUP, inputs)
        parts = tuple(part for pair in zip(by_row(blocks), by_row(scales), strict=True) for part in pair)
        decode = EachExpert(Scaled(Fp4Rows(0, inputs), spread), 2)
        yield name, StoredTensor((experts, outputs, inputs), dtype, parts, decode=decode, of_experts=True)


def by_row(tensor: StoredTensor) -> list[Extent]:
    """Where each row of the first axis lies."""
    (whole,), count = tensor.parts, tensor.shape[0]
    size = whole.nbytes // count
    return [Extent(whole.path, whole.offset + row * size, size) for row in range(count)]


# GPTQ and AWQ: matrices that lie the other way.


def read_gptq(module: Module, packing: Packing, dtype: torch.dtype) -> StoredTensor:
    """GPTQ of 2, 4 and 8 bits, with or without an order of activation."""
    words = module.need("qweight", _INT32, None, None)
    inputs, outputs = words.shape[0] * _WORD_BITS // packing.bits, words.shape[1]
    scales = module.need("scales", _FLOATS, None, outputs)
    groups, across = scales.shape[0], -(-outputs * packing.bits // _WORD_BITS)
    points = module.need("qzeros", _INT32, groups, across)
    group = _block(module, "scales", inputs, groups, packing.groups)
    zeros = PackedAcross(2, packing.bits, across, plus=int(packing.adds_one))
    spread: list[Rows] = [
        Spread(Grid(1, scales.dtype, groups, transposed=True), group, inputs),
        Spread(zeros, group, inputs),
    ]
    tensors, spread = _by_index(module, [words, scales, points], spread, inputs, "g_idx")
    codes = PackedColumns(0, packing.bits, outputs)
    return _made((outputs, inputs), dtype, tensors, Scaled(codes, *spread))


def read_awq(module: Module, packing: Packing, dtype: torch.dtype) -> StoredTensor:
    """AWQ's layout for products of matrices, 4 bits."""
    words = module.need("qweight", _INT32, None, None)
    inputs, outputs = words.shape[0], words.shape[1] * _WORD_BITS // packing.bits
    scales = module.need("scales", _FLOATS, None, outputs)
    groups = scales.shape[0]
    points = module.need("qzeros", _INT32, groups, words.shape[1])
    group = _block(module, "scales", inputs, groups, packing.groups)
    scale_rows = Spread(Grid(1, scales.dtype, groups, transposed=True), group, inputs)
    zeros = Spread(PackedAcross(2, packing.bits, words.shape[1], interleaved=True), group, inputs)
    codes = PackedAcross(0, packing.bits, words.shape[1], interleaved=True)
    return _made((outputs, inputs), dtype, [words, scales, points], Scaled(codes, scale_rows, zeros))


# bitsandbytes.


def read_bitsandbytes(module: Module, packing: Packing, dtype: torch.dtype) -> StoredTensor:
    """NF4 and FP4 with plain or nested scales, and LLM.int8()."""
    state = next((name for name in _NF4_STATES if name in module.tensors), None)
    return _int8_rows(module, dtype) if state is None else _read_4bit(module, state, dtype)


def _int8_rows(module: Module, dtype: torch.dtype) -> StoredTensor:
    weight = module.need("weight", _I8, None, None)
    scales = module.need("SCB", _FLOATS, weight.shape[0])
    layout = module.tensors.get("weight_format")
    if layout is not None and (
        layout.dtype != torch.uint8 or layout.nbytes != 1 or module.numbers("weight_format").any()
    ):
        raise UnsupportedModel(f"{module.name} lies in tiles for one kind of GPU (weight_format): save it in rows")
    grid = Grid(1, scales.dtype, 1, constant=1 / 127)
    outputs, inputs = weight.shape
    return _made((outputs, inputs), dtype, [weight, scales], Scaled(Numbers(0, weight.dtype, inputs), grid))


def _read_4bit(module: Module, state_name: str, dtype: torch.dtype) -> StoredTensor:
    state = _state(module, state_name)
    (outputs, inputs), block = state["shape"], state["blocksize"]
    codes = module.need("weight", _U8, -(-outputs * inputs // 2), 1)
    table = module.need("weight.quant_map", (torch.float32,), 16)
    blocks = -(-outputs * inputs // block)
    nested = "weight.nested_absmax" in module.tensors
    largest = module.need("weight.absmax", _U8 if nested else (torch.float32,), blocks)
    if not nested:
        return _made((outputs, inputs), dtype, [codes, table, largest], Blocks4(inputs, block))
    outer_block = _positive(module, state_name, state.get("nested_blocksize"))
    outer = module.need("weight.nested_absmax", (torch.float32,), -(-blocks // outer_block))
    outer_table = module.need("weight.nested_quant_map", (torch.float32,), 256)
    offset = state.get("nested_offset")
    if not isinstance(offset, int | float) or isinstance(offset, bool):
        raise CheckpointError(f"{module.name}.{state_name} says nested_offset is {repr(offset)[:40]}, not a number")
    decode = Blocks4(inputs, block, outer_block, float(offset))
    return _made((outputs, inputs), dtype, [codes, table, largest, outer_table, outer], decode)


def _state(module: Module, name: str) -> dict[str, Any]:
    """What the library wrote of a matrix, as JSON in a tensor."""
    stored = module.need(name, _U8, None)
    try:
        if stored.nbytes > _MOST_STATE_BYTES:
            raise ValueError(f"{stored.nbytes} bytes")
        found = json.loads(bytes(module.numbers(name).tolist()))
        shape, block = found["shape"], _positive(module, name, found["blocksize"])
        sizes = [_positive(module, name, size) for size in shape]
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{module.name}.{name} cannot be read: {str(error)[:80]}") from error
    if len(sizes) != 2:
        raise CheckpointError(f"{module.name}.{name} says the matrix is {str(shape)[:60]}, it has to have two sizes")
    return {**found, "shape": tuple(sizes), "blocksize": block}


def _positive(module: Module, name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**40:
        raise CheckpointError(f"{module.name}.{name} has {repr(value)[:40]} where a size above 0 has to be")
    return value


# What an export is packed as: compressed-tensors' pack-quantized, symmetric.

_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
_PIECE_NUMBERS = 2**22


def write_packed(weight: Tensor, bits: int, group: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `read_packed` reads as `weight` [O, I]: words of `bits`-bit codes, and for each `group` of inputs a scale in
    `dtype`, of a few shares of the group's largest the one that errs least."""
    packed = [_packed(rows, bits, group, dtype) for rows in weight.split(max(_PIECE_NUMBERS // weight.shape[1], 1))]
    words, scales = (torch.cat(parts) for parts in zip(*packed, strict=True))
    shape = torch.tensor(weight.shape, dtype=torch.int64, device="cpu")
    return {"weight_packed": words, "weight_scale": scales, "weight_shape": shape}


def _packed(rows: Tensor, bits: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    blocks, zero = rows.float().view(rows.shape[0], -1, group), 1 << (bits - 1)
    largest = blocks.abs().amax(-1, keepdim=True)
    codes, scale, least = torch.zeros_like(blocks), torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for share in _SHARES:
        tried = (largest * (share / (zero - 1))).to(dtype).float()
        found = (blocks / tried.where(tried > 0, 1)).round_().clamp_(-zero, zero - 1)
        error = (found * tried - blocks).square_().sum(-1, keepdim=True)
        better = error < least
        codes, scale, least = (torch.where(better, a, b) for a, b in ((found, codes), (tried, scale), (error, least)))
    shifts = torch.arange(0, 32, bits, dtype=torch.int64, device="cpu")
    words = ((codes + zero).to(torch.int64).view(rows.shape[0], -1, len(shifts)) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32), scale[..., 0].to(dtype)
