"""A directory in Hugging Face layout: which of its files hold the weights, and what their headers say.

No weight is read, but for the two tables of a model that config.json ties while its files hold another
head: the files are right.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from griffin_offload.blocks.layouts import build_on_meta, left_out_parts
from griffin_offload.checkpoint.base import Checkpoint, StoredTensor
from griffin_offload.checkpoint.config_files import (
    check_numbers,
    load_config,
    read_object,
    refuse_what_is_no_checkpoint,
)
from griffin_offload.checkpoint.direct_io import Extent
from griffin_offload.checkpoint.files import FileState, check_content, states_of
from griffin_offload.checkpoint.mapped import FileMaps
from griffin_offload.checkpoint.renaming import names_left_out
from griffin_offload.errors import CheckpointError, limit_reached, memory_refused, one_line

INDEX = "model.safetensors.index.json"
FLOAT_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""Stored precisions that are loaded as they are, by the headers' words for them."""
DTYPES = FLOAT_TYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "BOOL": torch.bool,
}
# Lies in a directory that convert has not finished.
UNFINISHED = ".converting.json"
# One key: safetensors writes several in no fixed order, and equal conversions are equal byte for byte.
METADATA_KEY = "griffin_offload"
SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# The largest open models have 10 MB of them.
_MOST_INDEX_BYTES = 100_000_000

Header = dict[str, tuple[str, int]]
"""Stored precision and bytes of each tensor."""


def weight_files(directory: Path) -> tuple[list[Path], Collection[str]]:
    """The files that transformers will load: the single one, or those of the index; and the tensors that the index
    promises. CheckpointError where there are none."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE], ()
    if (directory / INDEX).is_file():
        return _indexed_files(directory)
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} has only pickled weights ({pickles[0]}): they can run code, convert them to safetensors"
        )
    raise CheckpointError(f"{directory} has no {SINGLE} and no {INDEX}")


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
            if os.path.islink(path):
                check_content(path)
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
    return int(math.prod(part.get_shape())) * _item_bytes(part.get_dtype())


def _item_bytes(dtype: str) -> int:
    """Of a number of this stored precision; packed ones are told apart where they are read."""
    item = FLOAT_TYPES.get(dtype)
    return 1 if item is None else item.itemsize


# The checkpoint.


@dataclass(frozen=True)
class SafetensorsCheckpoint(Checkpoint):
    """A directory whose files are whole and whose config transformers knows."""

    directory: Path
    config: PretrainedConfig
    dtype: torch.dtype
    files: tuple[Path, ...]
    weight_bytes: int
    states: Mapping[str, FileState] = field(default_factory=dict, compare=False)
    untied: bool = False

    def tensors(self) -> Mapping[str, StoredTensor]:
        return {name: tensor for path in self.files for name, tensor in stored_tensors(path).items()}


def open_safetensors(path: Path) -> Checkpoint | None:
    """The checkpoint in the directory `path`; None where that is a file. Errors: CheckpointError, UnsupportedModel."""
    if not path.is_dir():
        return None
    config = directory_config(path)
    checked = check_files(path, config, None)
    stored = checked.most_bytes(set(checked.sizes))
    check_numbers(path, None if stored in FLOAT_TYPES else stored)
    dtype = FLOAT_TYPES[stored]
    untied = untie_other_head(config, dtype, checked.headers)
    return SafetensorsCheckpoint(path, config, dtype, checked.files, checked.weight_bytes, checked.states, untied)


def directory_config(directory: Path) -> PretrainedConfig:
    """The config of a checkpoint's directory, which is a finished one."""
    note = directory / UNFINISHED
    if note.is_file():
        kind, command = ("export", "export") if b'"export"' in note.read_bytes() else ("conversion", "convert")
        raise CheckpointError(f"{directory} is an unfinished {kind}: run the same {command} command again")
    if not (directory / "config.json").is_file():
        refuse_what_is_no_checkpoint(directory)
        raise CheckpointError(f"{directory} has no config.json: name a checkpoint's directory, or a GGUF file")
    return load_config(directory / "config.json")


@dataclass(frozen=True)
class CheckedFiles:
    """Files of weights, whole and of one checkpoint."""

    headers: dict[Path, Header]
    states: Mapping[str, FileState]
    sizes: Counter[str]
    """Bytes of the language model by stored precision."""

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self.headers)

    @property
    def weight_bytes(self) -> int:
        return sum(size_bytes for header in self.headers.values() for _, size_bytes in header.values())

    def most_bytes(self, kinds: Collection[str]) -> str:
        """Of `kinds`, the stored precision that most bytes have."""
        found = {name: size_bytes for name, size_bytes in self.sizes.items() if name in kinds}
        return max(found, key=lambda name: found[name], default="no floats")


