"""Cases of files that others made: GGUF, and checkpoints that others quantised."""

import json
import random
import struct
from dataclasses import dataclass
from typing import Any

from foreign_formats import FORMATS
from robustness.fuzz.damage import any_value, as_bytes, damaged_bytes, damaged_json, damaged_part, damaged_safetensors
from robustness.fuzz.files import shards
from robustness.fuzz.place import Place
from robustness.fuzz.worker import Unnamed

from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.config import LoadConfig
from griffin_offload.engine.spec import examine_checkpoint, plan_for

GGUF = "a.gguf"
_U32, _STRING, _ARRAY = 4, 8, 9
_PACKED = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_HUGE = (0, 1, 31, 33, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
_LIES = ("count", "keys", "version", "align", "shape", "kind", "offset", "name")


@dataclass
class Gguf:
    """A file, taken apart: keys as (name, type, value), an array's value being (type, values); and tensors."""

    keys: list[tuple[str, int, Any]]
    tensors: list[list[Any]]
    data: bytes


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.content, self.at)
        self.at += struct.calcsize(form)
        return value

    def text(self) -> str:
        length = self.take("<Q")
        self.at += length
        return self.content[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.take(_PACKED[kind])
        inner, count = self.take("<I"), self.take("<Q")
        return inner, [self.value(inner) for _ in range(count)]


def split(content: bytes) -> Gguf:
    reader = _Reader(content)
    reader.at = 8
    tensors, keys = reader.take("<Q"), reader.take("<Q")
    found: list[tuple[str, int, Any]] = []
    for _ in range(keys):
        name, kind = reader.text(), reader.take("<I")
        found.append((name, kind, reader.value(kind)))
    infos = []
    for _ in range(tensors):
        name, axes = reader.text(), reader.take("<I")
        infos.append([name, [reader.take("<Q") for _ in range(axes)], reader.take("<I"), reader.take("<Q")])
    return Gguf(found, infos, content[-(-reader.at // 32) * 32 :])


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        return _text(str(value))
    if kind == _ARRAY:
        inner, values = value
        return struct.pack("<IQ", inner, len(values)) + b"".join(_value(inner, item) for item in values)
    form = _PACKED[kind]
    return struct.pack(form, value)


def join(file: Gguf, *, version: int = 3, counts: tuple[int, int] | None = None) -> bytes:
    tensors, keys = counts or (len(file.tensors), len(file.keys))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, keys)
    head += b"".join(_text(name) + struct.pack("<I", kind) + _value(kind, value) for name, kind, value in file.keys)
    for name, shape, kind, offset in file.tensors:
        head += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return head + b"\0" * (-len(head) % 32) + file.data


def _typed(generator: random.Random, value: Any) -> tuple[int, Any]:
    """Some type of GGUF's that holds `value`, or its text."""
    if isinstance(value, bool):
        return 7, value
    if isinstance(value, list):
        return _ARRAY, (_STRING, [str(item) for item in value])
    for kind in generator.sample(sorted(_PACKED), len(_PACKED)):
        try:
            struct.pack(_PACKED[kind], value)
        except (struct.error, OverflowError, TypeError):
            continue
        return kind, value
    return _STRING, str(value)


def _damage_key(generator: random.Random, file: Gguf) -> None:
    at = generator.randrange(len(file.keys))
    name, kind, value = file.keys[at]
    way = generator.random()
    if way < 0.15:
        del file.keys[at]
    elif way < 0.25:
        file.keys.append((generator.choice(file.keys)[0], kind, value))
    elif way < 0.35:
        file.keys[at] = (str(any_value(generator)), kind, value)
    elif kind == _ARRAY and way < 0.9:
        inner, values = value
        values = damaged_part(generator, values)
        values = values if isinstance(values, list) else [values]
        file.keys[at] = (name, _ARRAY, (_STRING, values) if inner == _STRING else _numbers(inner, values))
    else:
        file.keys[at] = (name, *_typed(generator, damaged_part(generator, value if kind != _ARRAY else 1)))


def _numbers(inner: int, values: list[Any]) -> tuple[int, list[Any]]:
    try:
        for value in values:
            struct.pack(_PACKED[inner], value)
    except (struct.error, OverflowError, TypeError):
        return _STRING, values
    return inner, values


def _damage_tensor(generator: random.Random, file: Gguf, lie: str) -> None:
    info = generator.choice(file.tensors)
    if lie == "shape":
        info[1] = generator.choice(
            [[], info[1][::-1], [*info[1], 1], [generator.choice(_HUGE) for _ in info[1]], [2**32, 2**32], [1] * 5]
        )
    elif lie == "kind":
        info[2] = generator.choice([*range(42), 2**31, 2**32 - 1])
    elif lie == "offset":
        info[3] = generator.choice([info[3] + 1, info[3] + 32, generator.choice(file.tensors)[3], *_HUGE])
    elif lie == "name":
        info[0] = generator.choice([str(any_value(generator)), generator.choice(file.tensors)[0], info[0] + "x"])


def gguf_header(generator: random.Random, place: Place) -> None:
    """A header that lies, or bytes that are others; everything that opening reads, and now and then a plan."""
    content, file = place.valid(GGUF), split(place.valid(GGUF))
    if generator.random() < 0.15:
        content = damaged_bytes(generator, content[: -len(file.data)]) + file.data
    else:
        counts, version = None, 3
        for _ in range(generator.choice((1, 1, 2, 3))):
            lie = generator.choice(_LIES)
            if lie == "count":
                counts = generator.choice([(generator.choice(_HUGE), len(file.keys)), (1, generator.choice(_HUGE))])
            elif lie == "version":
                version = generator.choice((1, 2, 4, 3 << 24, 2**32 - 1)) if generator.random() < 0.2 else 3
            elif lie == "align":
                file.keys.append(("general.alignment", _U32, generator.choice((0, 1, 3, 8, 64, 2**31))))
            elif lie == "keys":
                for _ in range(generator.choice((1, 2, 3))):
                    _damage_key(generator, file)
            else:
                _damage_tensor(generator, file, lie)
        content = join(file, version=version, counts=counts)
        if generator.random() < 0.05:
            content = content[: generator.randrange(len(content))]
    checkpoint = open_checkpoint(place.write(GGUF, content))
    stored = checkpoint.tensors()
    if any(part.nbytes > len(content) for tensor in stored.values() for part in getattr(tensor, "parts", ())):
        raise Unnamed("a tensor is larger than its file")
    if generator.random() < 0.1:
        checkpoint.tokenizer()
    if generator.random() < 0.05:
        plan_for(examine_checkpoint(checkpoint, LoadConfig(max_gpu_mem="1GB")))


def quantised(generator: random.Random, place: Place) -> None:
    """What config.json says of how others quantised, or a header of theirs."""
    if generator.random() < 0.8:
        config = json.loads(place.valid("config.json"))
        said = config["quantization_config"]
        if generator.random() < 0.3:
            said = generator.choice(list(FORMATS.values())).said
        config["quantization_config"] = damaged_json(generator, said)
        place.write("config.json", as_bytes(generator, config))
    else:
        name = generator.choice(shards(place.files))
        place.write(name, damaged_safetensors(generator, place.valid(name)))
    checkpoint = open_checkpoint(place.directory)
    checkpoint.tensors()
