"""A file mapped by ourselves holds what the library reads from it."""

import gc
import json
import math
import os
import sys
from pathlib import Path

import psutil
import pytest
import torch
import transformers.modeling_utils
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from griffin_offload import GriffinModel
from griffin_offload.checkpoint.safetensors import DTYPES as TYPES
from griffin_offload.checkpoint.safetensors import map_file, read_header
from griffin_offload.errors import CheckpointError

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems promise memory in other ways")
DTYPES = tuple(TYPES.values())


@given(
    parts=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 7), max_size=3)), min_size=1, max_size=6)
)
def test_every_tensor(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("mapped") / "x.safetensors"
    save_file({f"t{i}": made(dtype, shape) for i, (dtype, shape) in enumerate(parts)}, path, {"a": "b"})
    found, expected = map_file(path), load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def made(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    """Of bytes that any type can have."""
    return torch.randint(2, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8).view(dtype).view(shape)


def test_a_file_that_was_cut(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_file({"t": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="ends at byte"):
        map_file(path)


@LINUX
def test_a_file_larger_than_all_memory(tmp_path: Path):
    """With holes, so it takes no disk: the kernel refuses to map so much as if it could be written to."""
    path = tmp_path / "x.safetensors"
    nbytes = (psutil.virtual_memory().total + psutil.swap_memory().total) // 2**20 * 2**20 + 2**30
    header = json.dumps({"t": {"dtype": "F16", "shape": [nbytes // 2], "data_offsets": [0, nbytes]}}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + nbytes)
    assert read_header(path) == {"t": ("F16", nbytes)}
    found = map_file(path)["t"]
    assert found.shape == (nbytes // 2,)
    assert found[-1] == 0


@LINUX
def test_a_file_is_mapped_as_long_as_a_tensor_lives_and_no_descriptor_kept(tmp_path: Path):
    path, before = tmp_path / "x.safetensors", os.listdir("/proc/self/fd")
    save_file({"a": torch.ones(3), "b": torch.zeros(5)}, path)
    found = map_file(path)
    [name, tensor] = found.popitem()
    del found
    assert Path("/proc/self/maps").read_text().count(f"{path}\n") == 1
    assert os.listdir("/proc/self/fd") == before
    assert tensor.sum() == (3 if name == "a" else 0)
    del tensor
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_transformers_opens_no_weights(checkpoints, monkeypatch: pytest.MonkeyPatch):
    """It would touch every tensor, and the kernel read megabytes around each."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("opened by transformers")

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", refuse)
    with GriffinModel.from_pretrained(checkpoints("llama2"), device="cpu") as model:
        assert model.generate(torch.arange(1, 9)[None], max_new_tokens=2, do_sample=False).shape == (1, 10)


def test_what_initialises_a_loaded_weight_leaves_it_alone(tmp_path: Path):
    """Youtu's kind sets the padding row to zero through a view, which the mapping would answer with SIGSEGV."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64, "pad_token_id": 5}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
    heads |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    config = transformers.YoutuConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)  # of which the first token is no end
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = 7
    model.save_pretrained(tmp_path)
    with GriffinModel.from_pretrained(tmp_path, device="cpu", max_gpu_mem="10MB", ctx_size=16) as ours:
        assert torch.equal(ours.model.model.embed_tokens.weight, model.model.embed_tokens.weight)
        assert ours.generate(torch.arange(6, 12)[None], max_new_tokens=2, do_sample=False).shape == (1, 8)
