"""LoRA adapters, directories that peft has written: merged into the weights while they pass, W + (alpha / r) B A.

Nothing is written, and no weight is changed in its file: a matrix that an adapter changes is one that is decoded, of
its own bytes and of the adapter's two small matrices (Hu et al. 2021).
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PretrainedConfig

from griffin_offload.blocks.layouts import build_on_meta
from griffin_offload.checkpoint.base import Checkpoint, StoredTensor
from griffin_offload.checkpoint.config_files import MOST_CONFIG_BYTES, is_there, read_object
from griffin_offload.checkpoint.decoding import typed
from griffin_offload.checkpoint.files import FileState, states_of
from griffin_offload.checkpoint.renaming import Conversion
from griffin_offload.checkpoint.safetensors import read_header, stored_tensors
from griffin_offload.errors import CheckpointError, ModelNotFound, UnsupportedModel, UsageError
from griffin_offload.formats.translated import Decode
from griffin_offload.transformers_api import StockModel, Tokenizer

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight")
_IN_LAYER = re.compile(r"\.\d+\.")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# So many numbers are made at once: they stay in a core's cache.
_PIECE_NUMBERS = 2**18
# What changes the formula, or more than matrices of layers, by peft's names in adapter_config.json.
_REFUSED = (
    *("use_dora", "use_qalora", "modules_to_save", "alpha_pattern", "layer_replication", "trainable_token_indices"),
    *("target_parameters", "alora_invocation_tokens", "arrow_config", "lora_bias", "use_bdlora", "monteclora_config"),
)
# Others change the base model's weights when training begins.
_BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Merged:
    """The `decode` of a matrix of `dtype` with what an adapter adds. Of the parts the last two are A [r, I] and
    B [O, r], those before them the matrix's own. `turned`: the matrix lies as [I, O]."""

    own: Decode | None
    dtype: torch.dtype
    small: tuple[torch.dtype, torch.dtype]
    rank: int
    scale: float
    turned: bool

    def __call__(self, parts: Sequence[Tensor], first: int, end: int, into: Tensor) -> None:
        work = torch.promote_types(into.dtype, torch.float32)
        down, up = (typed(part, dtype).to(work) for part, dtype in zip(parts[-2:], self.small, strict=True))
        down, up = down.view(self.rank, -1), up.view(-1, self.rank) * self.scale
        left, right = (down.t(), up.t()) if self.turned else (up, down)
        step = max(_PIECE_NUMBERS // into.shape[1], 1)
        for at in range(first, end, step):
            last = min(at + step, end)
            rows = into[at - first : last - first]
            self._own_rows(parts[:-2], at, last, rows)
            rows.copy_(torch.addmm(rows.to(work), left[at:last], right))

    def _own_rows(self, parts: Sequence[Tensor], first: int, end: int, into: Tensor) -> None:
        if self.own is not None:
            self.own(parts, first, end, into)
            return
        row_bytes = into.shape[1] * self.dtype.itemsize
        into.copy_(typed(parts[0][first * row_bytes : end * row_bytes], self.dtype).view(into.shape))


@dataclass(frozen=True)
class AdaptedCheckpoint(Checkpoint):
    """`base` with an adapter. The tokenizer, the settings and all other files are the base's."""

    base: Checkpoint
    adapter: Path
    directory: Path
    config: PretrainedConfig
    dtype: torch.dtype
    files: tuple[Path, ...]
    weight_bytes: int
    states: Mapping[str, FileState]
    listed: Mapping[str, StoredTensor]
    untied: bool = False

    @property
    def path(self) -> Path:
        return self.base.path

    def tensors(self) -> Mapping[str, StoredTensor]:
        return self.listed

    def conversions(self, model: StockModel, names: Iterable[str]) -> Sequence[Conversion]:
        return self.base.conversions(model, names)

    def tokenizer(self) -> Tokenizer:
        return self.base.tokenizer()

    def set_generation_config(self, model: StockModel) -> None:
        self.base.set_generation_config(model)

    def config_json(self) -> dict[str, Any]:
        return self.base.config_json()

    def write_beside(self, directory: Path, own: set[str]) -> None:
        self.base.write_beside(directory, own)

    def _identity(self) -> bytes:
        return self.base._identity() + (self.adapter / _CONFIG).read_bytes()


def with_adapter(base: Checkpoint, directory: Path) -> Checkpoint:
    """`base` with the adapter in `directory` merged into it. Errors: UsageError, ModelNotFound, CheckpointError,
    UnsupportedModel; no weight is read."""
    if not is_there(directory / _CONFIG):
        raise ModelNotFound(f"{directory} has no {_CONFIG}: give the directory of an adapter that peft has written")
    if not base.precision.is_plain:
        raise UsageError(f"{base.directory} is converted to {base.precision}: give the adapter when it is converted")
    said = _checked(read_object(directory / _CONFIG, MOST_CONFIG_BYTES), directory)
    file = (directory / _WEIGHTS).resolve()
    if not is_there(file):
        raise CheckpointError(f"{directory} has no {_WEIGHTS}: pickled adapters can run code, save it as safetensors")
    read_header(file)
    states = states_of([str(file)])
    changed = dict(_changed(base, _pairs(stored_tensors(file), directory), said, directory))
    listed = dict(base.tensors()) | changed
    more_bytes = sum(part.nbytes for tensor in changed.values() for part in tensor.parts[-2:])
    return AdaptedCheckpoint(
        base,
        directory,
        base.directory,
        base.config,
        base.dtype,
        (*base.files, file),
        base.weight_bytes + more_bytes,
        {**base.states, **states},
        listed,
        base.untied,
    )


def _checked(said: dict[str, object], directory: Path) -> dict[str, Any]:
    if "peft_type" not in said:
        raise CheckpointError(f"{directory / _CONFIG} has no peft_type: no adapter of peft, give another --adapter")
    if str(said.get("peft_type")).upper() != "LORA":
        raise UnsupportedModel(f"{directory} is a {str(said.get('peft_type'))[:40]} adapter: only LoRA is merged")
    found = [name for name in _REFUSED if said.get(name)]
    if said.get("bias", "none") != "none":
        found.append("bias")
    if said.get("init_lora_weights") not in _BEGINNINGS:
        found.append("init_lora_weights")
    if found:
        _refuse(directory, f"its {_CONFIG} has {found[0]} = {str(said[found[0]])[:40]}")
    alpha = said.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise CheckpointError(f"{directory / _CONFIG} says lora_alpha is {repr(alpha)[:40]}: it has to be a number")
    return said


def _refuse(directory: Path, why: str) -> NoReturn:
    raise UnsupportedModel(
        f"{directory}: {why}, which is not merged here: merge it with peft (merge_and_unload) and save the model"
    )


def _pairs(stored: Mapping[str, StoredTensor], directory: Path) -> dict[str, dict[str, StoredTensor]]:
    """A and B by the matrix that they change."""
    found: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        match = _NAME.fullmatch(name)
        if match is None or not _IN_LAYER.search(f".{match[1]}."):
            _refuse(directory, f"it changes {name[:120]}, which is no matrix of a layer")
        found.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
    for name, pair in found.items():
        if len(pair) != 2:
            raise CheckpointError(f"{directory / _WEIGHTS} lacks lora_A or lora_B of {name}: download it again")
    return found


def _changed(
    base: Checkpoint, pairs: Mapping[str, Mapping[str, StoredTensor]], said: dict[str, object], directory: Path
) -> Iterator[tuple[str, StoredTensor]]:
    stored = base.tensors()
    model = build_on_meta(base.config, base.dtype)
    conversions = {conversion.target: conversion for conversion in base.conversions(model, stored)}
    for target, pair in pairs.items():
        conversion = conversions.get(target)
        if conversion is None:
            raise CheckpointError(f"{directory} changes {target}, {base.directory} has no such matrix: it is another's")
        if conversion.rule is not None or len(conversion.sources) != 1:
            _refuse(directory, f"it changes {target}, which the checkpoint holds in pieces")
        name = conversion.sources[0]
        yield name, _merged(target, stored[name], pair, said, directory)


def _merged(
    name: str, own: StoredTensor, pair: Mapping[str, StoredTensor], said: dict[str, Any], directory: Path
) -> StoredTensor:
    down, up = pair["A"], pair["B"]
    turned = bool(said.get("fan_in_fan_out"))
    shapes = (own.shape, down.shape, up.shape)
    outputs, inputs = own.shape[::-1] if turned and len(own.shape) == 2 else (*own.shape, 0, 0)[:2]
    rank = down.shape[0] if down.shape else 0
    fits = rank > 0 and down.shape == (rank, inputs) and up.shape == (outputs, rank) and len(own.shape) == 2
    if not fits or down.dtype not in _FLOATS or up.dtype not in _FLOATS or not own.dtype.is_floating_point:
        words = ", ".join(str(list(shape)) for shape in shapes)
        raise CheckpointError(f"{directory} does not fit {name}: matrix, lora_A and lora_B are {words}")
    alpha = float(said["lora_alpha"])
    scale = alpha / math.sqrt(rank) if said.get("use_rslora") else alpha / rank
    decode = Merged(own.decode, own.dtype, (down.dtype, up.dtype), rank, scale, turned)
    return replace(own, parts=(*own.parts, *down.parts, *up.parts), decode=decode)
