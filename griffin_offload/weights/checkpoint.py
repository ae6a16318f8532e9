"""A checkpoint on disk in Hugging Face layout: found, its headers read and checked, no weight touched."""

import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from griffin_offload.errors import CheckpointError, ModelNotFound, UnsupportedModel, memory_refused, one_line
from griffin_offload.weights.converted import check_shard, mark_of
from griffin_offload.weights.files import check_name
from griffin_offload.weights.quantized_linear import Precision
from griffin_offload.weights.watched_files import FileState, WatchedFiles, states_of

INDEX = "model.safetensors.index.json"
# Lies in a directory that convert has not finished.
UNFINISHED = ".converting.json"
_SINGLE = "model.safetensors"
# Of every file so many pieces go into a fingerprint, evenly spread.
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose files are whole and whose config transformers knows."""

    directory: Path
    config: PretrainedConfig
    dtype: torch.dtype
    """The stored precision: the one most bytes have."""
    files: tuple[Path, ...]
    weight_bytes: int
    precision: Precision = "none"
    """What its matrices were converted to."""
    tables: Precision = "none"
    """What its embeddings and its head were converted to."""
    states: dict[str, FileState] = field(default_factory=dict, compare=False)
    """Of `files`, by resolved path, from before their headers were read."""

    def watched(self) -> WatchedFiles:
        """`files`, held against what they were when they were checked. OSError for one that cannot be opened."""
        return WatchedFiles(self.states, self.states)


def open_checkpoint(model: str | Path, *, offline: bool = False) -> Checkpoint:
    """Find the directory or hub id `model` and check its headers. Errors: UsageError, ModelNotFound,
    CheckpointError, UnsupportedModel. No weight is read."""
    directory = _locate(str(model), offline)
    config = _read_config(directory)
    mark = mark_of(config, directory)
    files = _weight_files(directory)
    states = _states(files)
    headers = {path: _read_header(path) for path in files}
    sizes: Counter[str] = Counter()
    for header in headers.values():
        for dtype, size_bytes in header.values():
            sizes[dtype] += size_bytes
    if not sizes:
        raise CheckpointError(f"{directory} holds no tensors")
    weight_bytes = sum(sizes.values())
    for path in headers:
        check_shard(path, mark)
    if mark is not None:
        sizes = Counter({name: count for name, count in sizes.items() if name in _DTYPES})
    stored = max(sizes, key=lambda name: sizes[name], default="no floats")
    if stored not in _DTYPES or getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(
            f"{directory} is quantised ({stored}): only 16, 32 and 64 bit floats are loaded, or what griffin-offload "
            "convert made of them"
        )
    checkpoint = Checkpoint(directory, config, _DTYPES[stored], tuple(headers), weight_bytes, states=states)
    return checkpoint if mark is None else replace(checkpoint, precision=mark.precision, tables=mark.tables)


def read_config(path: str | Path) -> Checkpoint:
    """A checkpoint of which only config.json is known, `path` being that file: enough to plan with."""
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise ModelNotFound(f"no file {file}: give a config.json")
    config = _load_config(file)
    mark = mark_of(config, file.parent)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(f"{file} describes a quantised model: only what griffin-offload convert made is known")
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    checkpoint = Checkpoint(file.parent, config, dtype, (), 0)
    return checkpoint if mark is None else replace(checkpoint, precision=mark.precision, tables=mark.tables)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Of config, headers and samples of every file: tells two fine-tunes of one model apart without reading them."""
    digest = hashlib.sha256((checkpoint.directory / "config.json").read_bytes())
    for path in checkpoint.files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(sample * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint; CheckpointError if there is none that can be loaded."""
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers fail in many ways
        raise CheckpointError(f"{directory} has no tokenizer that can be loaded: {one_line(error)}") from error


def _locate(model: str, offline: bool) -> Path:
    path = Path(os.path.expanduser(model))  # unlike Path's own, it leaves an unknown ~user as it is
    check_name(path)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelNotFound(f"{model} is a file: give the checkpoint's directory")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ModelNotFound(f"no directory {model}: give a checkpoint directory or a hub id such as org/name")
    return _hub_snapshot(model, offline)


def _hub_snapshot(model: str, offline: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    unwanted = ["consolidated*", "*/*"]  # the same weights again, in other layouts
    try:
        return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=unwanted, local_files_only=offline))
    except Exception as error:  # the hub's client raises errors of many libraries
        where = "the local hub cache" if offline else "this directory or the hub"
        raise ModelNotFound(f"{model} was not found in {where}: {one_line(error)}") from error


def _read_config(directory: Path) -> PretrainedConfig:
    if (directory / UNFINISHED).is_file():
        raise CheckpointError(f"{directory} is an unfinished conversion: run the same convert command again")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json: not a Hugging Face checkpoint")
    return _load_config(directory / "config.json")


def _load_config(file: Path) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each architecture validates its config in its own way
        raise CheckpointError(f"{file} cannot be used: {one_line(error)}") from error
    return config


def _states(files: list[Path]) -> dict[str, FileState]:
    try:
        return states_of(str(path.resolve()) for path in files)
    except OSError as error:
        raise CheckpointError(f"{files[0].parent} cannot be read: {one_line(error)}") from error


def _weight_files(directory: Path) -> list[Path]:
    """The files that transformers will load: the single one, else those of the index, which has to be complete."""
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    if (directory / INDEX).is_file():
        return _indexed_files(directory)
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} has only pickled weights ({pickles[0]}): they can run code, convert them to safetensors"
        )
    raise CheckpointError(f"{directory} has no {_SINGLE} and no {INDEX}")


def _indexed_files(directory: Path) -> list[Path]:
    try:
        weight_map: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
        files = [directory / name for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{directory / INDEX} cannot be read: {one_line(error)}") from error
    for path in files:
        if path.parent != directory:
            raise CheckpointError(f"{directory / INDEX} names {path}, outside of the checkpoint")
        if not path.is_file():
            raise CheckpointError(f"{path} is named by the index but absent: download it again")
    present = {name for path in files for name in _read_header(path)}
    lacking = sorted(set(weight_map) - present)
    if lacking:
        raise CheckpointError(f"{directory}: the index promises {lacking[0]}, no shard holds it")
    return files


def _read_header(path: Path) -> dict[str, tuple[str, int]]:
    """Stored precision and bytes of each tensor of one file; the library checks header against size and offsets."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return {name: (part.get_dtype(), _tensor_bytes(part)) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        if memory_refused(error):
            raise
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated or damaged, download it again: {one_line(error)}"
        ) from error


def _tensor_bytes(part: Any) -> int:
    item = _DTYPES.get(part.get_dtype())
    return int(math.prod(part.get_shape())) * (item.itemsize if item is not None else 1)
