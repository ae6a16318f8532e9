"""Converting a checkpoint: every matrix of the decoder layers quantised once, one shard per layer."""

import contextlib
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from griffin_offload.blocks.base import Block
from griffin_offload.blocks.experts import Experts
from griffin_offload.blocks.layouts import build_on_meta, find_feed_forwards
from griffin_offload.blocks.model_shape import model_shape
from griffin_offload.blocks.replace import expert_names, finer_names, small_names
from griffin_offload.checkpoint.base import Checkpoint
from griffin_offload.checkpoint.converted import ConversionInfo, check_shard
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.engine.build import build
from griffin_offload.engine.calibration import Inputs, visit_inputs
from griffin_offload.engine.load import check_stored
from griffin_offload.engine.precisions import held_finer, small_beside
from griffin_offload.engine.shards import (
    CopyDirectory,
    Missed,
    Progress,
    Quantizing,
    Reader,
    layer_tensors,
    shard_names,
    tensors_outside,
    write_with_experts,
)
from griffin_offload.errors import UsageError
from griffin_offload.formats import FLOATS, INT4, Format, get
from griffin_offload.formats.expert_form import RECORD_VERSION
from griffin_offload.formats.linear import reads_head_itself
from griffin_offload.transformers_api import StockModel


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    directory: Path
    precision: str
    shards: int
    resumed_shards: int
    """Shards that an earlier, interrupted conversion had finished."""
    read_bytes: int
    written_bytes: int


@torch.no_grad()
def convert(
    model: str | Path,
    out: str | Path,
    precision: str,
    *,
    tables: str = FLOATS.name,
    offline: bool = False,
    adapter: str | Path | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write `model` in `precision`, a weight format by its name, its embeddings and head in `tables` ("none" or
    "int8"), with the LoRA `adapter` merged into it.

    The directory `out` must not exist yet, or hold the same conversion unfinished. Raises UsageError, ModelError,
    DoesNotFit (the disk) or GriffinError (writing)."""
    checkpoint = open_checkpoint(model, offline=offline, adapter=adapter)
    if not checkpoint.precision.is_plain:
        raise UsageError(f"{checkpoint.directory} is converted to {checkpoint.precision} already: give the original")
    meta = build_on_meta(checkpoint.config, checkpoint.dtype)
    check_stored(checkpoint, sum(parameter.nbytes for parameter in meta.parameters()))
    if not get(tables).is_plain and reads_head_itself(type(meta)):
        raise UsageError(
            f"the code of {checkpoint.config.model_type} reads the head's matrix itself, so it stays in 16 bit: leave "
            "out --embeddings"
        )
    format = get(precision)
    layers = list(zip(*find_feed_forwards(meta, _layers_of(checkpoint)), strict=True))
    has_experts = any(isinstance(block, Experts) for _, block in layers)
    if format.holds and has_experts:
        raise UsageError(f"experts are of one format each, {precision} are of FF neurons: give int4")
    if format.is_plain and not has_experts:
        raise UsageError(f"{checkpoint.directory} has no experts, all that {precision} rewrites: give int8 or int4")
    held = held_finer(checkpoint) if format is INT4 else {}
    finer = small_beside(format.outside(), checkpoint)
    shape = model_shape(meta, format, format, get(tables), finer=finer, held=held)
    records = RECORD_VERSION if has_experts else 0
    small = "" if shape.finer is None else shape.finer.name
    finer_experts = _finer_experts(layers, held)
    mark = ConversionInfo(precision, checkpoint.fingerprint(), tables, records, small, finer_experts)
    directory = CopyDirectory(out, "conversion", mark.entries(), mark.metadata(), partial(check_shard, mark=mark))
    if not held:
        _warn_of_finer(checkpoint, meta, format)
    with directory.writing() as finished, contextlib.closing(checkpoint.watched()) as files:
        files.check()
        directory.begin(shape.weight_bytes)
        names = _write_shards(checkpoint, directory, mark, held, progress)
        files.check()
        directory.finish(checkpoint, checkpoint.config_json() | {"quantization_config": mark.config()}, names)
    return Conversion(
        directory=directory.path,
        precision=precision,
        shards=len(names),
        resumed_shards=len(finished),
        read_bytes=checkpoint.weight_bytes,
        written_bytes=sum((directory.path / name).stat().st_size for name in names),
    )


def _finer_experts(layers: Sequence[tuple[nn.Module, Block]], held: Mapping[int, set[str]]) -> dict[str, list[str]]:
    """Of what is `held` in more bits, by layer the names of what every expert has."""
    found = {str(i): sorted(names & expert_names(*layers[i]).keys()) for i, names in sorted(held.items())}
    return {layer: names for layer, names in found.items() if names}


def _warn_of_finer(checkpoint: Checkpoint, meta: StockModel, format: Format) -> None:
    """Where a copy in `format` holds less than its file, and less than loading the file itself would."""
    if small_beside(format.outside(), checkpoint) is None:
        return
    layers, held = find_feed_forwards(meta, _layers_of(checkpoint)), held_finer(checkpoint)
    in_both = [held.get(i, set()) - small_names(*layer) for i, layer in enumerate(zip(*layers, strict=True))]
    coarser = sum(map(len, in_both))
    if coarser:
        warnings.warn(
            f"{checkpoint.directory} holds {coarser} matrices in more than four bits, the copy will hold them in "
            f"{format}: the file itself rests nearer to its numbers, the copy loads faster",
            stacklevel=3,
        )


def _layers_of(checkpoint: Checkpoint) -> int:
    return int(checkpoint.config.get_text_config().num_hidden_layers)


def _write_shards(
    checkpoint: Checkpoint,
    directory: CopyDirectory,
    mark: ConversionInfo,
    held: Mapping[int, Collection[str]],
    progress: Progress | None,
) -> list[str]:
    """Every shard that is not there yet; the names of all."""
    model = build(checkpoint)
    decoder, blocks = find_feed_forwards(model, _layers_of(checkpoint))
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    groups = [(f"{prefix}.{i}.", layer, block) for i, (layer, block) in enumerate(zip(decoder, blocks, strict=True))]
    # As they are mapped: during a forward other numbers may be in their places.
    parameters = [dict(layer.named_parameters()) for layer in decoder]
    names = shard_names(len(groups) + 1)
    format = get(mark.precision)
    missed = Missed(format)
    with contextlib.closing(Reader(model, checkpoint, progress)) as reader:

        def write_layer(index: int, inputs: Inputs) -> None:
            path, (start, layer, block) = directory.path / names[index], groups[index]
            if path.is_file():
                reader.skip(parameters[index].values())
            else:
                finer = frozenset[str]() if not mark.small else finer_names(layer, block, held.get(index, ()))
                quantizing = Quantizing(format, checkpoint.dtype, inputs, missed, finer)
                tensors = layer_tensors(start, layer, block, parameters[index], reader, quantizing)
                if isinstance(block, Experts):
                    write_with_experts(path, tensors, start, layer, block, reader, quantizing, mark)
                else:
                    directory.write_shard(names[index], tensors)

        if format.wants_importance and any(not (directory.path / name).is_file() for name in names[:-1]):
            visit_inputs(checkpoint, model, decoder, blocks, write_layer)
        else:
            for index in range(len(groups)):
                write_layer(index, {})
        if not (directory.path / names[-1]).is_file():
            directory.write_shard(names[-1], tensors_outside(model, prefix, mark, checkpoint.dtype, reader))
    missed.warn()
    return names
