"""A checkpoint on disk in Hugging Face layout: found, its headers read and checked, no weight touched."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from griffin_offload.blocks.sizes import build_on_meta
from griffin_offload.blocks.towers import left_out_parts
from griffin_offload.checkpoint.changes import FileState, WatchedFiles, states_of
from griffin_offload.checkpoint.config_files import load_config
from griffin_offload.checkpoint.converted import check_shard, mark_of
from griffin_offload.checkpoint.files import check_name, unreadable
from griffin_offload.checkpoint.safetensors import (
    DTYPES,
    Header,
    converted_tensors,
    read_headers,
    untie_other_head,
    weight_files,
)
from griffin_offload.checkpoint.unsupported import check_numbers, is_gguf, refuse_gguf, refuse_what_is_no_checkpoint
from griffin_offload.errors import CheckpointError, ModelNotFound, UsageError, one_line
from griffin_offload.formats.linear import Precision

# Lies in a directory that convert has not finished.
UNFINISHED = ".converting.json"
# Of every file so many pieces go into a fingerprint, evenly spread.
_SAMPLES, _SAMPLE_BYTES = 64, 4096


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
    untied: bool = False
    """The files hold another head than the embeddings that config.json ties it to."""
    converted: dict[str, int] = field(default_factory=dict, compare=False)
    """Bytes, in `dtype`, of the tensors that are stored in another precision."""
    states: dict[str, FileState] = field(default_factory=dict, compare=False)
    """Of `files`, by resolved path, from before their headers were read."""

    def watched(self) -> WatchedFiles:
        """`files`, held against what they were when they were checked. OSError for one that cannot be opened."""
        return WatchedFiles(self.states, self.states)


def open_checkpoint(model: str | Path, *, offline: bool = False) -> Checkpoint:
    """Find the directory or hub id `model` and check its headers. Errors: UsageError, ModelNotFound,
    CheckpointError, UnsupportedModel. No weight is read."""
    directory = locate(model, offline=offline)
    config = _read_config(directory)
    mark = mark_of(config, directory)
    check_numbers(directory, getattr(config, "quantization_config", None), None)
    files, promised = weight_files(directory)
    states = _states(files)
    headers = read_headers(directory, files, promised)
    weight_bytes = sum(size_bytes for header in headers.values() for _, size_bytes in header.values())
    if not any(headers.values()):
        raise CheckpointError(f"{directory} holds no tensors")
    sizes = _bytes_by_dtype(config, headers.values())
    for path in headers:
        check_shard(path, mark)
    if mark is not None:
        sizes = Counter({name: count for name, count in sizes.items() if name in DTYPES})
    stored = max(sizes, key=lambda name: sizes[name], default="no floats")
    check_numbers(directory, None, None if stored in DTYPES else stored)
    untied = mark is None and untie_other_head(config, DTYPES[stored], headers)
    checkpoint = Checkpoint(
        directory,
        config,
        DTYPES[stored],
        tuple(headers),
        weight_bytes,
        untied=untied,
        converted=converted_tensors(headers.values(), DTYPES[stored]),
        states=states,
    )
    return checkpoint if mark is None else replace(checkpoint, precision=mark.precision, tables=mark.tables)


def _bytes_by_dtype(config: PretrainedConfig, headers: Iterable[Header]) -> Counter[str]:
    """Of the language model: a tower may outweigh it, in another precision."""
    sees = config.get_text_config() is not config
    towers = left_out_parts(build_on_meta(config, torch.bfloat16)) if sees else set()
    sizes: Counter[str] = Counter()
    for header in headers:
        for name, (dtype, size_bytes) in header.items():
            if not towers & set(name.split(".")):
                sizes[dtype] += size_bytes
    return sizes


def read_config(path: str | Path) -> Checkpoint:
    """A checkpoint of which only config.json is known, `path` being that file: enough to plan with."""
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise ModelNotFound(f"no file {file}: give a config.json")
    config = load_config(file)
    mark = mark_of(config, file.parent)
    check_numbers(file, getattr(config, "quantization_config", None), None)
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


def locate(model: str | Path, *, offline: bool = False, **hub: Any) -> Path:
    """The directory of `model`, fetched from the hub if need be; `hub` are more arguments of its client (revision,
    cache_dir, token). Errors: UsageError, ModelNotFound."""
    model = str(model)
    if not model:
        raise ModelNotFound("the model's name is empty: give a checkpoint directory or a hub id such as org/name")
    path = Path(os.path.expanduser(model))  # unlike Path's own, it leaves an unknown ~user as it is
    check_name(path)
    try:
        there, directory = path.exists(), path.is_dir()
    except OSError as error:  # a folder on the way may not be entered, or a prompt stands in the name's place
        raise ModelNotFound(f"{model[:80]!r} cannot be looked at: {error.strerror}") from error
    if directory:
        if hub.get("revision") not in (None, "main"):  # a token and a cache are for what has to be fetched
            raise UsageError(
                f"revision is {hub['revision']!r}, and {model} is a directory, which has none: leave it out"
            )
        return path
    if there:
        if is_gguf(path):
            refuse_gguf(path)
        raise ModelNotFound(f"{model} is a file: give the checkpoint's directory")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ModelNotFound(f"no directory {model}: give a checkpoint directory or a hub id such as org/name")
    return _hub_snapshot(model, offline, hub)


def _hub_snapshot(model: str, offline: bool, hub: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    unwanted = ["consolidated*", "*/*"]  # the same weights again, in other layouts
    try:
        found = snapshot_download(
            model, allow_patterns=wanted, ignore_patterns=unwanted, local_files_only=offline, **hub
        )
        return Path(found)
    except Exception as error:  # the hub's client raises errors of many libraries
        where = "the local hub cache" if offline else "this directory or the hub"
        raise ModelNotFound(f"{model} was not found in {where}: {one_line(error)}") from error


def _read_config(directory: Path) -> PretrainedConfig:
    try:
        os.listdir(directory)
        unfinished = (directory / UNFINISHED).is_file()
    except OSError as error:  # another user's
        raise CheckpointError(unreadable(directory, error)) from error
    if unfinished:
        raise CheckpointError(f"{directory} is an unfinished conversion: run the same convert command again")
    if not (directory / "config.json").is_file():
        refuse_what_is_no_checkpoint(directory)
        raise CheckpointError(f"{directory} has no config.json: not a Hugging Face checkpoint")
    return load_config(directory / "config.json")


def _states(files: list[Path]) -> dict[str, FileState]:
    try:
        return states_of(str(path.resolve()) for path in files)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise CheckpointError(f"{files[0].parent} cannot be read: {one_line(error)}") from error
