"""GGUF headers that a stranger wrote: a named error, or the model, in bounded time and memory; nothing else."""

import math
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.gguf_files import write_gguf
from support.tiny_models import ARCHITECTURES, FURTHER, HYBRIDS, MIXTURES

from griffin_offload import GriffinModel
from griffin_offload.checkpoint.gguf_blocks import block_types
from griffin_offload.checkpoint.gguf_file import read_gguf
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.errors import CheckpointError, GriffinError, UnsupportedModel

SAMPLE = 75 * int(os.environ.get("GRIFFIN_ROBUSTNESS", "1"))
HUGE = [0, 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
PIECES = st.sampled_from([struct.pack("<Q", number) for number in HUGE]) | st.binary(min_size=1, max_size=8)


@pytest.fixture(scope="module", params=["llama3", "gemma4", "qwen3_5"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a plain architecture, of one whose layers differ, and of one whose heads are in another order."""
    path = tmp_path_factory.mktemp("whole") / "tiny.gguf"
    more = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "a"],
        "tokenizer.ggml.scores": [0.0, 1.0],
    }
    return write_gguf((ARCHITECTURES | FURTHER | HYBRIDS)[request.param].build(), path, "Q8_0", more=more)


@settings(max_examples=SAMPLE, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(changes=[(1061, b"\n")], share=None)  # within a tensor's name, which an error then quotes
@given(
    changes=st.lists(st.tuples(st.integers(4, 4096), PIECES), min_size=1, max_size=3), share=st.none() | st.floats(0, 1)
)
def test_changed_headers_give_named_errors(
    changes: list[tuple[int, bytes]], share: float | None, whole: Path, tmp_path: Path
):
    content = bytearray(whole.read_bytes())
    for place, piece in changes:
        content[place : place + len(piece)] = piece
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content if share is None else content[: 4 + int(share * (len(content) - 4))])
    said = _said_of(path)
    assert "\n" not in said
    assert len(said) < 1000


def _said_of(path: Path) -> str:
    try:
        checkpoint = open_checkpoint(path)
        checkpoint.tensors()
        checkpoint.tokenizer()
    except GriffinError as error:
        return str(error)
    return ""


def _header(*, tensors: int = 0, keys: bytes = b"", count: int = 0, infos: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + keys + infos


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _info(name: bytes, shape: list[int], kind: int, offset: int) -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


_NESTED = _text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000
_LONG = _text(b"a") + struct.pack("<IIQ", 9, 8, 2**23 + 1)
_SHARED = _info(b"a", [32], 0, 0) + _info(b"b", [32], 0, 64)
CASES: dict[str, tuple[bytes, type[GriffinError], str]] = {
    "many tensors": (_header(tensors=2**62), CheckpointError, r"promises 4611686018427387904 tensors"),
    "many keys": (_header(count=2**40), CheckpointError, "and 1099511627776 keys"),
    "nested arrays": (_header(keys=_NESTED, count=1), CheckpointError, "'a' is an array of type 9"),
    "long array": (_header(keys=_LONG, count=1), CheckpointError, "'a' has 8388609 elements"),
    "long text": (_header(keys=struct.pack("<Q", 2**60), count=1), CheckpointError, "a key is a text of 1152921"),
    "cut": (_header(keys=_text(b"general"), count=1), CheckpointError, "its header goes on to byte"),
    "many axes": (_header(tensors=1, infos=_text(b"a") + b"\0\0\0\x80"), CheckpointError, "has 2147483648 axes"),
    "no numbers": (_header(tensors=1, infos=_info(b"a", [0], 0, 0)), CheckpointError, r"'a' has the shape \[0\]"),
    "many numbers": (_header(tensors=1, infos=_info(b"a", [2**40, 2**40], 0, 0)), CheckpointError, "has the shape"),
    "cut blocks": (_header(tensors=1, infos=_info(b"a", [33], 2, 0)), CheckpointError, "a has rows of 33, Q4_0 has"),
    "unknown type": (_header(tensors=1, infos=_info(b"a", [32], 99, 0)), UnsupportedModel, "a has the block type 99"),
    "odd place": (_header(tensors=1, infos=_info(b"a", [32], 0, 7)), CheckpointError, "begins at byte 7"),
    "beyond the end": (_header(tensors=1, infos=_info(b"a", [32], 0, 2**40)), CheckpointError, "is truncated, down"),
    "shared bytes": (_header(tensors=2, infos=_SHARED) + bytes(1024), CheckpointError, "a and b share bytes"),
    "twice": (_header(tensors=2, infos=_info(b"a", [32], 0, 0) * 2), CheckpointError, "'a' is there twice"),
    "version": (_header(version=1), UnsupportedModel, "is of version 1"),
    "big-endian": (_header(version=3 << 24), UnsupportedModel, "is written for big-endian machines"),
    "nothing": (_header(), CheckpointError, r"does not name its architecture"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_lie_is_named(case: str, tmp_path: Path):
    content, error, words = CASES[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(error, match=words):
        open_checkpoint(path)


def test_the_reader_agrees_with_the_package(whole: Path):
    import gguf

    ours, theirs = read_gguf(whole, block_types()), gguf.GGUFReader(whole)
    assert {t.name: (t.data_offset, t.n_bytes, tuple(reversed(t.shape.tolist()))) for t in theirs.tensors} == {
        t.name: (t.extent.offset, t.extent.nbytes, t.shape) for t in ours.tensors.values()
    }
    for key, value in ours.metadata.items():
        expected = theirs.fields[key].contents()
        found = ours.texts(key) if isinstance(expected, list) and isinstance(expected[0], str) else value
        assert (found.tolist() if hasattr(found, "tolist") else found) == expected, key


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("gemma4", "feed_forward_length", [math.nan] * 3, "says gemma4.feed_forward_length is 'nan'"),
        ("gemma4", "attention.head_count_kv", [math.nan] * 3, "says gemma4.attention.head_count_kv is 'nan'"),
        ("gemma4", "attention.head_count", 3, "mismatched tensors, first model.layers.0"),
        ("qwen3_5", "expert_count", [0, 0, 1], "qwen35.expert_count differs between layers"),
        ("gemma4", "attention.sliding_window", 2**63, "says sliding_window is 9223372036854775808"),
        ("qwen3_5", "rope.freq_base", math.inf, "says qwen35.rope.freq_base is 'inf'"),
        ("llama2", "rope.scaling.factor", math.nan, "says llama.rope.scaling.factor is 'nan'"),
    ],
)
def test_arrays_and_no_numbers_in_the_place_of_numbers_are_named(
    name: str, key: str, value: Any, words: str, tmp_path: Path
):
    architecture = {"qwen3_5": "qwen35", "llama2": "llama"}.get(name, name)
    more = {f"{architecture}.{key}": value}
    if key == "rope.scaling.factor":
        more |= {"llama.rope.scaling.type": "linear"}
    path = write_gguf((ARCHITECTURES | FURTHER | HYBRIDS)[name].build(), tmp_path / "tiny.gguf", more=more)
    with pytest.raises(GriffinError, match=words):
        GriffinModel.from_pretrained(path, device="cpu", max_gpu_mem="1GB")


HALF = r"turns 4 of the \d+ numbers of a head \(\S+\.rope\.dimension_count\)"


@pytest.mark.parametrize("name", ["llama2", "gemma3", "qwen2", "falcon_new", "lfm2", "gpt_oss", "mixtral"])
def test_a_part_of_a_head_that_transformers_cannot_turn_alone_is_named(name: str, tmp_path: Path):
    """Most classes turn all of it whatever a config says, or fail in the first prompt."""
    model = (ARCHITECTURES | FURTHER | HYBRIDS | MIXTURES)[name].build()
    architecture = {"llama2": "llama", "falcon_new": "falcon", "gpt_oss": "gpt-oss", "mixtral": "llama"}.get(name, name)
    path = write_gguf(model, tmp_path / "tiny.gguf", more={f"{architecture}.rope.dimension_count": 4})
    with pytest.raises(UnsupportedModel, match=f"{HALF}, transformers' \\w+ turns all of them"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("phi3", "rope.dimension_count", 3, "turned in pairs"),
        ("stablelm", "rope.dimension_count", 0, "turned in pairs"),
        ("stablelm", "attention.key_length", 4, "has heads of 4 numbers"),
        ("qwen2", "rope.freq_base", 0.0, "freq_base is 0.0: it has to be above 0"),
        ("gemma3", "rope.scaling.factor", -1.0, "factor is -1.0: it has to be above 0"),
        ("stablelm", "attention.layer_norm_epsilon", -1.0, "epsilon is -1.0: it has to be above 0"),
        ("gemma2", "attention.sliding_window", 0, "sliding_window is 0: it has to be above 0"),
    ],
)
def test_numbers_that_nothing_can_be_computed_with_are_named(
    name: str, key: str, value: Any, words: str, tmp_path: Path
):
    path = write_gguf(ARCHITECTURES[name].build(), tmp_path / "tiny.gguf", more={f"{name}.{key}": value})
    with pytest.raises(GriffinError, match=words):
        open_checkpoint(path)


def test_gemmas_without_a_window(tmp_path: Path):
    """Early files of Gemma 2 leave the model's own out; Gemma 3's then have none, as llama.cpp reads them."""
    key = "gemma2.attention.sliding_window"
    config = open_checkpoint(write_gguf(ARCHITECTURES["gemma2"].build(), tmp_path / "2.gguf", drop=(key,))).config
    assert config.sliding_window == 4096
    path = write_gguf(ARCHITECTURES["gemma3"].build(), tmp_path / "3.gguf", more={"gemma3.attention.sliding_window": 0})
    with GriffinModel.from_pretrained(path, device="cpu", max_gpu_mem="1GB") as model:
        assert set(model.config.layer_types) == {"full_attention"}
        assert model.generate(torch.arange(5, 45)[None], max_new_tokens=2, do_sample=False).shape == (1, 42)
