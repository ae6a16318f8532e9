"""Hostile safetensors headers and code that a checkpoint brings along: refused, nothing is run."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NAME = "model.layers.0.mlp.up_proj.weight"
Header = dict[str, Any]


def rewrite(directory: Path, change: Callable[[Header], object]) -> Path:
    """Replace the header of the shard that holds NAME; `change` edits it or returns another, JSON or bytes."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shard = directory / index["weight_map"][NAME]
    content = shard.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    changed = change(header)
    raw = changed if isinstance(changed, bytes) else json.dumps(header if changed is None else changed).encode()
    shard.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])
    return shard


def entry(**changes: object) -> Callable[[Header], object]:
    return lambda header: header[NAME].update(changes)


HEADERS: dict[str, Callable[[Header], object]] = {
    "no dtype": lambda header: header[NAME].pop("dtype") and None,
    "no shape": lambda header: header[NAME].pop("shape") and None,
    "no offsets": lambda header: header[NAME].pop("data_offsets") and None,
    "unknown dtype": entry(dtype="F31"),
    "dtype a number": entry(dtype=7),
    "dtype a list": entry(dtype=["F32"]),
    "shape a word": entry(shape="128x32"),
    "shape of another size": entry(shape=[5, 5]),
    "shape negative": entry(shape=[-128, -32]),
    "offsets a word": entry(data_offsets="ab"),
    "offsets empty": entry(data_offsets=[]),
    "one offset": entry(data_offsets=[0]),
    "offsets null": entry(data_offsets=None),
    "offsets negative": entry(data_offsets=[-128, 0]),
    "offsets fractional": entry(data_offsets=[0.5, 16384.5]),
    "offsets reversed": entry(data_offsets=[16384, 0]),
    "offsets overlapping": entry(data_offsets=[0, 16384]),
    "offsets beyond": entry(data_offsets=[0, 10**30]),
    "entry a number": lambda header: header | {NAME: 5},
    "a list": lambda header: [1, 2],
    "null": lambda header: b"null",
    "empty": lambda header: {},
    "not text": lambda header: bytes(range(256)) * 4,
    "nested deeply": lambda header: b"[" * 100_000,
    "tensor renamed": lambda header: {("other" if name == NAME else name): value for name, value in header.items()},
}


@pytest.mark.parametrize("damage", HEADERS)
def test_header_is_refused(cli, copy: Path, damage: str):
    rewrite(copy, HEADERS[damage])
    cli.refuses(4, r"\.safetensors|header|index", "run", "the cat", "-n", 2, "-m", copy)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_header_length_is_checked_before_it_is_read(cli, copy: Path, length: int):
    shard = next(iter(sorted(copy.glob("*.safetensors"))))
    shard.write_bytes(struct.pack("<Q", length) + shard.read_bytes()[8:])
    for command in (("run", "the cat"), ("plan",)):
        cli.refuses(4, "truncated or damaged", *command, "-m", copy)


def test_random_bytes_in_the_header(cli, copy: Path, tmp_path: Path):
    """Whatever the damage is, it is refused in one line or harmless (it fell into the metadata)."""
    shard = rewrite(copy, lambda header: None)
    intact = shard.read_bytes()
    (length,) = struct.unpack("<Q", intact[:8])
    generator = random.Random(0)
    refused = 0
    for _ in range(40):
        damaged = bytearray(intact)
        for _ in range(generator.choice([1, 1, 5])):
            damaged[generator.randrange(8 + length)] = generator.randrange(256)
        shard.write_bytes(damaged)
        outcome = cli("run", "the cat", "-n", 2, "-q", "-m", copy)
        assert outcome.code in (0, 4)
        if outcome.code == 4:
            refused += 1
            assert outcome.out == ""
            assert outcome.err.startswith("griffin-offload: error: ")
            assert outcome.err.count("\n") == 1
        else:
            assert outcome.err == ""
    assert refused > 30


def plant(directory: Path) -> Path:
    """Python code in the checkpoint that leaves a trace when it runs."""
    trace = directory.parent / "trace"
    (directory / "planted.py").write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig): model_type = 'planted'\n"
        "class Model(LlamaForCausalLM): config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast): pass\n"
    )
    return trace


@pytest.mark.parametrize("command", [("run", "the cat", "-n", "2"), ("plan",)], ids=["run", "plan"])
@pytest.mark.parametrize("model_type", ["planted", "llama", "vit"])
def test_code_in_a_checkpoint_never_runs(cli, copy: Path, edit, model_type: str, command: tuple[str, ...]):
    """Nor is anybody asked whether it may: an answer could be lying on standard input."""
    trace = plant(copy)
    classes = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
    edit(copy / "config.json", model_type=model_type, auto_map=classes)
    if model_type == "llama":  # transformers knows it and needs no code
        assert cli(*command, "-q", "-m", copy, stdin="y\ny\ny\n").code == 0
    else:
        cli.refuses(4, f"{model_type}|custom code", *command, "-m", copy, stdin="y\ny\ny\n")
    assert not trace.exists()


def test_code_of_a_tokenizer_never_runs(cli, copy: Path, edit):
    trace = plant(copy)
    mapped = {"AutoTokenizer": [None, "planted.Tokenizer"]}
    edit(copy / "tokenizer_config.json", tokenizer_class="Planted", auto_map=mapped)
    outcome = cli("run", "the cat", "-n", 2, "-q", "-m", copy, stdin="y\ny\ny\n")
    assert outcome.code in (0, 4)  # read without the code, or refused
    assert "[y/N]" not in outcome.out
    assert outcome.err.count("\n") == (outcome.code == 4)
    assert not trace.exists()
