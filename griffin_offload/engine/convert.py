"""Converting a checkpoint: every matrix of the decoder layers quantised once, one shard per layer."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from griffin_offload.blocks.base import Block
from griffin_offload.blocks.layouts import build_on_meta, find_feed_forwards
from griffin_offload.blocks.replace import linear_names
from griffin_offload.blocks.sizes import model_shape
from griffin_offload.checkpoint.base import Checkpoint
from griffin_offload.checkpoint.converted import ConversionInfo, check_shard
from griffin_offload.checkpoint.mapped import FilePages
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.engine.build import build
from griffin_offload.engine.calibration import Inputs, visit_inputs
from griffin_offload.engine.copy_directory import CopyDirectory, shard_names
from griffin_offload.engine.load import check_stored
from griffin_offload.errors import CheckpointError, UsageError
from griffin_offload.formats import FLOATS, Format, get
from griffin_offload.formats.base import Tensors
from griffin_offload.formats.compensation import Compensation
from griffin_offload.formats.translated import stored_bytes
from griffin_offload.transformers_api import StockModel

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all) after each tensor."""


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
    format = get(precision)
    shape = model_shape(meta, format, format, get(tables))
    mark = ConversionInfo(precision, checkpoint.fingerprint(), tables)
    directory = CopyDirectory(out, "conversion", asdict(mark), mark.metadata(), partial(check_shard, mark=mark))
    with directory.writing() as finished, contextlib.closing(checkpoint.watched()) as files:
        files.check()
        directory.begin(shape.weight_bytes)
        names = _write_shards(checkpoint, directory, mark, progress)
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


def _write_shards(
    checkpoint: Checkpoint, directory: CopyDirectory, mark: ConversionInfo, progress: Progress | None
) -> list[str]:
    """Every shard that is not there yet; the names of all."""
    model = build(checkpoint)
    decoder, blocks = find_feed_forwards(model, checkpoint.config.get_text_config().num_hidden_layers)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    groups = [(f"{prefix}.{i}.", layer, block) for i, (layer, block) in enumerate(zip(decoder, blocks, strict=True))]
    # As they are mapped: during a forward other numbers may be in their places.
    parameters = [dict(layer.named_parameters()) for layer in decoder]
    names = shard_names(len(groups) + 1)
    format = get(mark.precision)
    missed = _Missed(format)
    with contextlib.closing(Reader(model, checkpoint, progress)) as reader:

        def write_layer(index: int, inputs: Inputs) -> None:
            start, layer, block = groups[index]
            if (directory.path / names[index]).is_file():
                reader.skip(parameters[index].values())
            else:
                quantizing = _Quantizing(format, checkpoint.dtype, inputs, missed)
                tensors = _layer_tensors(start, layer, block, parameters[index], reader, quantizing)
                directory.write_shard(names[index], tensors)

        if format.wants_importance and any(not (directory.path / name).is_file() for name in names[:-1]):
            visit_inputs(checkpoint, model, decoder, blocks, write_layer)
        else:
            for index in range(len(groups)):
                write_layer(index, {})
        if not (directory.path / names[-1]).is_file():
            directory.write_shard(names[-1], _tensors_outside(model, prefix, mark, checkpoint.dtype, reader))
    missed.warn()
    return names


@dataclass
class _Missed:
    """Large weights that `format` does not bring back, and where it misses worst."""

    format: Format
    weights: int = 0
    worst: float = 0.0
    where: str = ""

    def count(self, name: str, matrix: Tensor, found: Tensors, *, is_down: bool) -> None:
        """Those of `matrix` [O, I], of which `found` are the stored tensors."""
        weights, worst = self.format.missed(matrix, found, is_down=is_down)
        self.weights += weights
        if weights and worst > self.worst:
            self.worst, self.where = worst, name

    def warn(self) -> None:
        if self.weights:
            warnings.warn(
                f"{self.weights} large weights come back from {self.format} more than "
                f"{self.format.missed_from:.0%} off, the worst by {self.worst:.0%}, in "
                f"{self.where}: compare it with int8 by eval ppl",
                stacklevel=2,
            )


