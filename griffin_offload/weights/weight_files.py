"""Which files of a directory hold the weights, and what their headers say; no weight is read."""

import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from griffin_offload.errors import CheckpointError, limit_reached, memory_refused, one_line
from griffin_offload.weights.files import check_content
from griffin_offload.weights.foreign import refuse_gguf_in
from griffin_offload.weights.json_file import read_object

INDEX = "model.safetensors.index.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""Stored precisions that are loaded as they are."""
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# The largest open models have 10 MB of them.
_MOST_INDEX_BYTES = 100_000_000

Header = dict[str, tuple[str, int]]
"""Stored precision and bytes of each tensor."""


def weight_files(directory: Path) -> tuple[list[Path], Collection[str]]:
    """The files that transformers will load: the single one, or those of the index; and the tensors that the index
    promises. CheckpointError where there are none."""
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE], ()
    if (directory / INDEX).is_file():
        return _indexed_files(directory)
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} has only pickled weights ({pickles[0]}): they can run code, convert them to safetensors"
        )
    refuse_gguf_in(directory)
    raise CheckpointError(f"{directory} has no {_SINGLE} and no {INDEX}")


def read_headers(directory: Path, files: list[Path], promised: Collection[str]) -> dict[Path, Header]:
    """The header of every one of `files`; CheckpointError for a damaged one, or where a promised tensor is in none."""
    headers = {path: read_header(path) for path in files}
    lacking = sorted(set(promised) - {name for header in headers.values() for name in header})
    if lacking:
        raise CheckpointError(f"{directory}: the index promises {lacking[0]}, no shard holds it")
    return headers


def _indexed_files(directory: Path) -> tuple[list[Path], Collection[str]]:
    weight_map = read_object(directory / INDEX, _MOST_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{directory / INDEX} cannot be read: its weight_map has to name a file for each tensor")
    return _files_of(directory, set(weight_map.values())), weight_map


def _files_of(directory: Path, names: set[str]) -> list[Path]:
    files = [directory / name for name in sorted(names)]
    for path in files:
        if path.parent != directory:
            raise CheckpointError(f"{directory / INDEX} names {path}, outside of the checkpoint")
        if not os.path.isfile(path):  # unlike Path's own, it takes any name
            raise CheckpointError(f"{path} is named by the index but absent: download it again")
    return files


def read_header(path: Path) -> Header:
    """Of one file; the library checks it against size and offsets. CheckpointError for a damaged one."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return {name: (part.get_dtype(), _tensor_bytes(part)) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        if memory_refused(error):
            raise
        if limit_reached(error) is not None:
            raise CheckpointError(f"{path} cannot be read: {limit_reached(error)}") from error
        if os.path.exists(path):
            check_content(path)  # the library calls a file that may not be read absent, or damaged
        size = f"{path.stat().st_size} bytes" if path.is_file() else "gone"
        raise CheckpointError(
            f"{path} ({size}) is truncated or damaged, download it again: {one_line(error)}"
        ) from error


def _tensor_bytes(part: Any) -> int:
    item = DTYPES.get(part.get_dtype())
    return int(math.prod(part.get_shape())) * (item.itemsize if item is not None else 1)
