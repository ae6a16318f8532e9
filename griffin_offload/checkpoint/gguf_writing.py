"""GGUF files (llama.cpp) of models: what `gguf.py` reads, the other way round by the same tables.

A header is read again before anything is written behind it: a config or a tokenizer that does not come back the same
is refused, as llama.cpp would compute something else with it.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from griffin_offload.checkpoint.base import Checkpoint
from griffin_offload.checkpoint.config_files import config_from
from griffin_offload.checkpoint.direct_io import Extent
from griffin_offload.checkpoint.gguf import INTERLEAVED, layer_of, name_in_file, sources_of
from griffin_offload.checkpoint.gguf_architectures import config_of
from griffin_offload.checkpoint.gguf_blocks import block_types, gguf_package
from griffin_offload.checkpoint.gguf_config import Described
from griffin_offload.checkpoint.gguf_file import BlockType, GgufFile, GgufTensor, read_gguf
from griffin_offload.checkpoint.gguf_metadata import (
    Metadata,
    add_key,
    architecture_of,
    check_same,
    metadata_of,
    rope_tensors,
    tokenizer_of,
)
from griffin_offload.checkpoint.gguf_tokenizer import end_tokens
from griffin_offload.errors import UnsupportedModel
from griffin_offload.transformers_api import StockModel

_ALIGNMENT = 32
_PIECE_NUMBERS = 2**22
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
_TABLES = ("token_embd.weight", "output.weight")
# llama.cpp adds them in float32, and chooses experts in it.
_IN_FLOAT32 = ("position_embd.weight", "ffn_gate_inp.weight")


@dataclass(frozen=True)
class Planned:
    """A tensor of the file: of which one of the model it is made, and how it lies."""

    source: str
    name: str
    shape: tuple[int, ...]
    kind: BlockType
    part: int = 0
    parts: int = 0
    """Of experts: how many matrices lie above each other in the source, and which one this is."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.numbers * self.kind.nbytes

    @property
    def padded_bytes(self) -> int:
        return -(-self.nbytes // _ALIGNMENT) * _ALIGNMENT


class GgufLayout:
    """The file of a `model` on meta, of the source `checkpoint`: its matrices in blocks of `blocks`, or ("") in the
    source's precision. UnsupportedModel for what such a file cannot say."""

    def __init__(
        self, checkpoint: Checkpoint, model: StockModel, neurons: int, blocks: str, groups: Sequence[Sequence[str]]
    ):
        self._package = gguf_package()
        self._types = {kind.name: kind for kind in block_types().values()}
        self._floats, self._blocks = _FLOATS.get(checkpoint.dtype, "F32"), blocks
        self._model, self._where = model, checkpoint.directory
        self._arch, self._architecture = architecture_of(model.config, self._where)
        rope = rope_tensors(model)
        self.groups = [[planned for name in group for planned in self._planned(name)] for group in groups]
        """By shard, in the order of the file."""
        self._front = [Planned("", name, tuple(t.shape), self._types["F32"]) for name, t in rope.items()]
        self._front_bytes = b"".join(_padded(tensor.numpy().tobytes()) for tensor in rope.values())
        self._metadata = self._described(neurons) | tokenizer_of(checkpoint, model)
        self._raw = self._read_again()

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(planned.padded_bytes for group in self.groups for planned in group)

    def _planned(self, name: str) -> list[Planned]:
        if parts := sources_of(name):
            experts, rows, *columns = self._rows_of_experts(self._model.get_parameter(name)).shape
            one = (experts, rows // len(parts), *columns)
            names = [f"blk.{layer_of(name)}.{part}" for part in parts]
            kinds = [self._types[self._kind(there, one)] for there in names]
            return [Planned(name, names[i], one, kinds[i], i, len(parts)) for i in range(len(parts))]
        there, end = name_in_file(name, self._architecture, self._model)
        if not there:
            raise UnsupportedModel(f"{self._where}: llama.cpp's {self._arch} has no place for {name}")
        there, shape = there + (end or ".weight"), tuple(self._model.get_parameter(name).shape)
        shape = shape[::-1] if self._is_transposed(name, shape) else shape
        shape = shape[::2] if len(shape) == 3 else shape  # a convolution of each channel by itself
        shape = shape[1:] if there.endswith("ffn_gate_inp_shexp.weight") else shape
        return [Planned(name, there, shape, self._types[self._kind(there, shape)])]

    def _rows_of_experts(self, tensor: Tensor) -> Tensor:
        """Matrices [E, outputs, inputs], or biases [E, outputs]."""
        turned = self._architecture.model_type in INTERLEAVED and tensor.dim() == 3
        return tensor.transpose(1, 2) if turned else tensor

    def _is_transposed(self, name: str, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and name.endswith(self._architecture.transposed or ("\0",))

    def _kind(self, name: str, shape: tuple[int, ...]) -> str:
        if len(shape) == 1 or name.endswith(".bias") or name.endswith(_IN_FLOAT32) or "shortconv.conv" in name:
            return "F32"
        blocks = "Q8_0" if self._blocks and name in _TABLES else self._blocks
        return blocks if blocks and shape[-1] % self._types[blocks].numbers == 0 else self._floats

    def _described(self, neurons: int) -> Metadata:
        said = metadata_of(self._model.config, self._arch, neurons)
        blocks = self._blocks or self._floats
        general = {"general.type": "model", "general.name": self._where.stem, "general.file_type": _FILE_TYPES[blocks]}
        quantised = {"general.quantization_version": 2} if self._blocks else {}
        return general | quantised | {f"{self._arch}.{key}": value for key, value in said.items()}

    # The header -----------------------------------------------------------------------------------------------

    def begin(self, path: Path) -> int:
        """Write the header, and what no layer has, into `path`; its bytes, where the groups begin."""
        self._write(path, self._metadata, [*self._front, *(planned for group in self.groups for planned in group)])
        with path.open("ab") as file:
            file.write(b"\0" * (-file.tell() % _ALIGNMENT) + self._front_bytes)
            return file.tell()

    def _write(self, path: Path, metadata: Metadata, tensors: Sequence[Planned]) -> None:
        kinds = self._package.GGMLQuantizationType
        writer = self._package.GGUFWriter(path, self._arch, use_temp_file=False)
        for key, value in metadata.items():
            add_key(writer, key, value)
        for planned in tensors:
            writer.add_tensor_info(
                planned.name, planned.shape, np.dtype(np.float32), planned.nbytes, kinds(planned.kind.id)
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()

    def _read_again(self) -> Mapping[str, Any]:
        """What config.json would say of the file. UnsupportedModel where that is another model, or another
        tokenizer."""
        with TemporaryDirectory() as place:
            path = Path(place) / "header.gguf"
            self._write(path, self._metadata, [])
            header = read_gguf(path, block_types())
            self._check_tokenizer_again(header)
            path.write_bytes(self._front_bytes)
            found, at = {}, 0
            for planned in [*self._front, *(planned for group in self.groups for planned in group)]:
                extent = Extent(str(path), at, planned.nbytes)
                found[planned.name] = GgufTensor(planned.name, planned.shape, planned.kind, extent)
                at += planned.padded_bytes
            raw = config_of(Described(path, header.metadata, found))[1]
            check_same(config_from(raw, path), self._model.config, self._where)
        return raw

    def _check_tokenizer_again(self, header: GgufFile) -> None:
        if "tokenizer.ggml.tokens" not in header.metadata:
            return
        ends = self._model.generation_config.eos_token_id
        wanted = {ends} if isinstance(ends, int) else set(ends or ())
        lacking = wanted - set(end_tokens(header))
        if lacking:
            raise UnsupportedModel(f"{self._where}: answers end with the token {min(lacking)}, which a file cannot say")

    # The tensors ----------------------------------------------------------------------------------------------

    def write_group(self, path: Path, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Append group `index`, of the model's `tensors` by name, and wait until the disk has it."""
        with path.open("ab") as file:
            for planned in self.groups[index]:
                numbers = self._rearranged(planned, tensors[planned.source])
                rows = numbers if numbers.dim() > 1 else numbers[None]
                step = max(_PIECE_NUMBERS // rows.shape[-1], 1)
                for piece in rows.split(step):
                    file.write(self._stored(piece, planned.kind))
                file.write(b"\0" * (planned.padded_bytes - planned.nbytes))
            file.flush()
            os.fsync(file.fileno())

    def _rearranged(self, planned: Planned, tensor: Tensor) -> Tensor:
        rows = self._architecture.rows.get(planned.name.removesuffix(".weight").removesuffix(".bias").split(".")[-1])
        if rows is not None:
            tensor = tensor[torch.argsort(rows.index(self._raw))]
        if added := self._architecture.adds(planned.name):
            tensor = tensor.float() + added
        if planned.parts:
            experts, part, parts = self._rows_of_experts(tensor), planned.part, planned.parts
            by_turns = self._architecture.model_type in INTERLEAVED
            own = experts[:, part::parts] if by_turns else experts.chunk(parts, dim=1)[part]
            return own.flatten(0, own.dim() - 2)
        if tensor.dim() == 3:
            return tensor.squeeze(1)
        return tensor.t() if self._is_transposed(planned.source, tuple(tensor.shape)) else tensor

    def _stored(self, numbers: Tensor, kind: BlockType) -> bytes:
        floats = {name: dtype for dtype, name in _FLOATS.items()}
        if kind.name in floats:
            made = numbers.to(floats[kind.name]).contiguous()
            return bytes(made.view(torch.uint8).numpy().tobytes())
        blocks = self._package.quants.quantize(
            numbers.float().contiguous().numpy(), self._package.GGMLQuantizationType(kind.id)
        )
        return bytes(blocks.tobytes())


def _padded(content: bytes) -> bytes:
    return content + b"\0" * (-len(content) % _ALIGNMENT)
