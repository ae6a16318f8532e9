"""Every way a converted checkpoint can be damaged: exit code 4 and one line that says what was found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES
from torch import Tensor

from griffin_offload.engine.convert import convert

INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj"
COMMANDS = [("run", "the cat", "-n", "4"), ("plan",)]
both = pytest.mark.parametrize("command", COMMANDS, ids=["run", "plan"])


def other_seed(directory: Path) -> None:
    """The second shard comes from a fine-tune: same names, same shapes."""
    fine, out = directory.with_name("fine"), directory.with_name("fine-int8")
    ARCHITECTURES["llama2"].build(seed=1).save_pretrained(fine)
    convert(fine, out, "int8")
    shutil.copy(out / "model-00002-of-00004.safetensors", directory)


def truncate(directory: Path) -> None:
    path = directory / "model-00003-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def mark(**changes: object) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(
            json.dumps(config | {"quantization_config": config["quantization_config"] | changes})
        )

    return write


def config(value: object) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        text = json.loads((directory / "config.json").read_text()) | {"quantization_config": value}
        (directory / "config.json").write_text(json.dumps(text))

    return write


SCALE, INPUT_SCALE, WEIGHT = (f"{DOWN}.{part}" for part in ("scale", "input_scale", "weight"))
HEADERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard of a fine-tune": (other_seed, "00002-of-00004.* belongs to another conversion .*shards are mixed"),
    "shard cut short": (truncate, r"\(\d+ bytes\) is truncated or damaged"),
    "newer version": (mark(version=2), "was converted to int8 in format 2, this version reads format 1: convert again"),
    "no version": (mark(version=None), "was converted to int8 in format None"),
    "int4 before groups": (mark(precision="int4", version=1), "to int4 in format 1, .* reads format 2: convert again"),
    "unknown precision": (mark(precision="int5"), "damaged quantization_config: convert again"),
    "other precision": (mark(precision="int4", version=2), "belongs to another conversion"),
    "precision a list": (mark(precision=["int8"]), "damaged quantization_config"),
    "no source": (mark(source=None), "damaged quantization_config"),
    "another source": (mark(source="0" * 32), "belongs to another conversion"),
    "another method": (mark(method="gptq"), "converted|quantised"),
    "mark a text": (config("griffin-offload"), "converted|quantised|cannot be used"),
    "mark a list": (config([1]), "converted|quantised|cannot be used"),
    "mark null": (config(None), "was converted, config.json has lost its quantization_config: convert again"),
    "mark empty": (config({}), "converted|quantised"),
    "scale promised": (lambda d: promise(d, "model.layers.1.mlp.scale"), "promises model.layers.1.mlp.scale"),
}


def promise(directory: Path, key: str) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][key] = "model-00001-of-00004.safetensors"
    (directory / INDEX).write_text(json.dumps(index))


@both
@pytest.mark.parametrize("damage", HEADERS)
def test_damaged_headers(cli, made: Path, damage: str, command: tuple[str, ...]):
    harm, words = HEADERS[damage]
    harm(made)
    assert str(made) in cli.refuses(4, words, *command, "-m", made)


TENSORS: dict[str, tuple[str, Callable[[Tensor], Tensor | None], str]] = {
    "no scale": (SCALE, lambda t: None, f"lacks 1 tensors, first {SCALE}: convert again"),
    "no input scale": (INPUT_SCALE, lambda t: None, f"lacks 1 tensors, first {INPUT_SCALE}: convert again"),
    "no matrix": (WEIGHT, lambda t: None, f"lacks 1 tensors, first {WEIGHT}"),
    "short scale": (SCALE, lambda t: t[:-1].clone(), rf"{SCALE} is float32 \[31\], the model needs float32 \[32\]"),
    "scale of two axes": (SCALE, lambda t: t[:, None].clone(), r"is float32 \[32, 1\]"),
    "swapped scales": (INPUT_SCALE, lambda t: t[:32].clone(), r"input_scale is float32 \[32\]"),
    "whole scale": (SCALE, lambda t: t.to(torch.int8), r"is int8 \[32\], the model needs float32"),
    "float matrix": (WEIGHT, lambda t: t.float(), r"is float32 \[32, 128\], the model needs int8"),
    "unsigned matrix": (WEIGHT, lambda t: t.view(torch.uint8), r"is uint8 \[32, 128\], the model needs int8"),
    "turned matrix": (WEIGHT, lambda t: t.t().contiguous(), r"is int8 \[128, 32\], the model needs int8 \[32, 128\]"),
}


@pytest.mark.parametrize("damage", TENSORS)
def test_damaged_tensors(cli, change_tensor, made: Path, damage: str):
    key, harm, words = TENSORS[damage]
    change_tensor(made, key, harm)
    cli.refuses(4, f"{words}.*convert again|{words}", "run", "the cat", "-m", made)


@both
@pytest.mark.parametrize(("stored", "asked"), [("int8", "none"), ("int8", "int4"), ("int4", "int8")])
def test_another_precision_than_the_stored(cli, converted, stored: str, asked: str, command: tuple[str, ...]):
    words = f"was converted to {stored}, --quantize {asked} needs the original"
    cli.refuses(2, words, *command, "-m", converted("llama2", stored), "--quantize", asked)
    assert cli(*command, "-m", converted("llama2", stored), "--quantize", stored).code == 0
