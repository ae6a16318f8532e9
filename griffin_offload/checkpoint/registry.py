"""Where a checkpoint is found, and which kind it is: each is asked in turn."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from griffin_offload.checkpoint.adapter import with_adapter
from griffin_offload.checkpoint.base import Checkpoint
from griffin_offload.checkpoint.config_files import load_config
from griffin_offload.checkpoint.converted import ConvertedCheckpoint, mark_of, open_converted
from griffin_offload.checkpoint.files import check_name, unreadable
from griffin_offload.checkpoint.gguf import open_gguf
from griffin_offload.checkpoint.hub import fetch
from griffin_offload.checkpoint.quantised import open_quantised, read_quantised_config
from griffin_offload.checkpoint.safetensors import SafetensorsCheckpoint, open_safetensors
from griffin_offload.errors import CheckpointError, ModelNotFound, UsageError
from griffin_offload.formats import get

_WHAT_IS_A_MODEL = "give a checkpoint directory, a GGUF file or a hub id such as org/name (or org/name:FILE.gguf)"
Opener = Callable[[Path], Checkpoint | None]
"""Opens the file or directory if it is of its kind; None if it is not. Errors: CheckpointError, UnsupportedModel."""
_KINDS: list[Opener] = [open_converted, open_gguf, open_quantised, open_safetensors]


def register_kind(opener: Opener) -> None:
    """Have `opener` asked before all others from now on."""
    if opener not in _KINDS:
        _KINDS.insert(0, opener)


def forget_kind(opener: Opener) -> None:
    """Undo `register_kind`."""
    _KINDS.remove(opener)


def open_checkpoint(model: str | Path, *, offline: bool = False, adapter: str | Path | None = None) -> Checkpoint:
    """Find the file, directory or hub id `model` and check its headers; the LoRA `adapter`, a directory or hub id, is
    merged into it. Errors: UsageError, ModelNotFound, CheckpointError, UnsupportedModel. No weight is read."""
    found = _opened(model, locate(model, offline=offline))
    return found if adapter is None else with_adapter(found, locate(adapter, offline=offline))


def _opened(model: str | Path, path: Path) -> Checkpoint:
    if path.is_dir():
        _check_readable(path)
    for kind in _KINDS:
        found = kind(path)
        if found is not None:
            return found
    raise ModelNotFound(f"{model} is a file, and no GGUF file: give the checkpoint's directory")


def _check_readable(directory: Path) -> None:
    """CheckpointError for a directory whose files nobody but another user may list or open."""
    try:
        os.listdir(directory)
        (directory / "config.json").is_file()
    except OSError as error:
        raise CheckpointError(unreadable(directory, error)) from error


def read_config(path: str | Path) -> Checkpoint:
    """A checkpoint of which only config.json is known, `path` being that file: enough to plan with."""
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise ModelNotFound(f"no file {file}: give a config.json")
    config = load_config(file)
    mark = mark_of(config, file.parent)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    if mark is None:
        quantised = read_quantised_config(file, config, dtype)
        if quantised is not None:
            return quantised
        return SafetensorsCheckpoint(file.parent, config, dtype, (), 0)
    return ConvertedCheckpoint(
        file.parent, config, dtype, (), 0, precision=get(mark.precision), tables=get(mark.tables)
    )


def locate(model: str | Path, *, offline: bool = False, **hub: Any) -> Path:
    """The path of `model`, fetched from the hub if need be; `hub` are more arguments of its client (revision,
    cache_dir, token). Errors: UsageError, ModelNotFound."""
    model = str(model)
    if not model:
        raise ModelNotFound(f"the model's name is empty: {_WHAT_IS_A_MODEL}")
    path = Path(os.path.expanduser(model))  # unlike Path's own, it leaves an unknown ~user as it is
    check_name(path)
    try:
        there = path.exists()
    except OSError as error:  # a folder on the way may not be entered, or a prompt stands in the name's place
        raise ModelNotFound(f"{model[:80]!r} cannot be looked at: {error.strerror}") from error
    if there:
        if hub.get("revision") not in (None, "main"):  # a token and a cache are for what has to be fetched
            raise UsageError(
                f"revision is {hub['revision']!r}, and {model} is a directory, which has none: leave it out"
            )
        return path
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ModelNotFound(f"no directory or file {model}: {_WHAT_IS_A_MODEL}")
    return fetch(model, offline=offline, **hub)
