"""Cases of our own parsers: sizes, headers, indices, configs, and the marks of converted checkpoints."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from robustness.fuzz.damage import any_value, as_bytes, damaged_json, damaged_safetensors, split_safetensors
from robustness.fuzz.files import shards
from robustness.fuzz.place import Place
from robustness.fuzz.worker import Unnamed

from griffin_offload.checkpoint.converted import check_shard
from griffin_offload.checkpoint.registry import open_checkpoint, read_config
from griffin_offload.checkpoint.safetensors import INDEX, map_file, read_header, read_headers, weight_files
from griffin_offload.config import LoadConfig
from griffin_offload.engine.spec import examine_checkpoint, plan_for
from griffin_offload.units import parse_seconds, parse_size

# What other configs say, for a config to contradict itself with.
_KEYS = ("auto_map", "quantization_config", "text_config", "layer_types", "num_labels", "rope_scaling", "id2label")
_KEYS += ("n_layer", "head_dim", "sliding_window", "attn_implementation", "_name_or_path", "torch_dtype", "dtype")
MAPS = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "other/repo--planted.Model"}


_DIGITS = "0123456789\u0663\u56db\u00b2\U0001d7d7.eE+-_, %\0"
_UNITS = (
    "",
    "b",
    "B",
    "kB",
    "KiB",
    "MB",
    "MiB",
    "GB",
    "gIb",
    "TB",
    "TiB",
    "%",
    "auto",
    "s",
    "m",
    "h",
    "Gb ",
    " GB",
    "GB\n",
)


def size(generator: random.Random, place: Place) -> None:
    text = "".join(generator.choice(_DIGITS) for _ in range(generator.choice((1, 2, 3, 5, 12))))
    if generator.random() < 0.3:
        text = generator.choice(("1", "12", "0.5", "9" * 400, "1e999", "0" * 20 + "1", ".5", "-1", "1" * 5000))
    text = generator.choice(("", "", " ", "\t")) + text + generator.choice(_UNITS)
    value: Any = any_value(generator) if generator.random() < 0.15 else text
    if generator.random() < 0.3:
        seconds = parse_seconds(str(value))
        if not 0 < seconds < float("inf"):
            raise Unnamed(f"{value!r} is {seconds} s")
        return
    number: Any = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    if generator.random() < 0.05:
        number = generator.choice((float("nan"), float("inf"), float("-inf"), 10**400, True, 0.3))
    size_bytes = parse_size(
        number, total_bytes=generator.choice((None, 0, 10**10)), free_bytes=generator.choice((None, 10**9))
    )
    if not isinstance(size_bytes, int) or size_bytes <= 0:
        raise Unnamed(f"{number!r} is {size_bytes!r} bytes")


def header(generator: random.Random, place: Place) -> None:
    name = generator.choice(shards(place.files))
    path = place.write(name, damaged_safetensors(generator, place.valid(name)))
    found = read_header(path)
    check_shard(path, None)
    data_bytes = path.stat().st_size - 8
    if any(not 0 <= size <= data_bytes for _, size in found.values()):
        raise Unnamed(f"tensors of {max(size for _, size in found.values())} bytes in a file of {data_bytes}")
    map_file(path)


def index(generator: random.Random, place: Place) -> None:
    weights = json.loads(place.valid(INDEX))
    kind = generator.random()
    if kind < 0.35:
        key = generator.choice(list(weights["weight_map"]))
        weights["weight_map"][key] = any_value(
            generator, [*shards(place.files), "../outside/" + shards(place.files)[0], INDEX]
        )
    elif kind < 0.4:
        place.link(shards(place.files)[0], generator.choice(("/dev/zero", "/dev/null", "loop", "absent", "..", INDEX)))
    else:
        weights = damaged_json(generator, weights, shards(place.files))
    place.write(INDEX, as_bytes(generator, weights))
    for path in read_headers(place.directory, *weight_files(place.directory)):
        if path.resolve().parent != place.directory.resolve():
            raise Unnamed(f"read {path}")


def converted(generator: random.Random, place: Place) -> None:
    if generator.random() < 0.6:
        config = json.loads(place.valid("config.json"))
        if generator.random() < 0.8:
            config["quantization_config"] = damaged_json(generator, config["quantization_config"])
        else:
            config = damaged_json(generator, config)
        place.write("config.json", as_bytes(generator, config))
    else:
        name = generator.choice(shards(place.files))
        place.write(name, _damaged_metadata(generator, place.valid(name)))
    open_checkpoint(place.directory)


def _damaged_metadata(generator: random.Random, content: bytes) -> bytes:
    header, data = split_safetensors(content)
    if generator.random() < 0.5:
        return damaged_safetensors(generator, content)
    header["__metadata__"] = damaged_json(generator, header["__metadata__"])
    raw = as_bytes(generator, header)
    return len(raw).to_bytes(8, "little") + raw + data


def config_cases(configs: list[dict[str, Any]]) -> tuple[Callable[[random.Random, Place], None], ...]:
    values = [value for config in configs for value in config.values()]

    def damaged(generator: random.Random, place: Place) -> Path:
        config = damaged_json(generator, generator.choice(configs), [*values, MAPS])
        if isinstance(config, dict) and generator.random() < 0.3:
            config[generator.choice(_KEYS)] = any_value(generator, [*values, MAPS])
        return place.write("config.json", as_bytes(generator, config))

    def config(generator: random.Random, place: Place) -> None:
        read_config(damaged(generator, place))

    def plan(generator: random.Random, place: Place) -> None:
        checkpoint = read_config(damaged(generator, place))
        plan_for(examine_checkpoint(checkpoint, LoadConfig(max_gpu_mem="1GB")))

    return config, plan
