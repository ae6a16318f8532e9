"""A converted checkpoint: int8 or int4 matrices in Hugging Face layout, under the names of `named_parameters()`.

config.json says so under `quantization_config`, which makes other software refuse it instead of misreading it, and
every shard carries the same mark, so that shards of two conversions are not mixed.
"""

import json
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from griffin_offload.blocks.layouts import find_feed_forwards
from griffin_offload.blocks.replace import swap_linears
from griffin_offload.blocks.towers import leave_out_towers
from griffin_offload.checkpoint.config_files import read_generation_config
from griffin_offload.checkpoint.mapped import map_file
from griffin_offload.devices.torch_state import building, parameters_on_meta, put
from griffin_offload.errors import CheckpointError, UnsupportedModel, memory_refused, one_line
from griffin_offload.formats import FLOATS, Format, every, get
from griffin_offload.formats.base import is_plain
from griffin_offload.formats.embedding import TABLE_FORMATS, swap_tables, tie_tables
from griffin_offload.kernels.by_blocks import Scratch

METHOD = "griffin-offload"
# One key: safetensors writes several in no fixed order, and equal conversions are equal byte for byte.
METADATA_KEY = "griffin_offload"


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
    try:
        with safe_open(path, framework="np") as file:
            found = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        if memory_refused(error):
            raise
        raise CheckpointError(f"{path} was changed while it was read: {one_line(error)}") from error
    if mark is None:
        if found is not None:
            raise CheckpointError(f"{path} was converted, config.json has lost its quantization_config: convert again")
        return
    if found != mark.metadata()[METADATA_KEY]:
        raise CheckpointError(f"{path} belongs to another conversion than config.json: shards are mixed, convert again")


def build_unfilled(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """The stock model with its buffers, and every parameter on the meta device."""
    with building(dtype), parameters_on_meta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about initialisation, which never happens here
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    model.tie_weights()  # each parameter went to the meta device by itself
    leave_out_towers(model)
    return model


def map_converted(
    directory: Path,
    files: tuple[Path, ...],
    config: PretrainedConfig,
    dtype: torch.dtype,
    precision: Format,
    tables: Format,
    scratch: Scratch,
) -> Any:
    """The model with quantised layers, its parameters views of the mapped files; every one has to be there."""
    model = build_unfilled(config, dtype)
    decoder, blocks = find_feed_forwards(model, config.get_text_config().num_hidden_layers)
    swap_linears(decoder, blocks, precision, precision, scratch)
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    if not tables.is_plain:
        swap_tables(model, tables, scratch)
    expected: dict[str, Tensor] = dict(model.named_parameters())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    for path in files:
        for name, tensor in map_file(path).items():
            if name in expected:
                _assign(model, name, tensor, expected.pop(name), path)
            elif name in buffers:
                _check(name, tensor, buffers[name], path)
                buffers[name].copy_(tensor)
    if not tables.is_plain:
        tie_tables(model, tied=tied)
    else:
        model.tie_weights()
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        raise CheckpointError(f"{directory} lacks {len(absent)} tensors, first {absent[0]}: convert again")
    read_generation_config(model, directory)
    return model


def _assign(model: nn.Module, name: str, tensor: Tensor, expected: Tensor, path: Path) -> None:
    _check(name, tensor, expected, path)
    owner, _, attribute = name.rpartition(".")
    put(model.get_submodule(owner), attribute, tensor)


def _check(name: str, tensor: Tensor, expected: Tensor, path: Path) -> None:
    kind = is_plain(tensor), is_plain(expected)
    if tensor.shape != expected.shape or kind[0] != kind[1] or (not kind[0] and tensor.dtype != expected.dtype):
        raise CheckpointError(
            f"{path}: {name} is {_describe(tensor)}, the model needs {_describe(expected)}: convert again"
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
