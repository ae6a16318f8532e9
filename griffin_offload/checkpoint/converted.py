"""A converted checkpoint: int8 or int4 matrices in Hugging Face layout, under the names of `named_parameters()`.

config.json says so under `quantization_config`, which makes other software refuse it instead of misreading it, and
every shard carries the same mark, so that shards of two conversions are not mixed.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from griffin_offload.checkpoint.base import Checkpoint, StoredTensor
from griffin_offload.checkpoint.config_files import MOST_CONFIG_BYTES, check_numbers, read_object
from griffin_offload.checkpoint.renaming import Conversion, same_names
from griffin_offload.checkpoint.safetensors import (
    DTYPES,
    FLOAT_TYPES,
    METADATA_KEY,
    UNFINISHED,
    SafetensorsCheckpoint,
    check_files,
    check_mark,
    directory_config,
)
from griffin_offload.errors import CheckpointError, UnsupportedModel
from griffin_offload.formats import FLOATS, SMALL_MATRICES, TABLE_FORMATS, Format, get, of_copies
from griffin_offload.formats.expert_form import BLOCK_BYTES, RECORD_VERSION
from griffin_offload.transformers_api import StockModel

METHOD = "griffin-offload"
_IN_LAYER, _NUMBER = re.compile(r"\.\d+\."), re.compile(r"\d{1,9}")


@dataclass(frozen=True)
class ConversionInfo:
    """What a conversion writes into every file: formats by their names."""

    precision: str
    source: str
    """Fingerprint of the checkpoint it was made from."""
    tables: str = FLOATS.name
    """Of the embeddings and the head."""
    version: int = field(init=False)
    records: int = 0
    """Version of the records that experts lie in; 0: there are none."""
    small: str = ""
    """Of small matrices (blocks/replace.py), where it is another one than that of the others."""
    finer_experts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By layer the names of what every expert has in that, too."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", get(self.precision).version)

    @property
    def small_format(self) -> Format | None:
        """Of small matrices; None: as the others."""
        return get(self.small) if self.small else None

    def entries(self) -> dict[str, Any]:
        """What is written down."""
        optional = ("records", "small", "finer_experts")
        return {name: value for name, value in asdict(self).items() if name not in optional or value}

    def metadata(self) -> dict[str, str]:
        """Of a shard."""
        return {METADATA_KEY: json.dumps(self.entries(), sort_keys=True)}

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json. No `quant_method`: one that transformers does not know it skips with a
        warning and computes with int8 numbers that lack their scales; without any it refuses."""
        return {"method": METHOD, **self.entries()}


def mark_of(config: PretrainedConfig, directory: Path) -> ConversionInfo | None:
    """The mark in `config`, which is taken out of it; None where there is none or another method's."""
    found = getattr(config, "quantization_config", None)
    if not isinstance(found, dict) or found.get("method") != METHOD:
        return None
    version, precision, source, tables = (found.get(key) for key in ("version", "precision", "source", "tables"))
    records = found.get("records", 0)
    if records not in (0, RECORD_VERSION):
        raise UnsupportedModel(
            f"{directory} holds experts as records of version {records}, this version reads {RECORD_VERSION}: convert "
            "again"
        )
    small = found.get("small", "")
    known = [other for other in of_copies() if not other.is_plain or records]
    format = next((other for other in known if other.name == precision), None)
    if format is not None and version != format.version:
        raise UnsupportedModel(
            f"{directory} was converted to {precision} in format {version}, this version reads format "
            f"{format.version}: convert again"
        )
    finer = found.get("finer_experts", {})
    fit = tables in [other.name for other in TABLE_FORMATS] and small in ("", SMALL_MATRICES.name)
    if format is None or not isinstance(source, str) or not fit or not _names_by_layer(finer) or (finer and not small):
        raise CheckpointError(f"{directory / 'config.json'} has a damaged quantization_config: convert again")
    del config.quantization_config
    return ConversionInfo(format.name, source, str(tables), records=records, small=small, finer_experts=finer)


def _names_by_layer(found: object) -> bool:
    if not isinstance(found, dict) or not all(_NUMBER.fullmatch(str(layer)) for layer in found):
        return False
    return all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in found.values())


