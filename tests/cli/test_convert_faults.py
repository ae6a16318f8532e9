"""Every way a conversion can be impossible: the exit code, one line, and no file lost."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from marks import every_pair
from tiny_models import write_checkpoint, write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from griffin_offload.engine import convert as runtime

INDEX = "model.safetensors.index.json"
NOTE = ".converting.json"


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_converting_what_is_converted(cli, converted, made: Path, tmp_path: Path, precision: str):
    words = "is converted to int8 already: give the original"
    cli.refuses(2, words, "convert", tmp_path / "out", "-m", made, "--quantize", precision)
    assert not (tmp_path / "out").exists()
    assert files_of(made) == files_of(converted("llama2", "int8"))


OCCUPIED: dict[str, Callable[[Path], object]] = {
    "a file": lambda out: out.write_text("mine"),
    "a directory with a file": lambda out: (out.mkdir(), (out / "thesis.txt").write_text("mine")),
    "a directory with a directory": lambda out: (out / "empty").mkdir(parents=True),
    "a directory with a hidden file": lambda out: (out.mkdir(), (out / ".tmpmine").write_text("mine")),
    "shards without a note": lambda out: (out.mkdir(), (out / "model-00001-of-00004.safetensors").write_text("mine")),
}


@pytest.mark.parametrize("kind", OCCUPIED)
def test_an_output_that_exists(cli, llama: Path, tmp_path: Path, kind: str):
    out = tmp_path / "out"
    OCCUPIED[kind](out)
    before, names = files_of(tmp_path), sorted(tmp_path.rglob("*"))
    cli.refuses(2, "nothing is overwritten, give a new directory", "convert", out, "-m", llama, "--quantize", "int8")
    assert (files_of(tmp_path), sorted(tmp_path.rglob("*"))) == (before, names)


def test_an_output_that_is_finished_or_the_model_itself(cli, copy: Path, llama: Path, made: Path, converted):
    cli.refuses(2, "made exists already", "convert", made, "-m", llama, "--quantize", "int8")
    assert files_of(made) == files_of(converted("llama2", "int8"))
    cli.refuses(2, "copy exists already", "convert", copy, "-m", copy, "--quantize", "int8")
    assert files_of(copy) == files_of(llama)


def test_an_output_that_cannot_be_made(cli, llama: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", "/proc/griffin/out", tmp_path / ("long" * 100)):
        cli.refuses(1, "cannot be written", "convert", out, "-m", llama, "--quantize", "int8")


def test_an_unknown_home(cli, copy: Path, llama: Path, monkeypatch: pytest.MonkeyPatch):
    """As in a shell, such a name is left as it is."""
    monkeypatch.chdir(copy)
    cli.refuses(4, "no .* file ~nobody-here/a", "convert", "out", "-m", "~nobody-here/a", "--quantize", "int8")
    cli.refuses(4, "no file ~nobody-here/a", "plan", "--config", "~nobody-here/a")
    assert cli("convert", "~nobody-here/a", "-m", llama, "--quantize", "int8").code == 0
    assert (copy / "~nobody-here" / "a" / INDEX).is_file()


def unfinished(directory: Path) -> None:
    """As after a kill before the last shard."""
    mark = json.loads((directory / "config.json").read_text())["quantization_config"]
    (directory / NOTE).write_text(json.dumps({key: mark[key] for key in ("precision", "source", "tables", "version")}))
    for path in directory.iterdir():
        if path.name not in (NOTE, "model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"):
            path.unlink()


def test_an_unfinished_conversion_of_something_else(
    cli, checkpoints, change_tensor, copy: Path, llama: Path, made: Path
):
    """Another precision, another model, and a fine-tune: same names, same shapes, other numbers in one layer."""
    unfinished(made)
    before = files_of(made)
    change_tensor(copy, "model.layers.2.mlp.up_proj.weight", lambda tensor: tensor.neg())
    for model, precision in ((llama, "int4"), (checkpoints("reglu"), "int8"), (copy, "int8")):
        words = "unfinished conversion of another model or precision: remove it"
        cli.refuses(2, words, "convert", made, "-m", model, "--quantize", precision)
        assert files_of(made) == before
    (made / NOTE).write_text("{")
    cli.refuses(2, "another model or precision", "convert", made, "-m", llama, "--quantize", "int8")


@pytest.mark.parametrize("harm", ["truncated", "another"])
def test_a_finished_shard_that_is_not(cli, converted, llama: Path, made: Path, harm: str):
    unfinished(made)
    shard = made / "model-00002-of-00004.safetensors"
    other = converted("llama2", "int4") / shard.name if harm == "another" else shard
    shard.write_bytes(other.read_bytes()[: None if harm == "another" else -1])
    command = ("convert", made, "-m", llama, "--quantize", "int8")
    cli.refuses(4, f"{shard.name} is damaged or of another conversion .*: remove it and run", *command)
    shard.unlink()
    assert cli(*command).code == 0
    assert files_of(made) == files_of(converted("llama2", "int8"))


def test_architectures_that_are_refused(cli, tmp_path: Path):
    write_checkpoint("openai-gpt", tmp_path / "model", shards=1)
    out = tmp_path / "out"
    cli.refuses(
        4,
        "has no KV cache",
        "convert",
        out,
        "-m",
        tmp_path / "model",
        "--quantize",
        "int8",
    )
    assert not out.exists()


def test_sizes_that_have_no_int4(cli, tmp_path: Path):
    settings = {"vocab_size": 320, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**settings, num_attention_heads=4)).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    words = "q_proj: int4 needs rows in groups of 32, this one has 48 numbers: use int8"
    cli.refuses(4, words, "convert", tmp_path / "out", "-m", tmp_path / "model", "--quantize", "int4")
    assert not (tmp_path / "out").exists()
    assert cli("convert", tmp_path / "out", "-m", tmp_path / "model", "--quantize", "int8").code == 0
    assert cli("run", "the cat", "-m", tmp_path / "out", "-n", 2, "-q").code == 0


@pytest.mark.parametrize(
    ("value", "key", "precision"),
    every_pair(
        {name: float(name) for name in ("nan", "inf", "-inf")},
        {name: f"model.layers.1.{name}.weight" for name in ("mlp.down_proj", "self_attn.k_proj")},
        {precision: precision for precision in ("int8", "int4")},
    ),
)
def test_weights_that_are_no_numbers(
    cli, change_tensor, copy: Path, tmp_path: Path, key: str, value: float, precision: str
):
    change_tensor(copy, key, lambda tensor: tensor.index_fill(1, torch.tensor([5]), value))
    words = f"{key}: a matrix holds infinities or NaN, .* --quantize none"
    cli.refuses(4, words, "convert", tmp_path / "out", "-m", copy, "--quantize", precision)
    cli.refuses(4, "unfinished conversion", "plan", "-m", tmp_path / "out")


def test_a_model_that_is_missing_or_damaged(cli, copy: Path, tmp_path: Path):
    flags = ("convert", tmp_path / "out", "--quantize", "int8", "-m")
    cli.refuses(4, "no directory", *flags, tmp_path / "absent")
    (copy / "model-00002-of-00003.safetensors").write_bytes(b"")
    cli.refuses(4, "truncated or damaged", *flags, copy)
    assert not (tmp_path / "out").exists()


def test_bad_flags(cli, llama: Path, tmp_path: Path):
    cli.refuses_usage("required: --quantize", "convert", tmp_path / "out", "-m", llama)
    cli.refuses_usage("required: OUT", "convert", "-m", llama, "--quantize", "int8")
    for precision in ("auto", "int5"):
        cli.refuses(2, "--quantize: invalid choice", "convert", tmp_path / "out", "-m", llama, "--quantize", precision)


def test_a_source_that_changes_before_it_is_mapped(cli, converted, copy: Path, tmp_path: Path, monkeypatch):
    """No shard of the other numbers may be there when the old ones are back: it would be kept."""
    shard, out = copy / "model-00001-of-00003.safetensors", tmp_path / "out"
    whole, command = shard.read_bytes(), ("convert", out, "-m", copy, "--quantize", "int8")
    build = runtime.build

    def changed(*arguments: object) -> object:
        shard.write_bytes(whole[:-4096] + bytes(4096))
        os.utime(shard, ns=(0, 1))  # as if a tick of the clock had passed
        return build(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "build", changed)
        cli.refuses(4, "has changed since it was loaded .it was written to", *command)
    shard.write_bytes(whole)
    assert cli(*command).code == 0
    assert files_of(out) == files_of(converted("llama2", "int8"))
