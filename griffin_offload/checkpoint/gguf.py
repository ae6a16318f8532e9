"""GGUF files (llama.cpp) as checkpoints: one file, or the shards of one model, with all that a directory would hold.

The files are mapped. Matrices are made of their blocks row by row whenever they are copied or streamed; stored bytes
are what is read and counted. Config, tokenizer and end tokens come from the header.
Of a mixture of experts a file has gate, up and down of all experts of a layer in a tensor each, [E, outputs, inputs];
transformers has gate and up in one, above each other or (gpt-oss) row by row.
"""

import dataclasses
import functools
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from griffin_offload.blocks.layouts import build_on_meta
from griffin_offload.checkpoint.base import Checkpoint, StoredTensor
from griffin_offload.checkpoint.config_files import config_from
from griffin_offload.checkpoint.direct_io import Extent
from griffin_offload.checkpoint.files import FileState, renamed, states_of
from griffin_offload.checkpoint.gguf_architectures import config_of
from griffin_offload.checkpoint.gguf_blocks import BlockDecoder, block_types, gguf_package
from griffin_offload.checkpoint.gguf_config import ROPE_TENSORS, Architecture, Described
from griffin_offload.checkpoint.gguf_file import GgufFile, GgufTensor, is_gguf, read_gguf
from griffin_offload.checkpoint.gguf_tokenizer import end_tokens, tokenizer_from
from griffin_offload.checkpoint.renaming import Conversion, same_names
from griffin_offload.checkpoint.safetensors import INDEX, SINGLE
from griffin_offload.checkpoint.tokenizer import kept
from griffin_offload.errors import CheckpointError, GriffinError, UnsupportedModel, UsageError, one_line
from griffin_offload.formats.translated import Codes, EachExpert
from griffin_offload.transformers_api import StockModel, Tokenizer