def check_shard(path: Path, mark: ConversionInfo | None) -> None:
    """CheckpointError unless the shard belongs to the conversion, or to none where there is no mark."""
    check_mark(path, None if mark is None else mark.metadata()[METADATA_KEY])


@dataclass(frozen=True)
class ConvertedCheckpoint(SafetensorsCheckpoint):
    """What `convert` made: its tensors are those of the formats' modules, by the model's own names."""

    precision: Format = FLOATS
    small: Format | None = None
    finer_experts: Mapping[int, frozenset[str]] = field(default_factory=dict)
    tables: Format = FLOATS
    records: torch.dtype | None = None

    def tensors(self) -> Mapping[str, StoredTensor]:
        found = super().tensors()
        quantised = {name.rpartition(".")[0] for name in found if name.endswith((".scale", ".input_scale"))}
        grouped = {name.rpartition(".")[0] for name in found if name.endswith(".groups")}
        of = {owner: self._format_of(owner, grouped=owner in grouped) for owner in quantised}
        return {name: replace(tensor, format=of.get(name.rpartition(".")[0], FLOATS)) for name, tensor in found.items()}

    def _format_of(self, owner: str, *, grouped: bool) -> Format:
        if not _IN_LAYER.search(f"{owner}."):
            return self.tables
        return self.precision if grouped or self.small is None else self.small

    def conversions(self, model: StockModel, names: Iterable[str]) -> Sequence[Conversion]:
        return same_names(model, names)

    def lacking(self, names: Sequence[str]) -> CheckpointError:
        return CheckpointError(f"{self.directory} lacks {len(names)} tensors, first {names[0]}: convert again")

    def unfitting(self, problems: Mapping[str, str]) -> CheckpointError:
        name, words = next(iter(problems.items()))
        return CheckpointError(f"{self.directory}: {name} {words}: convert again")


def open_converted(path: Path) -> Checkpoint | None:
    """The converted checkpoint in the directory `path`; None where it is none. Errors as `open_safetensors`."""
    if (path / UNFINISHED).is_file() or not (path / "config.json").is_file():
        return None
    raw = read_object(path / "config.json", MOST_CONFIG_BYTES).get("quantization_config")
    if not isinstance(raw, dict) or raw.get("method") != METHOD:
        return None
    config = directory_config(path)
    mark = mark_of(config, path)
    assert mark is not None
    checked = check_files(path, config, mark.metadata()[METADATA_KEY])
    stored = checked.most_bytes(FLOAT_TYPES)
    check_numbers(path, None if stored in FLOAT_TYPES else stored)
    return ConvertedCheckpoint(
        path,
        config,
        FLOAT_TYPES[stored],
        checked.files,
        checked.weight_bytes,
        checked.states,
        precision=get(mark.precision),
        small=mark.small_format,
        finer_experts={int(layer): frozenset(names) for layer, names in mark.finer_experts.items()},
        tables=get(mark.tables),
        records=FLOAT_TYPES[stored] if mark.records else None,
    )


# Shards with experts, which are written one by one.


def save_with_records(
    tensors: Mapping[str, Tensor], name: str, records: Iterable[Tensor], shape: tuple[int, int], path: Path, mark: str
) -> None:
    """A safetensors file of `tensors` behind `name`: uint8 of `shape`, a row for each of `records`, which are made one
    after another. They begin at a block of the disk."""
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: mark}}
    end = math.prod(shape)
    header[name] = {"dtype": "U8", "shape": list(shape), "data_offsets": [0, end]}
    # Every one at a multiple of its type's size: it is used where it lies.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    words = {dtype: word for word, dtype in DTYPES.items()}
    for own, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[own] = {"dtype": words[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    content += b" " * (-(len(content) + 8) % BLOCK_BYTES)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little"))
        file.write(content)
        for record in records:
            file.write(memoryview(record.numpy()))  # type: ignore[arg-type]  # numpy's stubs know no buffers
        for _, tensor in ordered:
            file.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))  # type: ignore[arg-type]
