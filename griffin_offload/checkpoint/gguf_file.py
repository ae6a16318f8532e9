"""The header of a GGUF file (llama.cpp), read without believing it: counts and lengths are bounded before use.

The package gguf has a reader, too; it takes 16 s for a vocabulary of 262,144 words, and counts that a hostile file
makes up cost it the machine. What is read here, and where it lies, is what the specification says
(github.com/ggml-org/ggml, docs/gguf.md).
"""

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from griffin_offload.checkpoint.direct_io import Extent
from griffin_offload.checkpoint.files import check_content
from griffin_offload.errors import CheckpointError, UnsupportedModel, memory_refused, one_line

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_TEXT, _ARRAY = 8, 9
# Far above any file there is. Of 262,144 words and as many merges a header has 1.1 million elements and 10 MB.
_MOST_KEYS, _MOST_TENSORS, _MOST_ELEMENTS = 2**16, 2**17, 2**23
_MOST_NAME_BYTES, _MOST_TEXT_BYTES, _MOST_HEADER_BYTES = 2**16, 2**24, 2**27
_MOST_AXES, _MOST_NUMBERS = 4, 2**48


@dataclass(frozen=True)
class TextArray:
    """Many texts in a header, passed over: a vocabulary. `GgufFile.texts` reads them."""

    offset: int
    count: int


@dataclass(frozen=True)
class BlockType:
    """How numbers lie in a file: so many in a block, so many bytes for it."""

    id: int
    name: str
    numbers: int
    nbytes: int


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    """As torch has it: the last axis is the one whose numbers lie beside each other."""
    type: BlockType
    extent: Extent


@dataclass(frozen=True)
class GgufFile:
    """What the header of one file says."""

    path: Path
    metadata: dict[str, Any]
    """Numbers, truth values, texts; arrays of numbers from numpy; `TextArray`s."""
    tensors: dict[str, GgufTensor]
    header_bytes: int
    """Up to where the tensors begin."""

    def texts(self, key: str) -> list[str]:
        """The texts of an array; none where the file has no such array. CheckpointError for damage."""
        found = self.metadata.get(key)
        if not isinstance(found, TextArray):
            return []
        with _reading(self.path) as cursor:
            cursor.seek(found.offset)
            return [cursor.text(key) for _ in range(found.count)]

    def header(self) -> bytes:
        """The bytes that everything here was read from."""
        with self.path.open("rb") as file:
            return file.read(self.header_bytes)


def is_gguf(path: Path) -> bool:
    """Whether the file begins as such files do."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path, types: dict[int, BlockType]) -> GgufFile:
    """The header of `path`, whose tensors are of `types`. CheckpointError for a damaged file, UnsupportedModel for a
    type or a version that is not read."""
    check_content(path)
    with _reading(path) as cursor:
        tensor_count, key_count = cursor.counts()
        metadata = {key: value for key, value in cursor.entries(key_count)}  # noqa: C416 - it is checked on the way
        infos = cursor.tensor_infos(tensor_count)
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= 2**16 or alignment & (alignment - 1):
            raise cursor.damaged(f"general.alignment is {alignment!r}: it has to be a power of two from 8 to 65536")
        start = -(-cursor.position // alignment) * alignment
        tensors = {info.name: _placed(cursor, info, types, start, alignment) for info in infos}
        _check_apart(cursor, list(tensors.values()))
        return GgufFile(path, metadata, tensors, min(start, cursor.nbytes))


@dataclass(frozen=True)
class _Info:
    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


def _placed(cursor: "_Cursor", info: _Info, types: dict[int, BlockType], start: int, alignment: int) -> GgufTensor:
    kind = types.get(info.type)
    if kind is None:
        raise UnsupportedModel(
            f"{cursor.path}: {info.name} has the block type {info.type}, which the package gguf cannot read: "
            "pip install -U gguf, or take another quantisation of the model"
        )
    row = info.shape[-1]
    if row % kind.numbers:
        raise cursor.damaged(f"{info.name} has rows of {row}, {kind.name} has blocks of {kind.numbers}")
    nbytes = math.prod(info.shape) // kind.numbers * kind.nbytes
    if info.offset % alignment:
        raise cursor.damaged(f"{info.name} begins at byte {info.offset}, which is no multiple of {alignment}")
    if start + info.offset + nbytes > cursor.nbytes:
        raise CheckpointError(
            f"{cursor.path} ({cursor.nbytes} bytes) is truncated, download it again: {info.name} ends at byte "
            f"{start + info.offset + nbytes}"
        )
    return GgufTensor(info.name, info.shape, kind, Extent(str(cursor.path.resolve()), start + info.offset, nbytes))


def _check_apart(cursor: "_Cursor", tensors: list[GgufTensor]) -> None:
    """CheckpointError where tensors share bytes: a small file could describe any number of weights."""
    ordered = sorted(tensors, key=lambda tensor: tensor.extent.offset)
    for one, other in pairwise(ordered):
        if one.extent.offset + one.extent.nbytes > other.extent.offset:
            raise cursor.damaged(f"{one.name} and {other.name} share bytes")


class _reading:  # noqa: N801 - used as a function
    """Opens a file for a `_Cursor`; what goes wrong inside becomes a CheckpointError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> "_Cursor":
        try:
            self._file = self._path.open("rb", buffering=2**20)
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be read: {one_line(error)}") from error
        return _Cursor(self._path, self._file, os.fstat(self._file.fileno()).st_size)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._file.close()
        if isinstance(error, OSError | ValueError | struct.error) and not memory_refused(error):
            raise CheckpointError(f"{self._path} cannot be read: {one_line(error)}") from error


