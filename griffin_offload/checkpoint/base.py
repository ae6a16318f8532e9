"""The door for sources of weights: a `Checkpoint` says what a model is made of, whatever its files are.

A kind of files is one class here, and one function for `registry.register_kind` that answers for a path "this is mine"
by a checkpoint. Opening reads headers, not weights; whoever reads a weight asks `tensors()` where it lies.
"""

import functools
import hashlib
import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from griffin_offload.checkpoint.config_files import read_generation_config
from griffin_offload.checkpoint.direct_io import Extent
from griffin_offload.checkpoint.files import FileState, WatchedFiles, renamed
from griffin_offload.checkpoint.mapped import FileMaps
from griffin_offload.checkpoint.renaming import Conversion, conversions_of
from griffin_offload.checkpoint.tokenizer import tokenizer_of
from griffin_offload.errors import CheckpointError
from griffin_offload.formats.base import Format
from griffin_offload.formats.floats import FLOATS
from griffin_offload.formats.translated import Decode, StackedTensor, TranslatedTensor
from griffin_offload.transformers_api import StockModel, Tokenizer

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
    small: Format | None = None
    """The same for small ones among them (blocks/replace.py); None: as the others."""
    finer_experts: Mapping[int, frozenset[str]] = MappingProxyType({})
    """By layer the names of what it holds in that for every expert, where experts are records."""
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

    def tokenizer(self) -> Tokenizer:
        """A tokenizer of transformers'; a new one whenever it is asked for."""
        return tokenizer_of(self.directory)

    @functools.cached_property
    def own_tokenizer(self) -> Tokenizer:
        """`tokenizer()`, the same whenever it is asked for: that of the model that is loaded from here."""
        return self.tokenizer()

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
