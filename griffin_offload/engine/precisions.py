"""In which formats the residents of a checkpoint may be planned: one for all, or mixed."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch

from griffin_offload.blocks.experts import is_experts
from griffin_offload.blocks.model_shape import ModelParts, model_shape, parts_of
from griffin_offload.blocks.replace import linear_names, small_names
from griffin_offload.blocks.sizes import ModelSizes
from griffin_offload.checkpoint.base import Checkpoint, StoredTensor
from griffin_offload.config import LAYERS, MIXED, TIERS, LoadConfig
from griffin_offload.errors import UnsupportedModel, UsageError
from griffin_offload.formats import INT4, INT8, RESTING_HEAD, SMALL_MATRICES, Format, every
from griffin_offload.formats.linear import reads_head_itself
from griffin_offload.formats.translated import EachExpert, on_grids
from griffin_offload.kernels.library import compiled
from griffin_offload.transformers_api import StockModel

_IN_LAYER = re.compile(r"^(?P<stack>.*?)\b(?P<layer>\d+)\.(?P<matrix>.+?)(?:\.weight)?$")
_EXPERTS_AXES = 3  # of a matrix that each has
_MOST_ON_GRIDS = 0.8
"""Of the layers' numbers: Q4_K_M, which holds a part of two matrices in six bits, has about five sixths."""


def resting_head(checkpoint: Checkpoint, meta: StockModel, host_embeddings: bool) -> Format:
    """What the head rests in among matrices of fewer bits. It stays as it is stored where that is no floats, where the
    stock forward needs floats, and where the embeddings, to which it is tied, would need the device's memory, too."""
    head, embedding = meta.get_output_embeddings(), meta.get_input_embeddings()
    if head is None or not checkpoint.tables.is_plain or reads_head_itself(type(meta)):
        return checkpoint.tables
    return RESTING_HEAD if host_embeddings or head.weight is not embedding.weight else checkpoint.tables


def small_beside(precision: Format, checkpoint: Checkpoint) -> Format | None:
    """What small matrices of a layer rest in among those of `precision`; None: in that, too. They are never made of
    what is stored in fewer bits."""
    stored = checkpoint.small or checkpoint.precision.outside()
    fits = precision.bits < SMALL_MATRICES.bits and (stored.is_plain or stored is SMALL_MATRICES)
    return SMALL_MATRICES if fits else None


def shapes_of(
    checkpoint: Checkpoint, meta: StockModel, device: torch.device, config: LoadConfig, head: Format
) -> tuple[tuple[ModelSizes, ...], tuple[ModelSizes, ...]]:
    """The model, which is on the meta device, in the precisions it may have on the device, best first; and those
    that come before them but for speed. The head is in `head` where the others are in fewer bits."""
    stored = checkpoint.precision
    _check_asked(checkpoint, config)
    allowed = _measured(checkpoint, meta, device, config, head, asked=True)
    if not allowed:  # exact mode alone leaves any out
        rests = stored.rests_as()
        if rests is not stored:
            raise UsageError(f"exact mode needs residents in the stored precision, and {stored} rests as {rests}")
        raise UsageError("exact mode of a mixture of experts drafts in the stored precision: leave --quantize out")
    first = _first_wanted(allowed, checkpoint, device, config)
    if config.prefer == "speed" and not first:
        raise UsageError(
            f"--prefer speed has nothing to choose: {checkpoint.directory} gives {allowed[0].precision_name} alone"
        )
    return tuple(allowed[first:]), tuple(allowed[:first])


def others_of(
    checkpoint: Checkpoint, meta: StockModel, device: torch.device, config: LoadConfig, head: Format
) -> tuple[ModelSizes, ...]:
    """The same in the precisions that it could have, and that `config` does not ask for."""
    return tuple(_measured(checkpoint, meta, device, config, head, asked=False))


def _first_wanted(allowed: list[ModelSizes], checkpoint: Checkpoint, device: torch.device, config: LoadConfig) -> int:
    """Of `allowed`; for speed the one format of the fewest bits, and int4 where it takes over what the file holds and
    there are kernels: more bits would hold the same numbers."""
    if config.prefer == "speed":
        return max((i for i, shape in enumerate(allowed) if len(shape.levels) == 1), default=0)
    quick = device.type == "cpu" and compiled()
    if config.exact or not quick or not allowed or grid_share(checkpoint) < _MOST_ON_GRIDS:
        return 0
    return next((i for i, shape in enumerate(allowed) if shape.levels == (INT4,)), 0)


