"""A file mapped by ourselves holds what the library reads from it."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from griffin_offload.weights.mapped_file import map_file

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.bool)


@given(
    parts=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 7), max_size=3)), min_size=1, max_size=6)
)
def test_every_tensor(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("mapped") / "x.safetensors"
    save_file({f"t{i}": (torch.randn(shape) * 9).to(dtype) for i, (dtype, shape) in enumerate(parts)}, path, {"a": "b"})
    found, expected = map_file(path), load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_a_file_that_was_cut(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file({"t": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="ends at byte"):
        map_file(path)
