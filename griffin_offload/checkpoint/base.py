"""The door for sources of weights: a `Checkpoint` says what a model is made of, whatever its files are.

A kind of files is one class here, and one function for `registry.register_kind` that answers for a path "this is mine"
by a checkpoint. Opening reads headers, not weights; whoever reads a weight asks `tensors()` where it lies.
`part_sizes` says what of a model does not stay in its files as it is needed.
"""

import hashlib
import json
import math
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from griffin_offload.blocks.base import Block
from griffin_offload.blocks.experts import Experts
from griffin_offload.blocks.layouts import find_feed_forwards, left_out_parts
from griffin_offload.checkpoint.config_files import read_generation_config
from griffin_offload.checkpoint.direct_io import Extent
from griffin_offload.checkpoint.files import FileState, WatchedFiles, renamed
from griffin_offload.checkpoint.mapped import FileMaps
from griffin_offload.checkpoint.renaming import Conversion, conversions_of
from griffin_offload.checkpoint.tokenizer import tokenizer_of
from griffin_offload.errors import CheckpointError
from griffin_offload.formats import FLOATS, Format
from griffin_offload.formats.stacked import StackedTensor
from griffin_offload.formats.translated import Decode, TranslatedTensor
from griffin_offload.transformers_api import StockModel

# What a directory holds beside weights: tokenizer, templates, generation settings.
_BESIDE = ("*.json", "*.model", "*.txt", "*.jinja")
# Of every file so many pieces go into a fingerprint, evenly spread.
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as the model gets it, and where its bytes lie."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Extent, ...]
    """Bytes of files. One part, without `decode`, is the tensor itself, and used where it lies."""
    format: Format = FLOATS
    """Of the matrix that it belongs to: the model gets a module of this format for it, of whose tensors this is one."""
    decode: Decode | None = None
    """Makes its numbers out of the parts' bytes, whenever they are needed."""
    of_experts: bool = False
    """Its rows are experts, each made of as many of the parts, in their order."""

    @property
    def stored_bytes(self) -> int:
        """In the files."""
        return sum(part.nbytes for part in self.parts)

    @property
    def nbytes(self) -> int:
        """In memory, once it is there."""
        return math.prod(self.shape) * self.dtype.itemsize

    def tensor(self, maps: FileMaps) -> Tensor:
        """A view of its mapped file, or a `TranslatedTensor` over such views; nothing is read. Not to be written to.
        CheckpointError where a file is no longer what it was."""
        views = [maps.view(part) for part in self.parts]
        if self.decode is not None:
            kind = StackedTensor if self.of_experts else TranslatedTensor
            return kind(self.shape, self.dtype, views, self.decode)
        # Views want addresses in multiples of the type's size; files that are padded otherwise are copied.
        aligned = self.parts[0].offset % self.dtype.itemsize == 0
        content = views[0] if aligned else views[0].clone()
        numbers: Tensor = content.view(self.dtype)
        return numbers.view(self.shape)