_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_MOST_SHARDS = 1000
_MOST_DRAFTING = 16
_STORED_AS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What blocks are made into: their steps are rougher than the rounding, and every kernel has it.
_TRANSLATED_AS = torch.bfloat16
_LAYER = re.compile(r"^blk\.\d+\.(?P<rest>.+)$")
_IN_LAYER = re.compile(r"\.layers\.(\d+)\.")
_SUFFIX = re.compile(r"\.(weight|bias)$")
_CONVOLUTIONS = ("shortconv.conv", "ssm_conv1d")
"""Of each channel by itself, of which files leave out an axis."""


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """Files whose headers are whole and whose architecture transformers knows."""

    directory: Path
    """The path that was opened: a file, or the directory that it is alone in."""
    config: PretrainedConfig
    dtype: torch.dtype
    files: tuple[Path, ...]
    weight_bytes: int
    states: Mapping[str, FileState]
    architecture: Architecture
    raw_config: Mapping[str, Any]
    headers: tuple[GgufFile, ...]
    names: Mapping[str, str]
    """transformers' names of tensors by those in the files."""

    def tensors(self) -> Mapping[str, StoredTensor]:
        there = _all(self.headers)
        made = (self.names[name] for name in there if name in self.names)
        sources: dict[str, list[GgufTensor]] = {name: [] for name in made}
        for name, tensor in there.items():
            if name in self.names:
                sources[self.names[name]].append(tensor)
        return {name: self._made_of(name, tensors) for name, tensors in sources.items()}

    @property
    def expert_rows(self) -> bool:  # type: ignore[override]
        return any(sources_of(name) for name in self.names.values())

    def _made_of(self, name: str, tensors: list[GgufTensor]) -> StoredTensor:
        wanted = sources_of(name)
        if not wanted:
            return self._stored(tensors[0])
        by_end = {tensor.name.split(".", 2)[-1]: tensor for tensor in tensors}
        lacking = [source for source in wanted if source not in by_end]
        if lacking:
            raise CheckpointError(f"{self.directory} has no {lacking[0]} beside {tensors[0].name}: download it again")
        ordered = [by_end[source] for source in wanted]
        return stored_experts(ordered, self.architecture.model_type, self.dtype, self.directory)

    def _stored(self, tensor: GgufTensor) -> StoredTensor:
        name = self.names[tensor.name]
        match = _LAYER.match(tensor.name)
        part = _SUFFIX.sub("", match["rest"] if match else tensor.name)
        in_order, columns = self.architecture.rows.get(part), self.architecture.columns.get(part)
        transposed = name.endswith(self.architecture.transposed or ("\0",)) and len(tensor.shape) == 2
        minus, logs = self.architecture.adds(tensor.name), part in self.architecture.logs
        if part == "ffn_gate_inp_shexp" and len(tensor.shape) == 1:  # one row, of which files leave out the axis
            tensor = dataclasses.replace(tensor, shape=(1, *tensor.shape))
        shape = tensor.shape[::-1] if transposed else tensor.shape
        shape = (shape[0], 1, shape[1]) if part in _CONVOLUTIONS and len(shape) == 2 else shape
        changed = in_order or columns or transposed or minus or logs
        if not changed and _STORED_AS.get(tensor.type.name) == self.dtype:
            return StoredTensor(shape, self.dtype, (tensor.extent,))
        said = self.raw_config, tensor, self.directory
        order = None if in_order is None else in_order.of(*said)
        across = None if columns is None else columns.of(*said, axis=-1)
        width = tensor.shape[-1] if len(tensor.shape) > 1 else 1
        rows = tensor.shape[0] if len(tensor.shape) != 3 else tensor.shape[0] * tensor.shape[1]
        decode = BlockDecoder(tensor.type, rows, width, order, transposed, minus, across, logs)
        return StoredTensor(shape, self.dtype, (tensor.extent,), decode=decode)

    def conversions(self, model: StockModel, names: Iterable[str]) -> Sequence[Conversion]:
        return same_names(model, names)

    def in_precision(self, dtype: torch.dtype) -> "GgufCheckpoint":
        return dataclasses.replace(self, dtype=dtype) if self._translated else self

    @property
    def _translated(self) -> bool:
        return _most_bytes(self.headers) not in _STORED_AS

    def tokenizer(self) -> Tokenizer:
        return kept(self.path, tokenizer_from(self.headers[0], self.files[0]))

    def set_generation_config(self, model: StockModel) -> None:
        model.generation_config = GenerationConfig.from_dict(self._generation())

    def _generation(self) -> dict[str, Any]:
        ids = {key: self.raw_config[key] for key in ("bos_token_id", "pad_token_id")}
        return ids | {"eos_token_id": end_tokens(self.headers[0]) or None}

    def _identity(self) -> bytes:
        return b"".join(header.header() for header in self.headers)

    def config_json(self) -> dict[str, Any]:
        return dict(self.raw_config) | {"dtype": str(self.dtype).removeprefix("torch.")}

    def write_beside(self, directory: Path, own: set[str]) -> None:
        with tempfile.TemporaryDirectory() as place:
            made = Path(place)
            (made / "generation_config.json").write_text(json.dumps(self._generation(), indent=2))
            if "tokenizer.ggml.tokens" in self.headers[0].metadata:
                self.tokenizer().save_pretrained(made)
            for path in sorted(made.iterdir()):
                if path.name not in own:
                    with renamed(directory / path.name) as temporary:
                        temporary.write_bytes(path.read_bytes())

    def _unlike_config(self, names: Sequence[str], how: str) -> CheckpointError:
        return CheckpointError(
            f"{self.directory} does not match its own header: {len(names)} {how} tensors, first {min(names)}"
        )


def open_gguf(path: Path) -> Checkpoint | None:
    """The checkpoint in the file `path`, or in the directory that holds one alone; None where there is none. Errors:
    UsageError, CheckpointError, UnsupportedModel."""
    files = _files(path)
    if not files:
        return None
    types = block_types()
    headers = tuple(read_gguf(file, types) for file in files)
    described = Described(path, headers[0].metadata, _all(headers))
    architecture, raw = config_of(described)
    config = config_from(raw, path)
    dtype = _STORED_AS.get(_most_bytes(headers), _TRANSLATED_AS)
    names = _names(described, architecture, config, dtype)
    weight_bytes = sum(tensor.extent.nbytes for name, tensor in described.tensors.items() if name in names)
    states = states_of(str(file.resolve()) for file in files)
    return GgufCheckpoint(path, config, dtype, tuple(files), weight_bytes, states, architecture, raw, headers, names)


