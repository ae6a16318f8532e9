"""The door for sources of weights: a `Checkpoint` says what a model is made of, whatever its files are.

A kind of files is one class here, and one function for `registry.register_kind` that answers for a path "this is mine"
by a checkpoint. Opening reads headers, not weights; whoever reads a weight asks `tensors()` where it lies.
"""

import copy
import functools
import hashlib
import json
import math
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from griffin_offload.blocks.routing import RENAMED
from griffin_offload.checkpoint.config_files import read_generation_config
from griffin_offload.checkpoint.direct_io import Extent
from griffin_offload.checkpoint.files import FileState, WatchedFiles, renamed
from griffin_offload.checkpoint.mapped import FileMaps
from griffin_offload.checkpoint.tokenizer import tokenizer_of
from griffin_offload.errors import CheckpointError
from griffin_offload.formats.base import Format
from griffin_offload.formats.floats import FLOATS
from griffin_offload.formats.translated import Decode, StackedTensor, TranslatedTensor
from griffin_offload.transformers_api import StockModel, Tokenizer

# How transformers names what a checkpoint calls otherwise: old names, names without the base model's prefix or with
# another one, several tensors that became one. The rules are transformers' (conversion_mapping.py,
# core_model_loading.py; the same functions from 5.20 to 5.24), and so is the code that applies them. Nothing is loaded.


@dataclass(frozen=True)
class Conversion:
    """What makes one tensor of the model, or several at once."""

    target: str
    """The first of them."""
    sources: tuple[str, ...]
    """The checkpoint's names, in order."""
    rule: Any = None
    """transformers' own, where more than the name changes."""
    patterns: tuple[str, ...] = ()
    """Of the rule, one for each of `sources`."""

    @property
    def of_experts(self) -> bool:
        """Whether it makes one tensor of those of all experts of a layer."""
        return self.rule is not None and any(isinstance(step, MergeModulelist) for step in self.rule.operations)

    def by_expert(self) -> list[dict[str, str | None]] | None:
        """For each expert the checkpoint's names by pattern, in the order in which they lie one above the other in its
        row of the target, None for one that is missing; None where the rule does more than laying them so."""
        steps = self.rule.operations
        simple = [isinstance(step, kind) for step, kind in zip(steps, (MergeModulelist, Concatenate), strict=False)]
        if len(steps) > 2 or not all(simple) or steps[0].dim != 0 or (len(steps) == 2 and steps[1].dim != 1):
            return None
        patterns = list(self.rule.source_patterns)
        numbers: dict[int, dict[str, str | None]] = {}
        for name, pattern in zip(self.sources, self.patterns, strict=True):
            match = re.search(_numbered(pattern), name)
            if match is None or not match.groups():
                return None
            numbers.setdefault(int(match[1]), dict.fromkeys(patterns))[pattern] = name
        return [numbers.get(expert, dict.fromkeys(patterns)) for expert in range(max(numbers) + 1)]

    def missing(self, expert: int, pattern: str) -> str:
        """The name that `pattern` would have for `expert`."""
        known = next(name for name, own in zip(self.sources, self.patterns, strict=True) if own == pattern)
        return re.sub(_numbered(pattern), lambda found: pattern.replace(r"\.", ".").replace("*", str(expert)), known)

    def apply(self, model: StockModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of `model` by name, made of `tensors`, which are the sources'."""
        if self.rule is None:
            return {self.target: tensors[self.sources[0]]}
        rule = copy.deepcopy(self.rule)
        for name, pattern in zip(self.sources, self.patterns, strict=True):
            rule.add_tensor(self.target, name, pattern, tensors[name])
        made = rule.convert(self.target, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


ONE_BY_ONE = {
    "llama4_text": (
        (("experts.*.gate_proj.weight", "experts.*.up_proj.weight"), "experts.gate_up_proj"),
        (("experts.*.down_proj.weight",), "experts.down_proj"),
    )
}
"""By model type, what makes the tensors of all experts of a layer where they were saved one by one, [outputs, inputs],
as libraries do that quantise single matrices; transformers reads such files of these types in no way."""


def _one_by_one(model: StockModel) -> list[WeightConverter]:
    known = ONE_BY_ONE.get(model.config.get_text_config().model_type, ())
    stacked = [MergeModulelist(dim=0)], [MergeModulelist(dim=0), Concatenate(dim=1)]
    return [WeightConverter(list(sources), target, stacked[len(sources) - 1]) for sources, target in known]


def _numbered(pattern: str) -> str:
    """As an expression; some of transformers' patterns are written as such, but for their star."""
    return re.escape(pattern.replace(r"\.", ".")).replace(r"\*", r"(\d+)")


def conversions_of(model: StockModel, names: Iterable[str]) -> list[Conversion]:
    """Which tensors of `names` make which of those of `model`. Names that lead nowhere are left out. What was used is
    noted in `model`, as transformers does for saving it under the same names."""
    own = RENAMED.get(model.config.model_type, {}).items()
    transforms = [*get_model_conversion_mapping(model), *(WeightRenaming(old, new) for old, new in own)]
    transforms += _one_by_one(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    rules = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    there, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Conversion] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, there)
        if target not in there and name in there:
            target, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=there)
        if target in there and pattern is None:
            found.setdefault(target, Conversion(target, (name,)))
        elif target in there:
            before = found.get(target, Conversion(target, (), rules[pattern]))
            more = (*before.sources, name), before.rule, (*before.patterns, pattern)
            found[target] = Conversion(target, *more)
    model._weight_conversions = [transform for transform in transforms if transform.was_used()]
    return list(found.values())


