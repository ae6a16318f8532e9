"""Which files are mapped into this process, and where: /proc/self/maps."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

_DELETED = " (deleted)"
_NO_FILES = ("/dev/", "/memfd:", "/SYSV", "/anon_hugepage")


@dataclass(frozen=True)
class Mapping:
    """Addresses that belong to a file, from its byte `offset` on."""

    start: int
    end: int
    offset: int
    path: str
    """Where the file is, or was when it was mapped; empty for memory without a file."""
    deleted: bool = False
    """No name leads to the mapped file any more: it was deleted, or another one took its place."""


def file_mappings() -> list[Mapping]:
    """The files mapped into this process; empty if not Linux."""
    return [mapping for fields in _lines() if (mapping := _mapping(fields)).path]


def mapping_at(address: int) -> Mapping | None:
    """What is mapped around `address`."""
    for fields in _lines():
        start, end = _bounds(fields)
        if start <= address < end:
            return _mapping(fields)
    return None


def _lines() -> list[list[bytes]]:
    maps = Path("/proc/self/maps")
    if not sys.platform.startswith("linux") or not maps.is_file():
        return []
    # Bytes: a name need not be UTF-8, and may hold what str.splitlines takes for the end of a line.
    return [line.split(maxsplit=5) for line in maps.read_bytes().split(b"\n") if line]


def _bounds(fields: list[bytes]) -> tuple[int, int]:
    start, end = fields[0].split(b"-")
    return int(start, 16), int(end, 16)


def _mapping(fields: list[bytes]) -> Mapping:
    path, deleted = _path(os.fsdecode(fields[5])) if len(fields) == 6 else ("", False)
    return Mapping(*_bounds(fields), int(fields[2], 16), path, deleted)


def _path(name: str) -> tuple[str, bool]:
    """The file that `name` means, and whether it has no name any more; ("", False) for memory that is no file's."""
    if not name.startswith("/") or name.startswith(_NO_FILES):
        return "", False
    # The kernel writes a newline as \012, and a backslash as it is: what exists decides.
    plain = name.replace("\\012", "\n")
    for path in (name, plain):
        # Not by its end: in the hub's cache a shard is a link to a file that is called by its hash.
        if os.path.isfile(path):
            return path, False
    return (plain.removesuffix(_DELETED), True) if plain.endswith(_DELETED) else ("", False)