class Checkpoint(ABC):
    """What is loaded, planned with and converted. The errors of every method are CheckpointErrors."""

    directory: Path
    """Where it lies, in messages, too."""
    config: PretrainedConfig
    dtype: torch.dtype
    """Of plain tensors: the one most bytes of the language model have."""
    files: tuple[Path, ...]
    """Those that hold weights."""
    weight_bytes: int
    """Of all tensors, in the files."""
    states: Mapping[str, FileState]
    """Of `files`, by resolved path, from before anything was read of them."""
    precision: Format = FLOATS
    """The format of the matrices in its layers."""
    tables: Format = FLOATS
    """The same for its embeddings and its head."""
    records: torch.dtype | None = None
    """Of floats, where it holds experts as records (formats/expert_form.py); None: as the model does."""
    expert_rows: bool = False
    """It holds matrices of experts as [outputs, inputs], whichever way the model has them."""
    untied: bool = False
    """It holds another head than the embeddings that its own config ties it to."""

    @property
    def path(self) -> Path:
        """What opens it again."""
        return self.directory

    @abstractmethod
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Everything it holds, by the names that `conversions` knows. Cheap: no weight is read."""

    def conversions(self, model: StockModel, names: Iterable[str]) -> Sequence[Conversion]:
        """Which of its tensors make which of those of `model`, a stock one with the formats' modules in it. By default
        its names are those of transformers' checkpoints: renamed and merged as transformers does it."""
        return conversions_of(model, names)

    def in_precision(self, dtype: torch.dtype) -> "Checkpoint":
        """The same for a model of `dtype`: itself, unless plain tensors are made from what is stored anyway."""
        return self

    def tokenizer(self) -> Any:
        """A tokenizer of transformers'; a new one whenever it is asked for."""
        return tokenizer_of(self.directory)

    def set_generation_config(self, model: StockModel) -> None:
        """Give `model` its settings for generation, where it has any."""
        read_generation_config(model, self.directory)

    def fingerprint(self) -> str:
        """Of config, headers and samples of every file: tells two fine-tunes of a model apart without reading them."""
        digest = hashlib.sha256(self._identity())
        for path in self.files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for sample in range(_SAMPLES):
                    file.seek(sample * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()[:32]

    def _identity(self) -> bytes:
        return (self.directory / "config.json").read_bytes()

    def watched(self) -> WatchedFiles:
        """`files`, held against what they were when they were checked. OSError for one that cannot be opened."""
        return WatchedFiles(self.states, self.states)

    def config_json(self) -> dict[str, Any]:
        """What config.json of a converted copy says of the model."""
        found: dict[str, Any] = json.loads((self.directory / "config.json").read_bytes())
        return found

    def write_beside(self, directory: Path, own: set[str]) -> None:
        """Write into `directory` what it holds beside weights and config: tokenizer, templates, settings. Not the files
        named in `own`, which the caller writes."""
        for path in sorted({path for pattern in _BESIDE for path in self.directory.glob(pattern)}):
            if path.is_file() and path.name not in own:
                with renamed(directory / path.name) as temporary:
                    shutil.copyfile(path, temporary)

    def lacking(self, names: Sequence[str]) -> CheckpointError:
        """The error for tensors of the model that nothing here makes."""
        return self._unlike_config(names, "missing")

    def unfitting(self, problems: Mapping[str, str]) -> CheckpointError:
        """The error for tensors of other shapes or kinds than the model's: by name, what they are and should be."""
        return self._unlike_config(list(problems), "mismatched")

    def _unlike_config(self, names: Sequence[str], how: str) -> CheckpointError:
        return CheckpointError(
            f"{self.directory} does not match its config.json: {len(names)} {how} keys, first {min(names)}"
        )


_IN_LAYER = re.compile(r"(?:^|\.)(\d+)\.(.+)$")


@dataclass(frozen=True)
class PartSizes:
    """Bytes that loading makes of other precisions, in the checkpoint's own, and what translating needs."""

    feed_forward: tuple[int, ...] = ()
    """Of each layer: they are streamed from there, as long as the model lives."""
    embeddings: int = 0
    rest: int = 0
    """Gone when the residents are there; of what is translated, the largest layer, while its residents are made."""
    translated_share: float = 0.0
    """Of a layer's feed-forward that is translated while it streams, the stored bytes for each of the model's; 0 where
    all are used as they lie."""


class _LayerSizes:
    """Of one decoder layer; `experts` of a mixture are translated one by one."""

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self.made = self.translated = 0
        self._stored = self._full = self._translated_ff = 0

    def count(self, tensor: StoredTensor, made: int, *, inside: bool) -> None:
        """`inside`: it belongs to the feed-forward."""
        translated = tensor.nbytes if tensor.decode else 0
        self.translated += translated // self._experts if inside else translated
        if inside:
            self.made += made
            self._stored += tensor.stored_bytes
            self._full += tensor.nbytes
            self._translated_ff += translated

    @property
    def share(self) -> float:
        return self._stored / self._full if self._translated_ff else 0.0


def part_sizes(model: StockModel, checkpoint: Checkpoint) -> PartSizes:
    """Of `checkpoint`, whose model is on the meta device. A name that no other part has counts as feed-forward."""
    tensors = checkpoint.tensors()
    decoder, blocks = find_feed_forwards(model, model.config.get_text_config().num_hidden_layers)
    layers, embeddings, rest = [_LayerSizes(_experts(block)) for block in blocks], 0, 0
    others = [_names_outside_ff(layer, block) for layer, block in zip(decoder, blocks, strict=True)]
    table = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    left_out = left_out_parts(model)
    for name, tensor in tensors.items():
        if left_out & set(name.split(".")):
            continue  # given up before anything else is allocated
        match, made = _IN_LAYER.search(name), _made_bytes(tensor, checkpoint)
        index = int(match[1]) if match else len(blocks)
        inside = match is not None and index < len(blocks) and match[2] not in others[index]
        if index < len(blocks):
            layers[index].count(tensor, made, inside=inside)
        if inside:
            continue
        if name.split(".")[-2:-1] == table.split(".")[-1:]:
            embeddings += made
        else:
            rest += made
    rest += max(layer.translated for layer in layers)
    return PartSizes(tuple(layer.made for layer in layers), embeddings, rest, max(layer.share for layer in layers))


def _experts(block: Block) -> int:
    return block.neurons if isinstance(block, Experts) else 1


def _made_bytes(tensor: StoredTensor, checkpoint: Checkpoint) -> int:
    """What loading makes of a tensor of floats that is not of the checkpoint's precision; translated ones stay."""
    other = tensor.dtype.is_floating_point and tensor.dtype != checkpoint.dtype and tensor.decode is None
    return math.prod(tensor.shape) * checkpoint.dtype.itemsize if other else 0


def _names_outside_ff(layer: Any, block: Any) -> set[str]:
    inside = {id(tensor) for linear in block.linears for tensor in linear.parameters(recurse=False)}
    inside |= {id(tensor) for tensor in block.full()}
    return {name for name, tensor in layer.named_parameters() if id(tensor) not in inside}
