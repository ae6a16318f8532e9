"""Which files of a directory hold the weights, and what their headers say; no weight is read."""

import math
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from griffin_offload.blocks.layouts import find_feed_forwards
from griffin_offload.blocks.sizes import build_on_meta
from griffin_offload.blocks.towers import left_out_parts
from griffin_offload.checkpoint.config_files import read_object
from griffin_offload.checkpoint.files import check_content
from griffin_offload.checkpoint.unsupported import refuse_gguf_in
from griffin_offload.errors import CheckpointError, limit_reached, memory_refused, one_line

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


# Files of several precisions: what is not of the model's own is converted by loading, and rests in memory then.


_IN_LAYER = re.compile(r"(?:^|\.)(\d+)\.(.+)$")


@dataclass(frozen=True)
class ConvertedSizes:
    """Bytes that loading makes of other precisions, in the model's."""

    feed_forward: tuple[int, ...]
    """Of each layer: they are streamed from there, as long as the model lives."""
    embeddings: int
    rest: int
    """Gone when the residents are there."""


def converted_tensors(headers: Iterable[Header], dtype: torch.dtype) -> dict[str, int]:
    """Name and bytes, in `dtype`, of every tensor of floats that is stored in another one."""
    return {
        name: size_bytes // DTYPES[stored].itemsize * dtype.itemsize
        for header in headers
        for name, (stored, size_bytes) in header.items()
        if stored in DTYPES and DTYPES[stored] != dtype
    }


def converted_sizes(model: Any, tensors: dict[str, int]) -> ConvertedSizes:
    """What `tensors` (`converted_tensors`) are in `model`. A name that no other part has counts as feed-forward."""
    decoder, blocks = find_feed_forwards(model, model.config.get_text_config().num_hidden_layers)
    feed_forward, embeddings, rest = [0] * len(blocks), 0, 0
    others = [_names_outside_ff(layer, block) for layer, block in zip(decoder, blocks, strict=True)]
    table = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    left_out = left_out_parts(model)
    for name, size_bytes in tensors.items():
        if left_out & set(name.split(".")):
            continue  # given up before anything else is allocated
        match = _IN_LAYER.search(name)
        index = int(match[1]) if match else len(blocks)
        if match and index < len(blocks) and match[2] not in others[index]:
            feed_forward[index] += size_bytes
        elif name.split(".")[-2:-1] == table.split(".")[-1:]:
            embeddings += size_bytes
        else:
            rest += size_bytes
    return ConvertedSizes(tuple(feed_forward), embeddings, rest)


def _names_outside_ff(layer: Any, block: Any) -> set[str]:
    inside = {id(tensor) for linear in block.linears for tensor in linear.parameters(recurse=False)}
    return {name for name, tensor in layer.named_parameters() if id(tensor) not in inside}


# A head that config.json ties to the embeddings while the files hold another one: the files are right.


# Of each table as much is compared at once.
_PIECE_BYTES = 16 * 2**20


def untie_other_head(config: PretrainedConfig, dtype: torch.dtype, headers: dict[Path, Header]) -> bool:
    """Whether `config` ties the head to the embeddings and the files hold another head, which `config` then says.

    Reads both tables, up to the first difference, where the files hold two; nothing elsewhere."""
    text = config.get_text_config()
    if not (getattr(config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False)):
        return False
    model: Any = build_on_meta(config, dtype)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    names = {id(module): name for name, module in model.named_modules()}
    here, there = (_place(f"{names[id(module)]}.weight", headers) for module in (head, embedding))
    if here is None or there is None or _equal(here, there, dtype):
        return False
    for found in (config, text):
        found.tie_word_embeddings = False
    return True


def said_untied(raw: dict[str, Any]) -> dict[str, Any]:
    """The text of a config.json, saying that the head is not tied."""
    inner = {key: said_untied(value) for key, value in raw.items() if key == "text_config" and isinstance(value, dict)}
    return raw | inner | {"tie_word_embeddings": False}


_Place = tuple[Path, str]


def _place(name: str, headers: dict[Path, Header]) -> _Place | None:
    """The file that holds the parameter, which may have other names in front there; and its name in it."""
    tail = ".".join(name.split(".")[-2:])
    found = [
        (key != name, len(key), path, key)
        for path, header in headers.items()
        for key in header
        if key == tail or key.endswith(f".{tail}")
    ]
    return min(found)[2:] if found else None


def _equal(head: _Place, embedding: _Place, dtype: torch.dtype) -> bool:
    try:
        with safe_open(head[0], framework="pt") as one, safe_open(embedding[0], framework="pt") as other:
            tables = one.get_slice(head[1]), other.get_slice(embedding[1])
            shapes = [tuple(table.get_shape()) for table in tables]
            if shapes[0] != shapes[1] or len(shapes[0]) != 2 or 0 in shapes[0]:
                return False  # no head of this model: loading says so
            return all(torch.equal(a.to(dtype), b.to(dtype)) for a, b in zip(*map(_pieces, tables), strict=True))
    except (SafetensorError, OSError, RuntimeError) as error:
        if memory_refused(error):
            raise
        raise CheckpointError(f"{head[0]} cannot be read: {one_line(error)}") from error


def _pieces(table: Any) -> Iterator[Tensor]:
    rows, width = table.get_shape()
    step = max(_PIECE_BYTES // (8 * width), 1)
    for at in range(0, rows, step):
        yield table[at : at + step]