def grid_share(checkpoint: Checkpoint) -> float:
    """Of the numbers of the layers' matrices, those that lie on grids in their file which int4 takes over."""
    sizes = {False: 0, True: 0}
    for _, tensor in _layer_matrices(checkpoint):
        sizes[_lies_on_grids(tensor)] += math.prod(tensor.shape)
    return sizes[True] / max(sum(sizes.values()), 1)


def held_finer(checkpoint: Checkpoint) -> dict[int, set[str]]:
    """By layer the names of matrices that a file of four bits holds in more, or a copy does, small ones too; of other
    files none."""
    if not checkpoint.precision.is_plain:
        stored = _stored_in(checkpoint, checkpoint.small) if checkpoint.precision is INT4 else {}
        for layer, names in checkpoint.finer_experts.items():
            stored.setdefault(layer, set()).update(names)
        return stored
    if grid_share(checkpoint) < _MOST_ON_GRIDS:
        return {}
    matrices = _layer_matrices(checkpoint)
    stacks = {match["stack"] for match, tensor in matrices if _lies_on_grids(tensor)}  # a tower is another stack
    found: dict[int, set[str]] = {}
    for match, tensor in matrices:
        if match["stack"] in stacks and not _lies_on_grids(tensor):
            found.setdefault(int(match["layer"]), set()).add(match["matrix"])
    return found


def lying_in_rows(checkpoint: Checkpoint) -> dict[int, set[str]]:
    """By layer the names of matrices whose codes are there in rows: of a copy in int4, down projections among them
    where it has the codes of its file; of a file those on grids."""
    found: dict[int, set[str]] = {}
    scales = {name for name in checkpoint.tensors() if name.endswith(".scale")}

    def lies_so(match: re.Match[str], tensor: StoredTensor) -> bool:
        if checkpoint.precision.is_plain:
            return _lies_on_grids(tensor)
        return tensor.format is INT4 and f"{match.string.removesuffix('.weight')}.scale" in scales

    if checkpoint.precision is INT4 or checkpoint.precision.is_plain:
        for match, tensor in _layer_matrices(checkpoint):
            if lies_so(match, tensor):
                found.setdefault(int(match["layer"]), set()).add(match["matrix"])
    return found


def _stored_in(checkpoint: Checkpoint, format: Format | None) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for match, tensor in _layer_matrices(checkpoint):
        if tensor.format is format:
            found.setdefault(int(match["layer"]), set()).add(match["matrix"])
    return found


def _beyond_small(held: Mapping[int, set[str]], parts: ModelParts) -> dict[int, set[str]]:
    """Those that are no small matrices; layers that have some."""
    found = {i: names - small_names(parts.decoder[i], parts.blocks[i]) for i, names in held.items()}
    return {i: names for i, names in found.items() if names}


def _copied_share(parts: ModelParts, *kept: Mapping[int, set[str]]) -> float:
    """Of the layers of a copy, those that are as in a file of four bits: that is told by their down projections, of
    which names are `kept`. A few lie so in any copy."""
    layers = enumerate(zip(parts.decoder, parts.blocks, strict=True))
    downs = [(i, n) for i, (layer, own) in layers for n in linear_names(layer) if own.is_down(layer.get_submodule(n))]
    share = sum(any(name in names.get(i, ()) for names in kept) for i, name in downs) / max(len(downs), 1)
    return share if share >= _MOST_ON_GRIDS else 0.0


def _layer_matrices(checkpoint: Checkpoint) -> list[tuple[re.Match[str], StoredTensor]]:
    """With what their names say."""
    matches = ((_IN_LAYER.match(name), tensor) for name, tensor in checkpoint.tensors().items())
    return [
        (match, tensor)
        for match, tensor in matches
        if match is not None and len(tensor.shape) == (_EXPERTS_AXES if tensor.of_experts else 2)
    ]


def _lies_on_grids(tensor: StoredTensor) -> bool:
    decode = tensor.decode
    return on_grids(decode.decode if isinstance(decode, EachExpert) else decode)


