"""Packed matrices that are damaged or made to harm: a named error or numbers, never anything else."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from foreign_formats import FORMATS, write_foreign
from safetensors.torch import load_file, save_file
from torch import Tensor

from griffin_offload.checkpoint.mapped import FileMaps
from griffin_offload.checkpoint.packed import Module
from griffin_offload.checkpoint.quantisation_config import method_of
from griffin_offload.checkpoint.registry import open_checkpoint, read_config
from griffin_offload.checkpoint.safetensors import stored_tensors
from griffin_offload.engine.build import build
from griffin_offload.errors import CheckpointError, GriffinError, UnsupportedModel
from griffin_offload.formats.translated import in_memory

CASES = 60 * int(os.environ.get("GRIFFIN_ROBUSTNESS", "1"))
FIRST = 1_000_000 * (int(os.environ.get("GRIFFIN_ROBUSTNESS_SEED", "1")) - 1)
_VALUES: list[Any] = [
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    1e308,
    float("nan"),
    True,
    "x",
    None,
    [],
    {},
    [0, 0],
    [128],
    [2**40] * 2,
]
_DTYPES = [torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8, torch.int8, torch.float8_e4m3fn]
MLP = "model.layers.0.mlp.up_proj"


def _reshaped(random: Random, tensor: Tensor) -> Tensor:
    ways: list[Callable[[Tensor], Tensor]] = [
        torch.flatten,
        lambda one: one[None],
        lambda one: one.reshape(-1)[: random.randrange(one.numel() + 1)],
        lambda one: one[: random.randrange(len(one) + 1)] if one.dim() else one,
        lambda one: one.t() if one.dim() == 2 else one,
        lambda one: one[:, : random.randrange(one.shape[1] + 1)] if one.dim() == 2 else one,
        lambda one: torch.cat([one, one]) if one.dim() else one,
    ]
    return random.choice(ways)(tensor)


def _other_values(random: Random, tensor: Tensor) -> Tensor:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).clone()
    for _ in range(random.randrange(1, 9)):
        raw[random.randrange(raw.numel())] = random.randrange(256)
    return raw.view(tensor.dtype).view(tensor.shape)


def _damaged(
    random: Random, tensors: dict[str, Tensor], said: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, said = dict(tensors), json.loads(json.dumps(said))
    for _ in range(random.randrange(1, 3)):
        name = random.choice(sorted(tensors))
        way = random.randrange(5)
        if way == 0 and len(tensors) > 1:
            del tensors[name]
        elif way == 1:
            tensors[name] = _reshaped(random, tensors[name])
        elif way == 2:
            tensors[name] = tensors[name].float().nan_to_num().to(random.choice(_DTYPES))
        elif way == 3 and tensors[name].numel():
            tensors[name] = _other_values(random, tensors[name])
        else:
            place = said
            while any(isinstance(value, dict) and value for value in place.values()) and random.random() < 0.7:
                place = next(value for value in place.values() if isinstance(value, dict) and value)
            place[random.choice(sorted(place))] = random.choice(_VALUES)
    return tensors, said


@pytest.mark.parametrize("name", FORMATS)
def test_damage_is_a_named_error(name: str, tmp_path: Path):
    """Of everything that a matrix is made of: absent, of another shape, type or value; and what config.json says."""
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    packed, _ = FORMATS[name].pack(weight)
    refused = 0
    for seed in range(FIRST, FIRST + CASES):
        tensors, said = _damaged(Random(f"{name} {seed}"), packed, FORMATS[name].said)
        file = tmp_path / f"{seed}.safetensors"
        save_file({f"x.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}, file)
        try:
            _read(file, said)
        except (CheckpointError, UnsupportedModel):
            refused += 1
        except Exception as error:
            raise AssertionError(f"case {seed} of {name}: {error!r}") from error
        file.unlink()
    assert refused > CASES // 4


def _read(file: Path, said: dict[str, Any]) -> None:
    maps = FileMaps()
    stored = {name.removeprefix("x."): tensor for name, tensor in stored_tensors(file).items()}
    method = method_of({"quant_method": None, **said}, file)
    reader = method.reader_of(stored)
    method.leaves_out("model.layers.0.mlp.down_proj")
    if reader is not None:
        found = in_memory(reader(Module("x", stored, maps), method.packing, torch.float32).tensor(maps))
        assert found.numel() < 2**20


def _without(suffix: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{MLP}.{suffix}"]

    return change


def _cut(suffix: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{MLP}.{suffix}"] = tensors[f"{MLP}.{suffix}"][:-1].contiguous()

    return change


def _set(suffix: str, value: int) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{MLP}.{suffix}"].view(-1)[5] = value

    return change


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Tensor]], None], str]] = {
    "no scale": ("fp8 blocks", _without("weight_scale_inv"), rf"{MLP} lacks its weight_scale"),
    "a scale too few": (
        "fp8 blocks",
        _cut("weight_scale_inv"),
        r"has 2 numbers for 128 of the matrix: config.json says 48",
    ),
    "no zero points": ("gptq", _without("qzeros"), rf"{MLP} lacks its qzeros"),
    "a group too few": ("gptq", _cut("qzeros"), rf"{MLP}.qzeros is int32 \[1, 16\], it has to be int32 2x16"),
    "a group that is not there": (
        "gptq asymmetric, in order of activation",
        _set("g_idx", 9),
        r"g_idx names groups from 0 to 9, there are 2",
    ),
    "another shape": ("compressed 4 bit", _set("weight_shape", 64), "weight_packed"),
    "rows of nothing": ("awq", _cut("scales"), r"scales has 1 numbers for 32|qzeros is int32"),
}
DAMAGE["another shape"] = ("compressed 4 bit", _cut("weight_shape"), r"weight_shape is int64 \[1\], it has to be")


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_names_the_tensor(name: str, checkpoints, tmp_path: Path):
    format, change, message = DAMAGE[name]
    packed = tmp_path / "packed"
    write_foreign(checkpoints("llama2", torch.float32, 1), packed, FORMATS[format])
    tensors = load_file(packed / "model.safetensors")
    change(tensors)
    save_file(tensors, packed / "model.safetensors")
    warnings.filterwarnings("ignore", message=".* weights only: ")
    with pytest.raises(CheckpointError, match=message):
        _number_of(packed)


def _number_of(packed: Path) -> None:
    model = build(open_checkpoint(packed))
    in_memory(model.get_parameter(f"{MLP}.weight").detach())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size is 0: it has to be a whole number"),
        ({"quant_method": "fp8", "weight_block_size": [10**30, 1]}, "weight_block_size is 1000000000"),
        ({"quant_method": "fp8", "weight_block_size": "128"}, "weight_block_size is '128': two sizes are needed"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size is 0: it has to be a whole number"),
        ({"quant_method": "awq", "bits": 4, "group_size": -2}, "group_size is -2"),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, "damaged config_groups"),
        ({"quant_method": "fp8", "modules_to_not_convert": 5}, "modules_to_not_convert is no list of names"),
        ("fp8", "its quantization_config is damaged: a str, not an object|cannot be used"),
    ],
)
def test_sizes_that_are_none_are_named(said: Any, message: str, checkpoints, tmp_path: Path):
    packed = tmp_path / "packed"
    write_foreign(checkpoints("llama2", torch.float32, 1), packed, FORMATS["fp8"])
    config = json.loads((packed / "config.json").read_text()) | {"quantization_config": said}
    (packed / "config.json").write_text(json.dumps(config))
    for read in (lambda: open_checkpoint(packed), lambda: read_config(packed / "config.json")):
        with pytest.raises(GriffinError, match=message):
            read()


def test_patterns_of_names_cost_no_time():
    """One that takes ages to try is taken as matching nothing; those that libraries write work."""
    said = {
        "quant_method": "compressed-tensors",
        "ignore": ["re:(a+)+$", "re:" + "(.*)*" * 30, "re:.*o_proj$", "layers.0"],
    }
    method = method_of(said, Path("config.json"))
    assert not method.leaves_out("a" * 60 + "b")
    assert method.leaves_out("model.layers.3.self_attn.o_proj")
    assert method.leaves_out("model.layers.0.mlp.up_proj")
    assert not method.leaves_out("model.layers.3.self_attn.q_proj")
