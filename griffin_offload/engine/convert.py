"""Converting a checkpoint: every matrix of the decoder layers quantised once, one shard per layer.

A shard gets its name when it is whole, and the index is written last: until then a note lies in the directory that
makes every command refuse it, and the same conversion continue it.
"""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from griffin_offload.blocks.base import Block
from griffin_offload.blocks.layouts import build_on_meta, find_feed_forwards
from griffin_offload.blocks.replace import linear_names
from griffin_offload.blocks.sizes import model_shape
from griffin_offload.checkpoint.base import Checkpoint
from griffin_offload.checkpoint.converted import ConversionInfo, check_shard
from griffin_offload.checkpoint.files import check_name, one_writer, renamed, temporary_name, write_text
from griffin_offload.checkpoint.mapped import FilePages
from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.checkpoint.safetensors import INDEX, UNFINISHED
from griffin_offload.checkpoint.tied_head import said_untied
from griffin_offload.devices.memory import OutOfMemoryAsError
from griffin_offload.engine.build import build
from griffin_offload.engine.calibration import Inputs, visit_inputs
from griffin_offload.engine.load import check_stored
from griffin_offload.errors import CheckpointError, DoesNotFit, GriffinError, UsageError, one_line
from griffin_offload.formats import FLOATS, Format, get
from griffin_offload.formats.base import Tensors
from griffin_offload.formats.compensation import Compensation
from griffin_offload.formats.translated import stored_bytes
from griffin_offload.transformers_api import StockModel
from griffin_offload.units import format_bytes

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all) after each tensor."""
# Beside the tensors: headers, index, tokenizer.
MARGIN_BYTES = 50_000_000
# Our temporary names, and those that safetensors writes under before it renames to ours.
_HALVES = (".*.tmp", ".tmp*")


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
    directory = Path(os.path.expanduser(out))
    check_name(directory)
    if not checkpoint.precision.is_plain:
        raise UsageError(f"{checkpoint.directory} is converted to {checkpoint.precision} already: give the original")
    meta = build_on_meta(checkpoint.config, checkpoint.dtype)
    check_stored(checkpoint, sum(parameter.nbytes for parameter in meta.parameters()))
    format = get(precision)
    shape = model_shape(meta, format, format, get(tables))
    with _failures_named(directory), contextlib.closing(checkpoint.watched()) as files, _locked(directory):
        files.check()
        mark = ConversionInfo(precision, checkpoint.fingerprint(), tables)
        finished = _finished_shards(directory, mark)
        _check_disk(directory, shape.weight_bytes - sum(path.stat().st_size for path in finished))
        write_text(directory / UNFINISHED, json.dumps(asdict(mark)))
        weight_map = _write_shards(checkpoint, directory, mark, progress)
        files.check()
        _write_rest(checkpoint, directory, mark, weight_map)
    shards = set(weight_map.values())
    return Conversion(
        directory=directory,
        precision=precision,
        shards=len(shards),
        resumed_shards=len(finished),
        read_bytes=checkpoint.weight_bytes,
        written_bytes=sum((directory / name).stat().st_size for name in shards),
    )


@contextlib.contextmanager
def _failures_named(directory: Path) -> Iterator[None]:
    remedy = "close other programs; finished shards are kept, run the same command again"
    try:
        with OutOfMemoryAsError("converting", remedy):
            yield
    except (OSError, SafetensorError) as error:
        raise GriffinError(
            f"{directory} cannot be written ({one_line(error)}); finished shards are kept, run the same command again"
        ) from error


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Make the directory and keep other conversions out of it: they would remove each other's temporary files."""
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file: nothing is overwritten, give a new directory")
    directory.mkdir(parents=True, exist_ok=True)
    with one_writer(directory, "conversion"):
        yield