def _files(path: Path) -> list[Path]:
    """The files of the model at `path`, in order; none where that is no GGUF model."""
    if path.is_file():
        return _shards(path) if is_gguf(path) else []
    if (path / SINGLE).exists() or (path / INDEX).exists():
        return []
    found = sorted(file for file in path.glob("*.gguf") if not file.is_dir() and "mmproj" not in file.name)
    models = {_stem(file) for file in found}
    if len(models) > 1:
        raise UsageError(f"{path} holds {len(models)} models as GGUF files: give one of them, such as {found[0]}")
    return _shards(found[0]) if found else []


def _stem(file: Path) -> str:
    match = _SHARD.match(file.name)
    return match["stem"] if match else file.name


def _shards(file: Path) -> list[Path]:
    match = _SHARD.match(file.name)
    if match is None:
        return [file]
    count = int(match["count"])
    if not 1 <= count <= _MOST_SHARDS:
        raise CheckpointError(f"{file} is one of {count} files by its name: at most {_MOST_SHARDS} are read")
    files = [file.with_name(f"{match['stem']}-{n + 1:05d}-of-{count:05d}.gguf") for n in range(count)]
    for shard in files:
        if not (shard.is_file() or shard.is_symlink()):
            raise CheckpointError(f"{shard} is absent, one of the {count} files of this model: download it again")
    return files


def _all(headers: Iterable[GgufFile]) -> dict[str, GgufTensor]:
    found: dict[str, GgufTensor] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if found.setdefault(name, tensor) is not tensor:
                raise CheckpointError(f"{header.path} and another shard both hold {name}: they are of several models")
    return found


def _most_bytes(headers: Iterable[GgufFile]) -> str:
    """The name of the type that most numbers of matrices have."""
    counted: Counter[str] = Counter({"F32": 0})
    for tensor in _all(headers).values():
        if len(tensor.shape) > 1:
            counted[tensor.type.name] += tensor.extent.nbytes
    return counted.most_common(1)[0][0]


def _names(
    described: Described, architecture: Architecture, config: PretrainedConfig, dtype: torch.dtype
) -> dict[str, str]:
    """The model's names of tensors by the file's, from the package's tables. UnsupportedModel where the file holds a
    tensor that the model has no place for: leaving it out would change every answer."""
    try:
        model = build_on_meta(config, dtype)
    except GriffinError:
        raise
    except Exception as error:  # each architecture validates its config in its own way
        raise CheckpointError(f"{described.where} describes no model: {one_line(error)}") from error
    found: dict[str, str] = {}
    for name in model.state_dict():
        layer = _IN_LAYER.search(name)
        if layer is not None:
            found |= {f"blk.{layer[1]}.{source}": name for source in sources_of(name)}
        there, end = name_in_file(name, architecture, model)
        if there:
            there += end or ("" if described.has(there) else ".weight")
            if described.has(there):
                found.setdefault(there, name)
    found = {there: name for there, name in found.items() if described.has(there)}
    layers, behind = config.num_hidden_layers, min(described.drafting_layers, _MOST_DRAFTING)
    drafting = tuple(f"blk.{layers + place}." for place in range(behind))
    unused = sorted(set(described.tensors) - set(found) - set(ROPE_TENSORS))
    unused = [name for name in unused if not name.startswith(drafting or ("\0",))]
    if unused:
        raise UnsupportedModel(
            f"{described.where} holds {len(unused)} tensors that transformers' {config.model_type} has no place for, "
            f"first {unused[0]}: give the model's Hugging Face directory"
        )
    return found


def name_in_file(name: str, architecture: Architecture, model: StockModel) -> tuple[str, str]:
    """What files call the tensor `name` of `model`, by the package's tables, "" where they have no such thing; and what
    `name` ends in: ".weight", ".bias" or ""."""
    for end, other in architecture.renamed.items():
        name = name.removesuffix(end) + other if name.endswith(end) else name
    match = _SUFFIX.search(name)
    stem = name[: match.start()] if match else name
    table = _table(architecture.names, model.config.num_hidden_layers)
    there = table.get_name(stem) or table.get_name(stem.removeprefix(f"{model.base_model_prefix}."))
    return there or "", match[0] if match else ""


