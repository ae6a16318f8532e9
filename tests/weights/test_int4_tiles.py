"""The layouts of torch's 4-bit kernels: written from rows and neurons as torch itself packs them."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import quantised_reference as ref
import torch
from griffin_offload.weights.int4_tiles import (
    OUTPUT_MULTIPLE,
    cpu_block,
    multiply_tiles,
    unpack_tiles,
    write_neurons,
    write_rows,
)
from torch import Tensor

from griffin_offload.errors import UnsupportedModel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    GENERATOR.manual_seed(0)


def _levels(rows: int, columns: int) -> Tensor:
    return torch.randint(0, 16, (rows, columns), generator=GENERATOR)


def _scales(rows: int, groups: int, dtype: torch.dtype) -> Tensor:
    scale = 0.5 + torch.rand(rows, groups, generator=GENERATOR)
    return torch.stack([scale, torch.randn(rows, groups, generator=GENERATOR)], dim=-1).to(dtype)


def _of_torch(levels: Tensor) -> Tensor:
    """[O, I] in whole blocks, packed by torch: [O, I / 2]."""
    return torch._convert_weight_to_int4pack_for_cpu(levels.int(), 1).view(levels.shape[0], -1)


def _filled_up(levels: Tensor) -> Tensor:
    return torch.nn.functional.pad(levels, (0, 0, 0, -levels.shape[0] % OUTPUT_MULTIPLE))


@pytest.mark.parametrize("start", [0, 64, 128])
@pytest.mark.parametrize("rows", [1, 31, 64, 65, 128])
@pytest.mark.parametrize("inputs", [32, 96])
def test_rows_become_what_torch_packs(rows: int, inputs: int, start: int):
    levels, scales = _levels(rows, inputs), _scales(rows, inputs // 32, torch.bfloat16)
    end = start + _filled_up(levels).shape[0]
    tiles = torch.full((end + 64, inputs // 2), 0xA5, dtype=torch.uint8)
    tile_scales = torch.full((inputs // 32, end + 64, 2), 7.0, dtype=torch.bfloat16)
    write_rows(ref.packed(levels), scales, tiles, tile_scales, start)
    assert torch.equal(tiles[start:end], _of_torch(_filled_up(levels)))
    assert torch.equal(tile_scales[:, start : start + rows], scales.transpose(0, 1))
    assert not tile_scales[:, start + rows : end].any()
    for rest in (slice(0, start), slice(end, None)):
        assert torch.all(tiles[rest] == 0xA5)
        assert torch.all(tile_scales[:, rest] == 7)


@pytest.mark.parametrize("outputs", [32, 64, 96, 192])
@pytest.mark.parametrize("parts", [(128,), (1, 3, 40), (100, 27)])
def test_neurons_become_what_torch_packs(outputs: int, parts: tuple[int, ...]):
    """Written part by part; neurons that nobody writes stay as they are."""
    levels, kept = _levels(128, outputs), sum(parts)
    padded = -(-outputs // OUTPUT_MULTIPLE) * OUTPUT_MULTIPLE
    tiles = torch.zeros(padded, 64, dtype=torch.uint8)
    start = 0
    for part in parts:
        write_neurons(ref.packed(levels[start : start + part]), tiles, start)
        start += part
    levels[kept:] = 0
    assert torch.equal(tiles, _of_torch(_filled_up(levels.t())))


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_unpacking_inverts(group: int, dtype: torch.dtype):
    levels, scales = _levels(192, 256), _scales(192, 256 // group, torch.float32)
    scale, offset = scales.double().repeat_interleave(group, dim=1).unbind(-1)
    exact = (levels.double() - 8) * scale + offset
    tiles, tile_scales, block = _of_torch(levels), scales.transpose(0, 1).contiguous(), cpu_block()
    for start, end in ((0, 192), (block, 2 * block)):
        out = torch.empty((end - start) // block, 256, block, dtype=dtype)
        found = unpack_tiles(tiles, tile_scales, start, end, out).transpose(1, 2).reshape(end - start, 256)
        error = (found.double() - exact[start:end]).abs()
        assert torch.all(error <= 2 * torch.finfo(dtype).eps * (16 * scale + offset.abs())[start:end] + 1e-6)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_multiplying_equals_float64(group: int, dtype: torch.dtype, rows: int):
    levels, scales = _levels(128, 256), _scales(128, 256 // group, dtype)
    scale, offset = scales.double().repeat_interleave(group, dim=1).unbind(-1)
    x = torch.randn(rows, 256, generator=GENERATOR).to(dtype)
    exact = x.double() @ ((levels.double() - 8) * scale + offset).t()
    found = multiply_tiles(x, _of_torch(levels), scales.transpose(0, 1).contiguous())
    assert found.dtype == dtype
    assert (found.double() - exact).norm() <= torch.finfo(dtype).eps * 8 * exact.norm()


@pytest.fixture
def _asked_anew() -> Iterator[None]:
    cpu_block.cache_clear()
    yield
    cpu_block.cache_clear()


@pytest.mark.usefixtures("_asked_anew")
def test_an_unknown_layout_is_refused(monkeypatch: pytest.MonkeyPatch):
    packing = torch._convert_weight_to_int4pack_for_cpu
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack_for_cpu", lambda levels, k: packing(levels, k) ^ 0xFF)
    with pytest.raises(UnsupportedModel, match=r"4-bit kernel is unknown on this processor.*use int8"):
        cpu_block()


def _with_capability(capability: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


outermost = pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="runs inside itself")


@outermost
def test_avx2():
    """torch's layout depends on the processor: the tests of this file again, with what a smaller one has."""
    found = _with_capability("avx2", "-m", "pytest", "-p", "no:cacheprovider", "--tb=line", __file__)
    assert found.returncode == 0, found.stdout


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="another processor")
def test_the_block_is_the_width_of_two_vectors():
    assert cpu_block() == {"AVX2": 32, "AVX512": 64}[torch.backends.cpu.get_cpu_capability()]


@outermost
def test_a_processor_without_vectors_is_refused():
    """There torch pairs neighbouring outputs in a byte."""
    found = _with_capability("default", "-c", "from griffin_offload.weights.int4_tiles import cpu_block; cpu_block()")
    assert "UnsupportedModel: torch's 4-bit kernel is unknown on this processor" in found.stderr
