"""A converted checkpoint: int8 or int4 matrices in Hugging Face layout, under the names of `named_parameters()`.

config.json says so under `quantization_config`, which makes other software refuse it instead of misreading it, and
every shard carries the same mark, so that shards of two conversions are not mixed.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from griffin_offload.checkpoint.base import Checkpoint, StoredTensor
from griffin_offload.checkpoint.config_files import MOST_CONFIG_BYTES, read_object
from griffin_offload.checkpoint.renaming import Conversion, same_names
from griffin_offload.checkpoint.safetensors import (
    FLOAT_TYPES,
    METADATA_KEY,
    UNFINISHED,
    SafetensorsCheckpoint,
    check_files,
    check_mark,
    directory_config,
)
from griffin_offload.checkpoint.unsupported import check_numbers
from griffin_offload.errors import CheckpointError, UnsupportedModel
from griffin_offload.formats import FLOATS, TABLE_FORMATS, Format, every, get

METHOD = "griffin-offload"
_IN_LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class ConversionInfo:
    """What a conversion writes into every file: formats by their names."""

    precision: str
    source: str
    """Fingerprint of the checkpoint it was made from."""
    tables: str = FLOATS.name
    """Of the embeddings and the head."""
    version: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", get(self.precision).version)

    def metadata(self) -> dict[str, str]:
        """Of a shard."""
        return {METADATA_KEY: json.dumps(asdict(self), sort_keys=True)}

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json. No `quant_method`: one that transformers does not know it skips with a
        warning and computes with int8 numbers that lack their scales; without any it refuses."""
        return {"method": METHOD, **asdict(self)}


def mark_of(config: PretrainedConfig, directory: Path) -> ConversionInfo | None:
    """The mark in `config`, which is taken out of it; None where there is none or another method's."""
    found = getattr(config, "quantization_config", None)
    if not isinstance(found, dict) or found.get("method") != METHOD:
        return None
    version, precision, source, tables = (found.get(key) for key in ("version", "precision", "source", "tables"))
    format = next((other for other in every() if other.name == precision and not other.is_plain), None)
    if format is not None and version != format.version:
        raise UnsupportedModel(
            f"{directory} was converted to {precision} in format {version}, this version reads format "
            f"{format.version}: convert again"
        )
    if format is None or not isinstance(source, str) or tables not in [other.name for other in TABLE_FORMATS]:
        raise CheckpointError(f"{directory / 'config.json'} has a damaged quantization_config: convert again")
    del config.quantization_config
    return ConversionInfo(format.name, source, str(tables))


def check_shard(path: Path, mark: ConversionInfo | None) -> None:
    """CheckpointError unless the shard belongs to the conversion, or to none where there is no mark."""
    check_mark(path, None if mark is None else mark.metadata()[METADATA_KEY])


@dataclass(frozen=True)
class ConvertedCheckpoint(SafetensorsCheckpoint):
    """What `convert` made: its tensors are those of the formats' modules, by the model's own names."""

    precision: Format = FLOATS
    tables: Format = FLOATS

    def tensors(self) -> Mapping[str, StoredTensor]:
        found = super().tensors()
        quantised = {name.rpartition(".")[0] for name in found if name.endswith((".scale", ".input_scale"))}
        formats = {name: self._format_of(name) if name.rpartition(".")[0] in quantised else FLOATS for name in found}
        return {name: replace(tensor, format=formats[name]) for name, tensor in found.items()}

    def _format_of(self, name: str) -> Format:
        return self.precision if _IN_LAYER.search(name) else self.tables

    def conversions(self, model: Any, names: Iterable[str]) -> Sequence[Conversion]:
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
        tables=get(mark.tables),
    )