class _Cursor:
    """A place in a header, moving on as things are read."""

    def __init__(self, path: Path, file: BinaryIO, nbytes: int) -> None:
        self.path, self.nbytes, self.position = path, nbytes, 0
        self._file = file
        self._elements = 0

    def damaged(self, words: str) -> CheckpointError:
        return CheckpointError(f"{self.path} ({self.nbytes} bytes) is damaged, download it again: {words}")

    def seek(self, offset: int) -> None:
        self._file.seek(offset)
        self.position = offset

    def counts(self) -> tuple[int, int]:
        """(tensors, keys), checked."""
        magic, version = self.take(4), self.take(4)
        if magic != MAGIC:
            raise CheckpointError(f"{self.path} is no GGUF file")
        number = int.from_bytes(version, "little")
        if number not in _VERSIONS:
            big = int.from_bytes(version, "big") in _VERSIONS
            words = "is written for big-endian machines" if big else f"is of version {number}"
            raise UnsupportedModel(f"{self.path} {words}: GGUF versions 2 and 3, little-endian, are read")
        tensors, keys = self.integer("<Q"), self.integer("<Q")
        if tensors > _MOST_TENSORS or keys > _MOST_KEYS:
            raise self.damaged(f"it promises {tensors} tensors and {keys} keys")
        return tensors, keys

    def entries(self, count: int) -> Iterator[tuple[str, Any]]:
        seen: set[str] = set()
        for _ in range(count):
            key = self.text("a key", _MOST_NAME_BYTES)
            if key in seen:
                raise self.damaged(f"the key {key[:60]!r} is there twice")
            seen.add(key)
            yield key, self._value(key, self.integer("<I"))

    def tensor_infos(self, count: int) -> list[_Info]:
        found: dict[str, _Info] = {}
        for _ in range(count):
            name = self.text("a tensor's name", _MOST_NAME_BYTES)
            axes = self.integer("<I")
            if not 1 <= axes <= _MOST_AXES or name in found:
                raise self.damaged(
                    f"{name[:60]!r} has {axes} axes" if name not in found else f"{name!r} is there twice"
                )
            shape = tuple(reversed([self.integer("<Q") for _ in range(axes)]))
            if min(shape) < 1 or max(shape) > _MOST_NUMBERS or math.prod(shape) > _MOST_NUMBERS:
                raise self.damaged(f"{name[:60]!r} has the shape {list(shape)}")
            found[name] = _Info(name, shape, self.integer("<I"), self.integer("<Q"))
        return list(found.values())

    def integer(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def text(self, what: str, most: int = _MOST_TEXT_BYTES) -> str:
        return self.take(self._length(what, most)).decode("utf-8", errors="replace")

    def take(self, nbytes: int) -> bytes:
        self._check(nbytes)
        found = self._file.read(nbytes)
        if len(found) != nbytes:
            raise self.damaged("it ends in its header")
        self.position += nbytes
        return found

    def _check(self, nbytes: int) -> None:
        if self.position + nbytes > self.nbytes:
            raise self.damaged(f"its header goes on to byte {self.position + nbytes}")
        if self.position + nbytes > _MOST_HEADER_BYTES:
            raise self.damaged(f"its header is larger than {_MOST_HEADER_BYTES} bytes")

    def _length(self, what: str, most: int) -> int:
        length = self.integer("<Q")
        if length > most:
            raise self.damaged(f"{what[:60]} is a text of {length} bytes")
        return length

    def _value(self, key: str, kind: int) -> Any:
        if kind == _TEXT:
            return self.text(key)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _NUMBERS:
            raise self.damaged(f"{key[:60]!r} is a value of type {kind}")
        return self._numbers(kind, 1)[0].item()

    def _array(self, key: str) -> Any:
        kind, count = self.integer("<I"), self.integer("<Q")
        self._elements += count
        if self._elements > _MOST_ELEMENTS:
            raise self.damaged(f"{key[:60]!r} has {count} elements")
        if kind in _NUMBERS:
            return self._numbers(kind, count)
        if kind != _TEXT:
            raise self.damaged(f"{key[:60]!r} is an array of type {kind}")
        found = TextArray(self.position, count)
        for _ in range(count):
            length = self._length(key, _MOST_TEXT_BYTES)
            self._check(length)
            self.seek(self.position + length)
        return found

    def _numbers(self, kind: int, count: int) -> Any:
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype=dtype)
