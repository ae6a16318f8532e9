"""Where a checkpoint is found, which kind it is (each is asked in turn), and what of it does not stay in its files as a
model needs it: sizes by part, for the planner."""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from griffin_offload.blocks.base import Block
from griffin_offload.blocks.experts import Experts
from griffin_offload.blocks.layouts import find_feed_forwards, left_out_parts
from griffin_offload.checkpoint.adapter import with_adapter
from griffin_offload.checkpoint.base import Checkpoint, StoredTensor
from griffin_offload.checkpoint.config_files import is_there, load_config
from griffin_offload.checkpoint.converted import ConvertedCheckpoint, mark_of, open_converted
from griffin_offload.checkpoint.files import check_content, check_name
from griffin_offload.checkpoint.gguf import open_gguf
from griffin_offload.checkpoint.hub import fetch, is_hub_id
from griffin_offload.checkpoint.quantised import open_quantised, read_quantised_config
from griffin_offload.checkpoint.renaming import names_left_out
from griffin_offload.checkpoint.safetensors import INDEX, SINGLE, SafetensorsCheckpoint, open_safetensors
from griffin_offload.errors import CheckpointError, ModelNotFound, UsageError, unreadable, why_unusable
from griffin_offload.formats import get
from griffin_offload.formats.translated import on_grids
from griffin_offload.transformers_api import StockModel

_WHAT_IS_AN_ADAPTER = "give the directory, or the hub id, of an adapter that peft has written"
_WHAT_IS_A_MODEL = "give a checkpoint directory, a GGUF file or a hub id such as org/name (or org/name:FILE.gguf)"
Opener = Callable[[Path], Checkpoint | None]
"""Opens the file or directory if it is of its kind; None if it is not. Errors: CheckpointError, UnsupportedModel."""
# Files that are read of a directory where they are: as links to nothing they would be taken for absent.
_NEEDED = ("config.json", "generation_config.json", SINGLE, INDEX)
_KINDS: list[Opener] = [open_converted, open_gguf, open_quantised, open_safetensors]


def register_kind(opener: Opener) -> None:
    """Have `opener` asked before all others from now on."""
    if opener not in _KINDS:
        _KINDS.insert(0, opener)


def forget_kind(opener: Opener) -> None:
    """Undo `register_kind`."""
    _KINDS.remove(opener)


def open_checkpoint(model: str | Path, *, offline: bool = False, adapter: str | Path | None = None) -> Checkpoint:
    """Find the file, directory or hub id `model` and check its headers; the LoRA `adapter`, a directory or hub id, is
    merged into it. Errors: UsageError, ModelNotFound, CheckpointError, UnsupportedModel. No weight is read."""
    found = _opened(model, locate(model, offline=offline))
    if adapter is None:
        return found
    return with_adapter(found, locate(adapter, _WHAT_IS_AN_ADAPTER, offline=offline))


def _opened(model: str | Path, path: Path) -> Checkpoint:
    if path.is_dir():
        _check_readable(path)
    for kind in _KINDS:
        found = kind(path)
        if found is not None:
            return found
    check_content(path)  # of a GGUF file that may not be read, or is a pointer, nothing tells what it is
    raise ModelNotFound(f"{model} is a file, and no GGUF file: give the checkpoint's directory")


def _check_readable(directory: Path) -> None:
    """CheckpointError for a directory whose files nobody but another user may list or open, and for links in it that
    lead to nothing, or to where this user may not go."""
    try:
        os.listdir(directory)
        links = [path for name in _NEEDED if (path := directory / name).is_symlink()]
    except OSError as error:
        raise CheckpointError(unreadable(directory, error)) from error
    for path in links:
        check_content(path)


def read_config(path: str | Path) -> Checkpoint:
    """A checkpoint of which only config.json is known, `path` being that file: enough to plan with."""
    file = Path(os.path.expanduser(path))
    if not is_there(file):
        raise ModelNotFound(f"no file {file}: give a config.json")
    config = load_config(file)
    mark = mark_of(config, file.parent)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    if mark is None:
        quantised = read_quantised_config(file, config, dtype)
        if quantised is not None:
            return quantised
        return SafetensorsCheckpoint(file.parent, config, dtype, (), 0)
    return ConvertedCheckpoint(
        file.parent,
        config,
        dtype,
        (),
        0,
        precision=get(mark.precision),
        small=mark.small_format,
        tables=get(mark.tables),
    )


def locate(model: str | Path, remedy: str = _WHAT_IS_A_MODEL, *, offline: bool = False, **hub: Any) -> Path:
    """The path of `model`, fetched from the hub if it is no path; `hub` are more arguments of its client (revision,
    cache_dir, token), `remedy` says what can be given. Errors: UsageError, ModelNotFound."""
    model = str(model)
    if not model:
        raise ModelNotFound(f"the name is empty: {remedy}")
    path = Path(os.path.expanduser(model))  # unlike Path's own, it leaves an unknown ~user as it is
    check_name(path)
    try:
        there = path.exists()
    except OSError as error:  # a folder on the way may not be entered, or a prompt stands in the name's place
        raise ModelNotFound(f"{model[:80]!r} cannot be looked at: {why_unusable(path, error)}") from error
    if there:
        if hub.get("revision") not in (None, "main"):  # a token and a cache are for what has to be fetched
            raise UsageError(
                f"revision is {hub['revision']!r}, and {model} is a directory, which has none: leave it out"
            )
        return path
    if path.is_symlink():
        check_content(path)
    if not is_hub_id(model):
        raise ModelNotFound(f"no directory or file {model}: {remedy}")
    if not path.parent.is_dir():
        return fetch(model, offline=offline, **hub)
    # A name in a directory that is here, more likely misspelt than the hub's: nobody is asked for it.
    try:
        return fetch(model, offline=True, **hub)
    except ModelNotFound as error:
        raise ModelNotFound(
            f"no directory or file {model}, though {path.parent} is a directory here: check the name, or "
            f"griffin-offload pull {model} if the hub's is meant"
        ) from error


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
    on_grids: bool = False
    """Whether some of that lies on grids, which are read again where it is quantised."""


class _LayerSizes:
    """Of one decoder layer; `experts` of a mixture are translated one by one."""

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self.made = self.translated = 0
        self.on_grids = False
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
            self.on_grids |= on_grids(tensor.decode)

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
    left_out = names_left_out(model, checkpoint.config, tensors, left_out_parts(model))
    for name, tensor in tensors.items():
        if name in left_out:
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
    share, grids = max(layer.share for layer in layers), any(layer.on_grids for layer in layers)
    return PartSizes(tuple(layer.made for layer in layers), embeddings, rest, share, grids)


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