def _finished_shards(directory: Path, mark: ConversionInfo) -> list[Path]:
    """What the same conversion finished before it was interrupted, its halves deleted; UsageError when the directory
    holds anything else."""
    note = directory / UNFINISHED
    halves = {path for pattern in _HALVES for path in directory.glob(pattern)}
    if note.is_file():
        if _read_note(note) != asdict(mark):
            raise UsageError(f"{directory} holds an unfinished conversion of another model or precision: remove it")
    elif set(directory.iterdir()) - {temporary_name(note)}:
        raise UsageError(f"{directory} exists already: nothing is overwritten, give a new directory")
    for path in halves:
        path.unlink()
    shards = sorted(directory.glob("*.safetensors"))
    for path in shards:
        try:
            check_shard(path, mark)
        except CheckpointError as error:
            raise CheckpointError(
                f"{path} is damaged or of another conversion ({one_line(error)}): remove it and run the same command "
                "again"
            ) from error
    return shards


def _read_note(note: Path) -> Any:
    try:
        return json.loads(note.read_bytes())
    except ValueError:
        return None


def _check_disk(directory: Path, missing_bytes: int) -> None:
    free, needed = shutil.disk_usage(directory).free, missing_bytes + MARGIN_BYTES
    if needed > free and missing_bytes > 0:
        raise DoesNotFit(
            f"the conversion needs {format_bytes(needed)} on the disk of {directory}, {format_bytes(free)} are free"
        )


def _write_shards(
    checkpoint: Checkpoint, directory: Path, mark: ConversionInfo, progress: Progress | None
) -> dict[str, str]:
    """Every shard that is not there yet; the file of every tensor."""
    model = build(checkpoint)
    decoder, blocks = find_feed_forwards(model, checkpoint.config.get_text_config().num_hidden_layers)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    groups = [(f"{prefix}.{i}.", layer, block) for i, (layer, block) in enumerate(zip(decoder, blocks, strict=True))]
    # As they are mapped: during a forward other numbers may be in their places.
    parameters = [dict(layer.named_parameters()) for layer in decoder]
    names = [f"model-{i + 1:05d}-of-{len(groups) + 1:05d}.safetensors" for i in range(len(groups) + 1)]
    weight_map: dict[str, str] = {}
    format = get(mark.precision)
    missed = _Missed(format)
    with contextlib.closing(_Reader(model, checkpoint, progress)) as reader:

        def write_layer(index: int, inputs: Inputs) -> None:
            path, (start, layer, block) = directory / names[index], groups[index]
            if path.is_file():
                reader.skip(parameters[index].values())
            else:
                quantizing = _Quantizing(format, checkpoint.dtype, inputs, missed)
                _write_shard(path, _layer_tensors(start, layer, block, parameters[index], reader, quantizing), mark)
            weight_map.update(dict.fromkeys(_names_in(path), names[index]))

        if format.wants_importance and any(not (directory / name).is_file() for name in names[:-1]):
            visit_inputs(checkpoint, model, decoder, blocks, write_layer)
        else:
            for index in range(len(groups)):
                write_layer(index, {})
        path = directory / names[-1]
        if not path.is_file():
            _write_shard(path, _tensors_outside(model, prefix, mark, checkpoint.dtype, reader), mark)
    missed.warn()
    return weight_map | dict.fromkeys(_names_in(path), names[-1])


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


class _Reader:
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
    reader: _Reader,
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
    model: StockModel, prefix: str, mark: ConversionInfo, dtype: torch.dtype, reader: _Reader
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


def _names_in(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return list(file.keys())


def _write_shard(path: Path, tensors: dict[str, Tensor], mark: ConversionInfo) -> None:
    with renamed(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, mark.metadata())


def _write_rest(checkpoint: Checkpoint, directory: Path, mark: ConversionInfo, weight_map: dict[str, str]) -> None:
    """Tokenizer, config, and last the index, which makes the directory a checkpoint."""
    checkpoint.write_beside(directory, {"config.json", INDEX})
    config = checkpoint.config_json()
    if checkpoint.untied:
        config = said_untied(config)
    write_text(directory / "config.json", json.dumps(config | {"quantization_config": mark.config()}, indent=2))
    total = sum((directory / name).stat().st_size for name in set(weight_map.values()))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(directory / INDEX, json.dumps(index, indent=2))
    (directory / UNFINISHED).unlink()
