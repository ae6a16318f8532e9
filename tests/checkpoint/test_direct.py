"""Direct reads: any extent of any file, into blocks or to any address, equals the file."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from griffin_offload.checkpoint import direct_io as direct_module
from griffin_offload.checkpoint.direct_io import DirectReader, Extent, SlotLayout, cached_bytes
from griffin_offload.devices.memory import block_buffer, untouched_zeros
from griffin_offload.devices.registry import CpuDevice
from griffin_offload.errors import GriffinError
from griffin_offload.offload import weight_store as source_module
from griffin_offload.offload.layer_stream import LayerStream, StreamConfig
from griffin_offload.offload.weight_store import DIRECT_SLACK_BYTES, FlatLayout, MmapStore, slot_bytes

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="O_DIRECT is Linux's")
SIZE = 5_000_003
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("direct") / "a file"
    content = torch.randint(0, 256, (SIZE,), dtype=torch.uint8).numpy().tobytes()
    path.write_bytes(content)
    return path, content


@pytest.fixture
def reader(file: tuple[Path, bytes]):
    with file[0].open("rb") as opened:
        try:
            found = DirectReader({str(file[0]): opened.fileno()})
        except OSError:
            pytest.skip("this file system has no direct reads")
        yield found
        found.close()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(begin=st.integers(0, SIZE - 1), data=st.data(), cold=st.booleans())
def test_any_extent_is_copied(file, reader: DirectReader, begin: int, data: st.DataObject, cold: bool):
    path, content = file
    nbytes = data.draw(st.integers(1, SIZE - begin))
    if cold:
        with path.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    target = torch.zeros(nbytes + 2, dtype=torch.uint8)
    reader.copy(Extent(str(path), begin, nbytes), target[1:-1])
    assert target.numpy().tobytes() == b"\0" + content[begin : begin + nbytes] + b"\0"


def test_what_is_cached_is_taken_from_there_and_nothing_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The kernel marks pages that it has read ahead, and goes on at them: a whole file came in by one such page."""
    path, content = tmp_path / "large", os.urandom(64 * 2**20)
    with path.open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for at in range(0, 2**20, 2**16):
            os.pread(file.fileno(), 2**16, at)  # and what the kernel reads behind it
        before = cached_bytes(file.fileno(), 0, 2**40)
        if not 2**20 <= before < len(content) // 2:
            pytest.skip("the kernel has another read-ahead here, or cannot say what is cached")
        taken = []
        copy = direct_module.CachedPages.copy
        monkeypatch.setattr(direct_module.CachedPages, "copy", lambda *a: (taken.append(a[2].numel()), copy(*a)))
        monkeypatch.setattr(direct_module, "PIECE_BYTES", 2**17)
        try:
            reader = DirectReader({str(path): file.fileno()})
        except OSError:
            pytest.skip("this file system has no direct reads")
        target = torch.zeros(len(content), dtype=torch.uint8)
        reader.copy(Extent(str(path), 0, len(content)), target)
        reader.close()
        assert target.numpy().tobytes() == content
        assert sum(taken) > 0
        assert cached_bytes(file.fileno(), 0, 2**40) <= before


@pytest.fixture
def layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, list[torch.Tensor]]:
    """Tensors of two layers in two mapped files; even small ones are read directly."""
    monkeypatch.setattr(source_module, "MIN_DIRECT_BYTES", 1)
    found = {}
    for layer in range(2):
        path = tmp_path / f"{layer}.safetensors"
        scales = {"scale": torch.randn(77), "odd": torch.randint(-9, 9, (13,), dtype=torch.int8)}
        save_file({"weight": torch.randn(700, 300), **scales}, path)
        with safe_open(path, "pt") as opened:
            found[layer] = [opened.get_tensor(name) for name in ("odd", "weight", "scale")]
    return found


def test_a_stream_reads_layers_into_slots_that_are_used_again(layers):
    source = MmapStore(layers, evict=True)
    if not source.placements:
        pytest.skip("this file system has no direct reads")
    with LayerStream(source, [0, 1], StreamConfig(CpuDevice.current(), torch.float32, 1)) as stream:
        addresses = []
        for layer, tensors in layers.items():
            tensors = [tensor.clone() for tensor in tensors]
            found = stream.acquire(layer)
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, tensors, strict=True))
            addresses.append(found[1].data_ptr() // 4096)
            stream.release()
    assert addresses[0] == addresses[1]
    assert source.fetched_bytes == sum(tensor.nbytes for tensors in layers.values() for tensor in tensors)
    assert stream.peak_in_flight_bytes == max(placement.nbytes for placement in source.placements.values())
    flat = FlatLayout(layers[0], torch.float32).nbytes
    assert stream.peak_in_flight_bytes <= slot_bytes(flat) == flat + DIRECT_SLACK_BYTES
    source.close()


def test_models_that_fit_the_page_cache_stay_in_it(layers):
    source = MmapStore(layers, evict=False)
    assert source.placements == {}
    source.close()


def test_a_file_that_was_cut_is_an_error(file, reader: DirectReader):
    path, content = file
    placement = SlotLayout([torch.zeros(5000, dtype=torch.uint8)], [Extent(str(path), 4_000_000, 5000)])
    buffer = block_buffer(placement.nbytes)
    assert reader.read(placement, buffer)[0].numpy().tobytes() == content[4_000_000:4_005_000]
    os.truncate(path, 4_001_000)
    try:
        with pytest.raises(GriffinError, match="cannot be read any more"):
            reader.read(placement, buffer)
    finally:
        path.write_bytes(content)


def test_a_file_that_is_cut_while_it_is_copied_from_the_cache_is_an_error(
    file, reader: DirectReader, monkeypatch: pytest.MonkeyPatch
):
    path, content = file

    def cut(*_: int) -> int:
        os.truncate(path, 4096)
        return 2**40

    monkeypatch.setattr(direct_module, "cached_bytes", cut)
    try:
        with pytest.raises(GriffinError, match="cannot be read any more"):
            reader.copy(Extent(str(path), 0, 9000), torch.zeros(9000, dtype=torch.uint8))
    finally:
        path.write_bytes(content)


def test_zeros_and_buffers():
    zeros = untouched_zeros((3, 1_000_000), torch.float32, CPU)
    assert zeros.shape == (3, 1_000_000)
    assert not zeros.any()
    assert block_buffer(5000).data_ptr() % 4096 == 0
    assert untouched_zeros((0, 5), torch.int8, CPU).shape == (0, 5)


def test_no_descriptor_stays(file, tmp_path: Path):
    with file[0].open("rb") as opened:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(FileNotFoundError):
            DirectReader({str(file[0]): opened.fileno(), f"{file[0]} that is absent": opened.fileno()})
        (tmp_path / "empty").touch()
        with (tmp_path / "empty").open("rb") as empty, pytest.raises(OSError, match="empty"):
            DirectReader({str(file[0]): opened.fileno(), str(tmp_path / "empty"): empty.fileno()})
        assert len(os.listdir("/proc/self/fd")) == before