class Reader:
    """Reads mapped tensors one at a time and drops their pages afterwards, so that memory stays flat."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, progress: Progress | None) -> None:
        # Held against what was checked, not what was mapped: a finished shard is kept, and has to be right.
        self._pages = FilePages(list(model.parameters()), evict=True, known=checkpoint.states)
        self._done, self._total, self._progress = 0, checkpoint.weight_bytes, progress

    @contextlib.contextmanager
    def reading(self, tensor: Tensor) -> Iterator[Tensor]:
        with self._pages.reading([tensor]) as found:
            yield found[0]
        self._count(stored_bytes(tensor))

    def copy(self, tensor: Tensor) -> Tensor:
        """In memory of its own."""
        with self.reading(tensor) as values:
            return values.clone()

    def close(self) -> None:
        self._pages.close()

    def skip(self, tensors: Iterable[Tensor]) -> None:
        self._count(sum(map(stored_bytes, tensors)))

    def _count(self, size_bytes: int) -> None:
        self._done += size_bytes
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


class _Quantizing:
    """How matrices of a layer are quantised, whose `inputs` may be known."""

    def __init__(self, format: Format, dtype: torch.dtype, inputs: Inputs, missed: _Missed) -> None:
        self._format, self._dtype, self._inputs, self._missed = format, dtype, inputs, missed
        self._last: tuple[Tensor, Compensation] | None = None
        """Of modules that have the same inputs and follow one another."""

    def quantize(self, prefix: str, name: str, matrix: Tensor, *, is_down: bool) -> Tensors:
        """The stored tensors of `matrix` [O, I], the module `name` of the layer."""
        own = self._compensation(name, is_down=is_down)
        found = self._format.quantize(matrix, self._dtype, is_down=is_down, compensation=own)
        self._missed.count(prefix + name, matrix, found, is_down=is_down)
        return found

    def _compensation(self, name: str, *, is_down: bool) -> Compensation | None:
        x = self._inputs.get(name)
        if x is None:
            return None
        if self._last is None or self._last[0] is not x:
            self._last = None  # before the next: two take twice the memory
            self._last = x, self._format.compensation(x, is_down=is_down)
        return self._last[1]


def _layer_tensors(
    prefix: str,
    layer: nn.Module,
    block: Block,
    parameters: Mapping[str, Tensor],
    reader: Reader,
    quantizing: _Quantizing,
) -> dict[str, Tensor]:
    linears = {name: layer.get_submodule(name) for name in linear_names(layer)}
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        owner, _, attribute = name.rpartition(".")
        with reader.reading(parameter) as values:
            if owner in linears and attribute == "weight":
                module = linears[owner]
                matrix = values if isinstance(module, nn.Linear) else values.t()  # Conv1D
                try:
                    found = quantizing.quantize(prefix, owner, matrix, is_down=block.is_down(module))
                except CheckpointError as error:
                    raise CheckpointError(f"{prefix}{name}: {error}") from error
                tensors |= {f"{prefix}{owner}.{key}": tensor for key, tensor in found.items()}
            else:
                tensors[prefix + name] = values.clone()
    return tensors


def _tensors_outside(
    model: StockModel, prefix: str, mark: ConversionInfo, dtype: torch.dtype, reader: Reader
) -> dict[str, Tensor]:
    """Embeddings, head, last norm, and the buffers that a checkpoint holds; all but the first two as they are."""
    tables_format = get(mark.tables)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()] if not tables_format.is_plain else []
    table_ids = {id(module.weight) for module in tables if module is not None}
    parameters = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(parameters)
    tensors: dict[str, Tensor] = {}
    for name, tensor in (model.state_dict() | parameters).items():
        is_buffer = name not in parameters and name not in tied
        if is_buffer or (name in parameters and not name.startswith(f"{prefix}.")):
            with reader.reading(tensor) as values:
                if id(parameters.get(name)) in table_ids:
                    owner = name.rpartition(".")[0]
                    found = tables_format.quantize(values, dtype, is_down=False)
                    tensors |= {f"{owner}.{key}": quantised for key, quantised in found.items()}
                else:
                    tensors[name] = values.clone()
    return tensors
