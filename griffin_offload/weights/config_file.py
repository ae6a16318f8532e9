"""config.json: what it counts and what it asks for is checked before transformers makes lists and modules of it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from griffin_offload.errors import CheckpointError, UnsupportedModel, one_line
from griffin_offload.weights.foreign import check_kind
from griffin_offload.weights.json_file import read_object

MAX_LAYERS = 1024
"""Far above any model there is; every one costs milliseconds before anything is known to fit."""
_MAX_LABELS = 100_000
_MAX_SIZE = 2**40
_MOST_BYTES = 16_000_000
_LAYER_COUNT = re.compile(r"layers?$|^depth$")
# Others are packages, or repositories of compiled code that transformers would download and run.
_IMPLEMENTATIONS = (None, "eager", "sdpa")
_SIZES = (
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "num_hidden_layers",
)


def load_config(file: Path) -> PretrainedConfig:
    """The config in `file`; CheckpointError for one that transformers cannot use, or that would cost it the machine,
    UnsupportedModel for what is no causal language model."""
    for key, value in _entries(read_object(file, _MOST_BYTES)):
        _check_entry(key, value, file)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
        check_kind(config, file)
        text = config.get_text_config()
        sizes = {name: _values(text, name) for name in _SIZES}
    except UnsupportedModel:
        raise
    except Exception as error:  # each architecture validates its config in its own way
        raise CheckpointError(f"{file} cannot be used: {one_line(error)}") from error
    for name, values in sizes.items():
        for value in values:
            _check_size(name, value, file)
    return config


def _values(config: PretrainedConfig, name: str) -> list[Any]:
    """What the config says `name` is; of each layer, where layers differ: transformers raises an error of its own for
    the model's value then."""
    try:
        return [getattr(config, name, None)]
    except RuntimeError:
        return [getattr(layer, name, None) for layer in config.per_layer_config]


def _entries(raw: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key with its value, those inside included."""
    waiting: list[Any] = [raw]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _check_entry(key: str, value: Any, file: Path) -> None:
    most = MAX_LAYERS if _LAYER_COUNT.search(key) else _MAX_LABELS if key == "num_labels" else None
    if most is not None and isinstance(value, int | float) and not value <= most:
        raise CheckpointError(f"{file} says {key} is {value}: at most {most} are supported")
    if key.endswith(("attn_implementation", "experts_implementation")) and value not in _IMPLEMENTATIONS:
        raise CheckpointError(f"{file} asks for {key} {value!r}: only eager and sdpa are used, take it out")


def _check_size(name: str, value: Any, file: Path) -> None:
    if value is None:
        return
    most = MAX_LAYERS if name == "num_hidden_layers" else _MAX_SIZE
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise CheckpointError(f"{file} says {name} is {value!r}: it has to be a whole number from 1 to {most}")
