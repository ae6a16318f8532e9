"""The kernel for GGUF's blocks against the package gguf, to the last bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from griffin_offload.checkpoint import gguf_blocks as _registered  # noqa: F401
from griffin_offload.formats.translated import Codes
from griffin_offload.kernels import gguf_blocks, table
from griffin_offload.kernels.library import library

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(library() is None, reason="another processor, or no compiler")
NUMBERS = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))


def _drawn(kind: str, rows: int, blocks: int, seed: int) -> torch.Tensor:
    """Any bytes: scales that are infinite or no numbers, too."""
    nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    drawn = np.random.default_rng(seed).integers(0, 256, (rows, blocks * nbytes), dtype=np.uint8)
    return torch.from_numpy(drawn)


@pytest.mark.parametrize("kind", gguf_blocks.KINDS)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 4), seed=st.integers(0, 99), dtype=NUMBERS)
def test_numbers_are_those_of_the_package(kind: str, rows: int, blocks: int, seed: int, dtype: torch.dtype):
    drawn = _drawn(kind, rows, blocks, seed)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.quants.dequantize(drawn.numpy(), gguf.GGMLQuantizationType[kind]))
    found = torch.empty(expected.shape, dtype=dtype)
    gguf_blocks.numbers(kind, drawn, found)
    expected = expected.to(dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    there = ~found.isnan()
    assert torch.equal(found[there].view(bits), expected[there].view(bits))


@pytest.mark.parametrize("kind", gguf_blocks.ON_GRIDS)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 4), seed=st.integers(0, 99))
def test_codes_are_those_of_the_package(kind: str, rows: int, blocks: int, seed: int):
    """By the kernel and by the package's own figures; they stand for the package's numbers."""
    drawn = _drawn(kind, rows, blocks, seed)
    found = gguf_blocks.codes(kind, drawn)
    with table.leaving_out(lambda kernel: kernel.ours):
        expected = table.call("dequantize", f"{kind}_codes", drawn)
    assert expected[0].untyped_storage().data_ptr() != drawn.untyped_storage().data_ptr()  # codes are turned in place
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0, equal_nan=True)
    with np.errstate(all="ignore"):
        numbers = gguf.quants.dequantize(drawn.numpy(), gguf.GGMLQuantizationType[kind])
    codes = Codes(*found)
    there = codes.steps.isfinite() & codes.lowest.isfinite()
    size = (codes.lowest.abs() + 15 * codes.steps.abs())[there][:, None]
    missed = (codes.numbers() - torch.from_numpy(numbers)).view(*codes.steps.shape, 32)[there]
    assert (missed.abs() <= 1e-6 * size).all()


def test_what_is_no_whole_blocks_is_refused():
    with pytest.raises(ValueError, match=r"rows of \(2, 17\) bytes are no whole blocks of Q4_0, of 18"):
        gguf_blocks.numbers("Q4_0", torch.zeros(2, 17, dtype=torch.uint8), torch.empty(2, 32))
    with pytest.raises(ValueError, match=r"the numbers, \(2, 33\)"):
        gguf_blocks.numbers("Q4_0", torch.zeros(2, 18, dtype=torch.uint8), torch.empty(2, 33))
