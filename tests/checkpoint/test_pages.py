"""Pages under tensors: found, read, dropped, and never a neighbour's."""

import mmap
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from griffin_offload.checkpoint.mapped import FilePages, Span
from griffin_offload.errors import CheckpointChanged

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are found on Linux alone")
PAGE = mmap.PAGESIZE


def _mapped(path: Path, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    save_file(tensors, path)
    file = safe_open(path, "pt")
    return {name: file.get_slice(name)[...] for name in tensors}


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(1, 5000), min_size=2, max_size=6))
def test_spans_are_whole_pages_inside_the_tensors(tmp_path_factory, sizes: list[int]):
    path = tmp_path_factory.mktemp("pages") / "a name with spaces.safetensors"
    tensors = _mapped(path, **{f"t{i}": torch.randn(size) for i, size in enumerate(sizes)})
    chosen = [tensor for name, tensor in tensors.items() if name != "t0"]
    pages = FilePages(chosen, evict=True)
    inside = {page for t in chosen for page in range(-(-t.data_ptr() // PAGE), (t.data_ptr() + t.nbytes) // PAGE)}
    first = tensors["t0"]
    foreign = set(range(first.data_ptr() // PAGE, (first.data_ptr() + first.nbytes - 1) // PAGE + 1))
    covered: set[int] = set()
    for span in pages.spans(chosen):
        assert span.address % PAGE == span.nbytes % PAGE == 0
        assert span.path == str(path)
        covered |= set(range(span.address // PAGE, (span.address + span.nbytes) // PAGE))
    assert inside <= covered
    assert not covered & (foreign - inside)
    pages.close()


def test_reading_and_dropping_change_no_value(tmp_path: Path):
    original = torch.randn(3_000_000)  # two steps of 8 MiB
    tensor = _mapped(tmp_path / "x.safetensors", x=original)["x"]
    pages = FilePages([tensor], evict=True)
    spans = pages.spans([tensor])
    assert sum(len(span.steps()) for span in spans) == 2
    for _ in range(2):
        pages.read(spans)
        assert torch.equal(tensor, original)
        pages.drop(spans)
    pages.close()


def test_steps_tile_a_span():
    span = Span(0, 20 * 2**20 + PAGE, "f", 4 * PAGE)
    steps = span.steps()
    assert [s.address for s in steps] == [0, 8 * 2**20, 16 * 2**20]
    assert sum(s.nbytes for s in steps) == span.nbytes
    assert all(s.offset - s.address == 4 * PAGE for s in steps)


def test_a_file_cut_under_us_is_an_error_and_not_a_crash(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    tensor = _mapped(path, x=torch.randn(1_000_000))["x"]
    pages = FilePages([tensor], evict=False)
    os.truncate(path, 8192)
    with pytest.raises(CheckpointChanged, match="from 4000080 to 8192 bytes"):
        pages.read(pages.spans([tensor]))
    pages.close()


def test_tensors_of_no_file_are_counted_and_left_alone():
    anonymous = torch.randn(100)
    pages = FilePages([anonymous], evict=True)
    assert pages.unmapped_bytes == 400
    assert pages.spans([anonymous]) == []
    pages.close()


def test_no_file_stays_open(tmp_path: Path):
    tensor = _mapped(tmp_path / "x.safetensors", x=torch.randn(9000))["x"]
    before = len(os.listdir("/proc/self/fd"))
    FilePages([tensor], evict=True).close()
    assert len(os.listdir("/proc/self/fd")) == before