def check_files(directory: Path, config: PretrainedConfig, mark: str | None) -> CheckedFiles:
    """The weights in `directory`, each of whose files has `mark` in its metadata (None: no such mark)."""
    files, promised = weight_files(directory)
    states = _states(files)
    headers = read_headers(directory, files, promised)
    if not any(headers.values()):
        raise CheckpointError(f"{directory} holds no tensors")
    sizes = _bytes_by_dtype(config, headers.values())
    for path in headers:
        check_mark(path, mark)
    return CheckedFiles(headers, states, sizes)


def check_mark(path: Path, mark: str | None) -> None:
    """CheckpointError unless the file belongs to the conversion whose `mark` this is, or to none for None."""
    try:
        with safe_open(path, framework="np") as file:
            found = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        if memory_refused(error):
            raise
        raise CheckpointError(f"{path} was changed while it was read: {one_line(error)}") from error
    if mark is None and found is not None:
        raise CheckpointError(f"{path} was converted, config.json has lost its quantization_config: convert again")
    if found != mark:
        raise CheckpointError(f"{path} belongs to another conversion than config.json: shards are mixed, convert again")


def _states(files: list[Path]) -> dict[str, FileState]:
    try:
        return states_of(str(path.resolve()) for path in files)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise CheckpointError(f"{files[0].parent} cannot be read: {one_line(error)}") from error


def _bytes_by_dtype(config: PretrainedConfig, headers: Iterable[Header]) -> Counter[str]:
    """Of the language model: a tower may outweigh it, in another precision."""
    sees = config.get_text_config() is not config
    headers, left_out = list(headers), set[str]()
    if sees:
        names = [name for header in headers for name in header]
        model = build_on_meta(config, torch.bfloat16)
        left_out = names_left_out(model, config, names, left_out_parts(model))
    sizes: Counter[str] = Counter()
    for header in headers:
        for name, (dtype, size_bytes) in header.items():
            if name not in left_out:
                sizes[dtype] += size_bytes
    return sizes


# Where the tensors of one file lie, which its header alone knows.


_LENGTH_BYTES = 8


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file that `read_header` has found whole. CheckpointError for one that it was not."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(length))
        start = _LENGTH_BYTES + length
        return {name: _stored(path, start, name, part) for name, part in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if memory_refused(error):
            raise
        raise CheckpointError(f"{path} was changed while it was loaded: {one_line(error)}") from error


def _stored(path: Path, start: int, name: str, part: Any) -> StoredTensor:
    begin, end = part["data_offsets"]
    shape, dtype = tuple(part["shape"]), DTYPES.get(part["dtype"])
    if dtype is None or math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{name} has the type {part['dtype']}, the shape {shape} and {end - begin} bytes")
    return StoredTensor(shape, dtype, (Extent(str(path), start + begin, end - begin),))


def map_file(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file by its name, a view of the mapped file, not to be written to. CheckpointError for a file
    that is no longer what it was."""
    maps = FileMaps()
    return {name: stored.tensor(maps) for name, stored in stored_tensors(path).items()}


# Of each table as much is compared at once.
_PIECE_BYTES = 16 * 2**20


def untie_other_head(
    config: PretrainedConfig, dtype: torch.dtype, headers: Mapping[Path, Mapping[str, object]]
) -> bool:
    """Whether `config` ties the head to the embeddings and the files hold another head, which `config` then says.

    Reads both tables, up to the first difference, where the files hold two; nothing elsewhere."""
    text = config.get_text_config()
    if not (getattr(config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False)):
        return False
    if not _may_hold_two_tables(getattr(text, "vocab_size", 1), headers):
        return False
    model = build_on_meta(config, dtype)
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


def _may_hold_two_tables(words: int, headers: Mapping[Path, Mapping[str, Any]]) -> bool:
    """Whether two weights outside of the layers have as many numbers as there are `words`, or more, or none at all.
    Without them no model has to be built to learn what they are called."""
    weights = [(re.sub(r"\d+", "#", name), *part) for header in headers.values() for name, part in header.items()]
    places = Counter(place for place, _, _ in weights)
    tables = [
        place
        for place, dtype, size in weights
        if places[place] == 1 and place.endswith(".weight") and not 0 < size < words * _item_bytes(dtype)
    ]
    return len(tables) > 1


def said_untied(raw: dict[str, object]) -> dict[str, Any]:
    """The text of a config.json, saying that the head is not tied."""
    inner = {key: said_untied(value) for key, value in raw.items() if key == "text_config" and isinstance(value, dict)}
    return raw | inner | {"tie_word_embeddings": False}


_Place = tuple[Path, str]


def _place(name: str, headers: Mapping[Path, Mapping[str, object]]) -> _Place | None:
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
