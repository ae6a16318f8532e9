"""Damaged bytes, damaged JSON and damaged safetensors files, by a seeded generator."""

import copy
import json
import random
import struct
from collections.abc import Sequence
from typing import Any

# Values that a parser may not expect; where JSON has no word for one, it is a Raw.
NUMBERS: list[Any] = [0, -1, 1, 2, 7, 0.5, -0.0, 255, 10**6, 10**9, 2**31, 2**32, 2**63, 2**64, 10**30, -(2**63), 1e308]
TEXTS: list[Any] = ["", "a", "0", "\0", "\ud800", "\u202e", "\x1b[2J", "é" * 40, "x" * 5000, "None", "__class__"]
NAMES: list[Any] = ["../outside/config.json", "/etc/passwd", "..", ".", "a/b", "model.safetensors", "x" * 300, "a\0b"]
VALUES: list[Any] = [*NUMBERS, *TEXTS, *NAMES, None, True, False, [], {}, [[]], [1, 2], {"a": 1}, [None] * 50]


class Raw(str):
    """Text that takes the place of a JSON value as it is."""


RAW = [
    Raw(t) for t in ("1e400", "-1e400", "NaN", "Infinity", "9" * 5000, "[" * 5000, '{"a":' * 3000, "01", "tru", "'a'")
]
_PIECES = [b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"[" * 3000, b'"', b"{", b"}", b",", b"1e999", b"\\ud800"]


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value inside."""
    found = [path] if path else []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += paths(child, (*path, key))
    return found


def any_value(generator: random.Random, others: Sequence[Any] = ()) -> Any:
    """A hostile value, or one of `others`."""
    if others and generator.random() < 0.4:
        return copy.deepcopy(generator.choice(others))
    return copy.deepcopy(generator.choice(RAW if generator.random() < 0.1 else VALUES))


def damaged_value(generator: random.Random, value: Any, others: Sequence[Any] = ()) -> Any:
    """`value`, changed a little or replaced."""
    if isinstance(value, int | float) and not isinstance(value, bool) and generator.random() < 0.5:
        return generator.choice(
            [value + 1, value - 1, -value, value * 2, value * 10**6, value / 3, str(value), [value]]
        )
    if isinstance(value, str) and generator.random() < 0.3:
        return generator.choice([value + "x", value[:-1], value.upper(), value * 300, [value], {value: value}])
    return any_value(generator, others)


def damaged_json(generator: random.Random, value: Any, others: Sequence[Any] = ()) -> Any:
    """A copy of which one to three values are changed, removed, moved or added to."""
    value = copy.deepcopy(value)
    for _ in range(generator.choice((1, 1, 2, 3))):
        places = paths(value)
        if not places or generator.random() < 0.02:
            return any_value(generator, others)
        *parents, last = generator.choice(places)
        holder = value
        for key in parents:
            holder = holder[key]
        kind = generator.random()
        if kind < 0.12:
            del holder[last]
        elif kind < 0.2 and isinstance(holder, dict):
            holder[generator.choice([*TEXTS, *NAMES])] = holder[last]
        elif kind < 0.28:
            other = value
            for key in generator.choice(places):
                other = other[key]
            holder[last] = copy.deepcopy(other)
        else:
            holder[last] = damaged_value(generator, holder[last], others)
    return value


def damaged_part(generator: random.Random, value: Any, others: Sequence[Any] = ()) -> Any:
    """As `damaged_json`, of a value that may be no container."""
    damaged = damaged_json(generator, [value], others)
    return damaged[0] if isinstance(damaged, list) and damaged else damaged


def as_bytes(generator: random.Random, value: Any) -> bytes:
    """JSON, mostly; sometimes with a key twice, in another encoding, or with its bytes damaged."""
    raws: list[str] = []

    def marked(item: Any) -> Any:
        if isinstance(item, Raw):
            raws.append(item)
            return f"@raw{len(raws) - 1}@"
        if isinstance(item, dict):
            return {str(key): marked(child) for key, child in item.items()}
        return [marked(child) for child in item] if isinstance(item, list) else item

    text = json.dumps(marked(value))
    for number, raw in enumerate(raws):
        text = text.replace(f'"@raw{number}@"', raw)
    if isinstance(value, dict) and value and generator.random() < 0.05:
        key = generator.choice(list(value))
        text = f"{text[:-1]}, {json.dumps(str(key))}: {json.dumps(any_value(generator))}}}"
    if generator.random() < 0.03:
        return text.encode(generator.choice(("utf-16", "utf-32", "utf-8-sig")), "replace")
    raw_bytes = text.encode()
    return damaged_bytes(generator, raw_bytes) if generator.random() < 0.15 else raw_bytes


def damaged_bytes(generator: random.Random, content: bytes) -> bytes:
    """Cut short, or with one to five bytes changed, removed, or something put between them."""
    if generator.random() < 0.2:
        return content[: generator.randrange(len(content) + 1)]
    damaged = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 5))):
        at = generator.randrange(len(damaged) + 1)
        kind = generator.random()
        if kind < 0.5 and at < len(damaged):
            damaged[at] = generator.randrange(256)
        elif kind < 0.7:
            del damaged[at : at + generator.choice((1, 1, 8, 100))]
        else:
            damaged[at:at] = generator.choice(_PIECES)
    return bytes(damaged)


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def damaged_safetensors(generator: random.Random, content: bytes) -> bytes:
    """A file whose header is damaged; sometimes its length, its data or any byte."""
    kind = generator.random()
    if kind < 0.1:
        return damaged_bytes(generator, content)
    header, data = split_safetensors(content)
    if kind < 0.2:
        raw = as_bytes(generator, header)
        length = generator.choice([0, 1, len(raw) - 1, len(raw) + 1, 10**8, 2**31, 2**40, 2**63, 2**64 - 1])
        return struct.pack("<Q", length) + raw + data
    if kind < 0.4:
        _damage_entry(generator, header)
    else:
        header = damaged_json(generator, header, ["F64", "I8", "U8", "F4", "BOOL", [0], [10**15, 10**15]])
    raw = as_bytes(generator, header)
    return struct.pack("<Q", len(raw)) + raw + (data if generator.random() < 0.9 else data[:-7])


def _damage_entry(generator: random.Random, header: dict[str, Any]) -> None:
    """Offsets and shapes that are wrong in the ways that matter."""
    name = generator.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    begin, end = entry["data_offsets"]
    item = (end - begin) // max(1, len(entry["shape"]) and _count(entry["shape"]))
    huge = [2**20, 2**20]
    choice = generator.randrange(7)
    if choice == 0:  # terabytes, consistently
        entry["shape"], entry["data_offsets"] = huge, [begin, begin + item * 2**40]
    elif choice == 1:
        entry["data_offsets"] = [begin - 8, end - 8]
    elif choice == 2:
        entry["data_offsets"] = [end, begin]
    elif choice == 3:
        entry["shape"] = [-side for side in entry["shape"]]
    elif choice == 4:  # the product wraps around 64 bits
        entry["shape"] = [2**32, 2**32, *entry["shape"]]
    elif choice == 5:
        entry["shape"], entry["data_offsets"] = [0], [begin, begin]
    else:
        header[name + "2"] = dict(entry)  # two tensors in one place


def _count(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
