"""The 4-bit layouts that torch's decode kernels read, and ours, written from gathered neurons.

On the CPU the kernel takes blocks of 64 outputs (32 with AVX2); inside a block, for each input, a byte holds output
i (low) and output i + half a block (high). So the rows layout is turned around, and the neurons layout, whose 32
outputs already lie side by side, moves in whole chunks. On CUDA the aten op tiles it for the tensor cores.
Rate: benchmarks/NOTES.md.
"""

import functools

import torch
from torch import Tensor

from griffin_offload.errors import UnsupportedModel
from griffin_offload.kernels import gathering
from griffin_offload.weights.quantize import GROUP, Int4, unpack_int4

_HALF = GROUP // 2
OUTPUT_MULTIPLE = 64
# Kept neurons come in multiples of this: one group of the down projection's kernel.
DOWN_GROUP = 128


@functools.cache
def cpu_block() -> int:
    """Outputs in one block of the CPU's kernel, found by packing a small matrix; UnsupportedModel if it is neither."""
    for block in (64, 32):
        # No two outputs and no two inputs are alike: another order of either would be seen.
        levels = (torch.arange(block * GROUP, dtype=torch.int32, device="cpu") * 40503 >> 8).view(block, GROUP) % 16
        packed = torch._convert_weight_to_int4pack_for_cpu(levels, 1).view(GROUP, block // 2)
        low, high = levels.to(torch.uint8).t().split(block // 2, dim=1)
        if torch.equal(packed, low | (high << 4)):
            return block
    raise UnsupportedModel("torch's 4-bit kernel is unknown on this processor (AVX2 or AVX-512 needed): use int8")


def gather_rows(rows: Int4, chosen: Tensor, tiles: Int4, start: int) -> None:
    """`write_rows` of rows `chosen` [K]."""
    packed, scales = rows
    on_host = packed.device.type == "cpu"
    if on_host and gathering.gather_rows_to_tiles(rows, chosen, tiles, start, OUTPUT_MULTIPLE, cpu_block()):
        return
    write_rows(packed.index_select(0, chosen), scales.index_select(0, chosen).to(tiles[1].dtype), *tiles, start)


def gather_neurons(packed: Tensor, chosen: Tensor, tiles: Tensor, start: int) -> None:
    """`write_neurons` of neurons `chosen` [K]."""
    if not gathering.gather_neurons_to_tiles(packed, chosen, tiles, start, cpu_block()):
        write_neurons(packed.index_select(0, chosen), tiles, start)


def write_rows(packed: Tensor, scales: Tensor, tiles: Tensor, tile_scales: Tensor, start: int) -> None:
    """Rows [R, I / 2] with scales [R, I / 32, 2] become outputs start.. of `tiles` [O, I / 2], [I / 32, O, 2].

    `start` is a multiple of the block; rows that fill up the last block are zero.
    """
    rows = packed.shape[0]
    end = start + -(-rows // OUTPUT_MULTIPLE) * OUTPUT_MULTIPLE
    tile_scales[:, start : start + rows].copy_(scales.transpose(0, 1))
    if end > start + rows:
        tile_scales[:, start + rows : end].zero_()
        packed = torch.nn.functional.pad(packed, (0, 0, 0, end - start - rows))
    if tiles.device.type != "cpu":
        _write_cuda(unpack_int4(packed, packed.new_empty(packed.shape[0], packed.shape[1] * 2)), tiles, start, end)
        return
    half = cpu_block() // 2
    # [blocks, G, 2, 16, half]: inputs in order (group, half of the group, position), then outputs.
    target = tiles[start:end].view(-1, tile_scales.shape[0], 2, _HALF, half)
    low, high = packed.view(-1, 2, half, tile_scales.shape[0], _HALF).unbind(1)
    target[:, :, 0] = ((low & 15) | (high << 4)).permute(0, 2, 3, 1)
    target[:, :, 1] = ((low >> 4) | (high & 0xF0)).permute(0, 2, 3, 1)


def write_neurons(packed: Tensor, tiles: Tensor, start: int) -> None:
    """Neurons [R, O / 2] become inputs start.. of `tiles` [O', K / 2], O' being O filled up to a whole block."""
    outputs, kept = tiles.shape[0], 2 * tiles.shape[1]
    if 2 * packed.shape[1] < outputs:
        packed = torch.nn.functional.pad(packed, (0, outputs // 2 - packed.shape[1]))
    rows = packed.shape[0]
    if cpu_block() == GROUP:
        target = tiles.view(-1, kept, _HALF)[:, start : start + rows]
        target.copy_(packed.view(rows, -1, _HALF).transpose(0, 1))
        return
    target = tiles.view(-1, kept, 2, _HALF)[:, start : start + rows]
    low, high = packed.view(rows, -1, 2, _HALF).unbind(2)
    target[:, :, 0] = ((low & 15) | (high << 4)).transpose(0, 1)
    target[:, :, 1] = ((low >> 4) | (high & 0xF0)).transpose(0, 1)


def write_neurons_cuda(packed: Tensor, tiles: Tensor) -> None:
    """All K neurons [K, O / 2] at once: the tiles cannot be written in part along the inputs."""
    levels = unpack_int4(packed, packed.new_empty(packed.shape[0], packed.shape[1] * 2)).t()
    rows = torch.nn.functional.pad(levels, (0, 0, 0, tiles.shape[0] - levels.shape[0]))
    _write_cuda(rows.contiguous(), tiles, 0, tiles.shape[0])


def unpack_tiles(tiles: Tensor, scales: Tensor, start: int, end: int, out: Tensor) -> Tensor:
    """Outputs start..end (whole blocks) as floats [blocks, I, block] in `out`; CPU layout."""
    block = cpu_block()
    inputs, groups = 2 * tiles.shape[1], scales.shape[0]
    pairs = tiles[start:end].view(-1, inputs, block // 2)
    low, high = out.view(-1, inputs, 2, block // 2).unbind(2)
    low.copy_(pairs & 15)
    high.copy_(pairs >> 4)
    part = scales[:, start:end].view(groups, -1, 1, block, 2).transpose(0, 1).to(out.dtype)
    scale, offset = part.unbind(-1)  # [blocks, G, 1, block]
    out.view(-1, groups, inputs // groups, block).mul_(scale).add_(offset - 8 * scale)
    return out


def multiply_tiles(x: Tensor, tiles: Tensor, scales: Tensor) -> Tensor:
    """x [M, I] times the transposed matrix: [M, O], by torch's kernel; any number of rows."""
    group = 2 * tiles.shape[1] // scales.shape[0]
    if x.device.type == "cpu":
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, tiles, group, scales)
        return product
    shape = _cuda_shape(tiles)
    # The kernel knows bfloat16 alone; scales in another precision are translated for every product.
    packed, steps = tiles.view(torch.int32).view(shape), scales.bfloat16()
    wide = torch.ops.aten._weight_int4pack_mm(x.bfloat16(), packed, group, steps)
    narrowed: Tensor = wide.to(x.dtype)
    return narrowed


def _cuda_shape(tiles: Tensor) -> tuple[int, int, int, int]:
    inputs = 2 * tiles.shape[1]
    inner = next(inner for inner in (8, 4, 2) if inputs % (inner * 16) == 0)
    return tiles.shape[0] // 8, inputs // (inner * 16), 32, inner // 2


def _write_cuda(levels: Tensor, tiles: Tensor, start: int, end: int) -> None:
    target = tiles[start:end]
    shape = _cuda_shape(target)
    pairs = (levels[:, ::2] << 4) | levels[:, 1::2]
    tiled = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), shape[3] * 2)
    target.view(torch.int32).view(shape).copy_(tiled)