def _measured(
    checkpoint: Checkpoint, meta: StockModel, device: torch.device, config: LoadConfig, head: Format, *, asked: bool
) -> list[ModelSizes]:
    """The precisions that `config` asks for, or all others."""
    stored, parts, found = checkpoint.precision, parts_of(meta), []
    held = {} if stored.is_plain else _beyond_small(held_finer(checkpoint), parts)  # so a copy holds and rests them
    in_rows = lying_in_rows(checkpoint)
    for name, precision, levels in _precisions(stored, config):
        wanted, drafts = config.quantize, levels[0] is not precision
        # A stored format may rest in another one, which has its own name.
        fits = wanted in ("auto", name) or (wanted, name) == (TIERS, LAYERS)
        fits = fits or (wanted == stored.name != TIERS and name not in MIXED and not stored.is_plain)
        fits = fits and (precision is stored or not config.exact)
        if fits is not asked or (config.exact and drafts and any(map(is_experts, meta.modules()))):
            continue
        try:
            for format in levels:
                format.check_device(device.type)
            # In exact mode another precision is one of a converted copy.
            full = precision if config.exact else stored
            own_head = head if levels[-1].bits < head.bits else checkpoint.tables
            beside = small_beside(precision, checkpoint)
            measured = partial(model_shape, meta, precision, full, checkpoint.tables, parts, levels, own_head, beside)
            measured = partial(measured, in_rows=in_rows, by_layer=name == LAYERS)
            shape = measured(held)
            if len(levels) > 1 and not shape.with_neurons:
                kind = checkpoint.config.model_type
                raise UnsupportedModel(f"{name} are of FF neurons, and {kind} has none: take int4")
        except UnsupportedModel:
            needed = name in (config.quantize, stored.name) or not (stored.is_plain or name in MIXED)
            if needed and not drafts:
                raise
            continue
        if levels != (INT4,):
            found.append(shape)
            continue
        of_file = {} if config.exact or beside is None or not stored.is_plain else held_finer(checkpoint)
        if of_file:
            found.append(replace(measured(of_file), taken_over=1.0))  # but for what int8 loses, which is as little
        share = grid_share(checkpoint) if stored.is_plain else _copied_share(parts, in_rows, held)
        found.append(replace(shape, taken_over=share))
    return found


def _check_asked(checkpoint: Checkpoint, config: LoadConfig) -> None:
    """UsageError for a precision that residents of the checkpoint cannot have."""
    stored = checkpoint.precision
    if config.exact and stored.holds:
        raise UsageError(
            f"exact mode verifies in one stored precision, and {checkpoint.directory} holds {stored}: give an int4 or "
            "int8 copy, or the original"
        )
    drafted = [stored.name, *(format.name for format in _draft_formats(stored))]
    made = drafted if config.exact else [stored.name, *(MIXED if _gives_tiers(stored) else [])]
    asked_of = ("auto", stored.option, *made)
    if not stored.is_plain and config.quantize not in asked_of:
        raise UsageError(
            f"the checkpoint was converted to {stored}, --quantize {config.quantize} needs the original: leave it out"
        )
    if config.exact and config.quantize not in ("auto", *drafted):
        raise UsageError(
            f"exact mode drafts in {' or '.join(drafted)} here, not in {config.quantize}: leave --quantize out"
        )


def _precisions(stored: Format, config: LoadConfig) -> Iterator[tuple[str, Format, tuple[Format, ...]]]:
    """Names, formats of matrices, and those of neurons, of all that residents of a `stored` checkpoint may be planned
    in, best first."""
    # A density is of one format, and exact mode drafts in what is stored. Without kernels of ours a prompt would wait
    # minutes for its neurons to be rounded.
    quickly = bool(stored.holds) or compiled()
    unasked = config.density == "auto" and not config.exact and quickly
    mixed = config.quantize in MIXED or (unasked and _gives_tiers(stored))
    for format in every() if stored.is_plain else (stored.rests_as(),):
        if not format.by_name_only or format.name == config.quantize or not stored.is_plain:
            yield format.name, format, (format,)
        if format is INT8 and mixed:
            yield LAYERS, INT8, (INT8, INT4)
    if mixed:
        for name in MIXED:
            yield name, _tiers()[0], _tiers()
    if config.exact and (config.density == "auto" or config.quantize != "auto"):
        for format in _draft_formats(stored):
            yield format.name, stored, (format,)  # the full model's neurons verify


def _draft_formats(stored: Format) -> list[Format]:
    """In fewer bits than what is `stored`: of neurons that draft in exact mode."""
    return [format for format in (INT8, INT4) if format.bits < stored.rests_as().bits and compiled()]


def _gives_tiers(stored: Format) -> bool:
    """Whether neurons of all tiers can be made of what is `stored`."""
    return stored.is_plain or (stored.gives_chosen and stored.bits >= _tiers()[0].bits)


def _tiers() -> tuple[Format, ...]:
    """From the most bits to the fewest."""
    return tuple(format for format in every() if format.is_tier)