def names_left_out(
    model: StockModel, config: PretrainedConfig, names: Iterable[str], towers: Collection[str]
) -> set[str]:
    """Those of `names` that belong to what a checkpoint of `config` sees or hears with: `model` is its language model,
    and `towers` are `left_out_parts` of it, none where its class knows of text alone."""
    if towers or config.get_text_config() is config:
        return {name for name in names if not set(towers).isdisjoint(name.split("."))}
    alike = {name: _NUMBER.sub("0", name) for name in names}  # one of each kind is asked about
    used = {part for own in conversions_of(model, set(alike.values())) for name in own.sources for part in _parts(name)}
    return {name for name, kind in alike.items() if _begins_elsewhere(kind, used)}


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _parts(name: str) -> Iterator[str]:
    """What `name` begins with, up to each of its dots, and all of it."""
    return accumulate(name.split("."), "{}.{}".format)


def _begins_elsewhere(name: str, used: Collection[str]) -> bool:
    """Whether it leaves what is `used` outside of all lists: inside of one, packed matrices have names of their own."""
    first = next((part for part in _parts(name) if part not in used), None)
    return first is not None and "0" not in first.split(".")


def same_names(model: StockModel, names: Iterable[str]) -> list[Conversion]:
    """The same for checkpoints that name every tensor as the model does."""
    there = model.state_dict()
    return [Conversion(name, (name,)) for name in names if name in there]


def saved(model: StockModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` of `model`, by the names and in the pieces that checkpoints of it have: experts one by one."""
    found: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return found


class KeptTypes:
    """Which tensors of a model transformers keeps in another precision than the model's."""

    def __init__(self, model: StockModel, dtype: torch.dtype) -> None:
        plan = model._get_dtype_plan(dtype)
        self._types = plan
        self._pattern, self._globs, _ = build_glob_alternation(list(plan)) if plan else (None, {}, {})

    def of(self, name: str, expected: Tensor) -> torch.dtype:
        """The type of `name`, which is `expected` in the model as it was built."""
        match = self._pattern.search(name) if self._pattern is not None else None
        if match is None or match.lastgroup is None:
            return expected.dtype
        found: torch.dtype = self._types[self._globs[match.lastgroup]]
        return found


# What a checkpoint is.


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