@functools.lru_cache(maxsize=4)
def _table(names: str, layers: int) -> Any:
    package = gguf_package()
    arch = next(arch for arch, name in package.MODEL_ARCH_NAMES.items() if name == names)
    return package.get_tensor_name_map(arch, layers)


# Of transformers' module of experts, by the parameter's name.
_MADE_OF = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}
_ROUTED = ".experts."
INTERLEAVED = ("gpt_oss",)
"""Rows of gate and up by turns in transformers, whose matrices of experts are turned around, too."""


def layer_of(name: str) -> int:
    """The layer that the model's tensor `name` is in."""
    match = _IN_LAYER.search(name)
    assert match is not None, "experts are in layers"
    return int(match[1])


def sources_of(name: str) -> tuple[str, ...]:
    """What of a layer in the file makes the model's tensor `name`, without "blk.N."; none for one that is not of all
    experts."""
    own = name.rpartition(_ROUTED)[2] if _ROUTED in name else ""
    bias = own.endswith("_bias")
    ends = "bias" if bias else "weight"
    return tuple(f"{source}.{ends}" for source in _MADE_OF.get(own.removesuffix("_bias"), ()))


def stored_experts(tensors: Sequence[GgufTensor], model_type: str, dtype: torch.dtype, where: object) -> StoredTensor:
    """The experts of a layer out of the file's tensors of them, or their biases. CheckpointError where these do not go
    together."""
    shape = tensors[0].shape
    if len(shape) not in (2, 3) or any(tensor.shape != shape for tensor in tensors):
        found = " and ".join(str(list(tensor.shape)) for tensor in tensors)
        raise CheckpointError(f"{where}: {tensors[0].name} and what belongs to it are {found}, they have to be alike")
    packed = [tensor for tensor in tensors if len(shape) == 2 and tensor.type.numbers != 1]
    if packed:
        raise CheckpointError(f"{where}: {packed[0].name} holds biases in blocks of {packed[0].type.name}")
    experts, rows, width = (*shape, 1)[:3]
    parts = tuple(_extent(tensor, expert) for expert in range(experts) for tensor in tensors)
    decoders = tuple(BlockDecoder(tensor.type, rows, width) for tensor in tensors)
    decode = EachExpert(_Together(decoders, model_type in INTERLEAVED), len(tensors))
    made = (experts, rows * len(tensors), *shape[2:])
    return StoredTensor(made, dtype, parts, decode=decode, of_experts=True)


def _extent(tensor: GgufTensor, expert: int) -> Extent:
    whole, size = tensor.extent, tensor.extent.nbytes // tensor.shape[0]
    return Extent(whole.path, whole.offset + expert * size, size)


@dataclass(frozen=True)
class _Together:
    """One matrix of several, above each other or row by row: all of it at once."""

    decoders: tuple[BlockDecoder, ...]
    interleaved: bool

    @property
    def on_grids(self) -> bool:
        return not self.interleaved and all(decoder.on_grids for decoder in self.decoders)

    def coded(self, parts: Sequence[Tensor], outputs: int, rows: Tensor) -> Codes | None:
        """As `TranslatedTensor` has them, of all rows."""
        own, both = rows[: outputs // len(self.decoders)], zip(self.decoders, parts, strict=True)
        return Codes.above_each_other([decode.coded([part], len(own), own) for decode, part in both])

    def __call__(self, parts: Sequence[Tensor], first: int, end: int, into: Tensor) -> None:
        count, rows = len(self.decoders), self.decoders[0].rows
        assert (first, end) == (0, count * rows), "an expert is made as a whole"
        for place, (decode, part) in enumerate(zip(self.decoders, parts, strict=True)):
            target = into[place::count] if self.interleaved else into[place * rows : (place + 1) * rows]
            made = torch.empty(target.shape, dtype=into.dtype, device="cpu") if self.interleaved else target
            decode([part], 0, rows, made)
            if self.interleaved:
                target.copy_(made)
