"""Shards of a copy of a checkpoint: what one is made of (tensors of a layer read one at a time, quantised), and the
directory that they are written into, one after the other.

A shard gets its name when it is whole, and the index is written last: until then a note lies in the directory that
makes every command refuse it, and the same copy continue it.
"""

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from griffin_offload.blocks.base import Block
from griffin_offload.blocks.experts import EXPERTS_INPUT, Experts, is_experts
from griffin_offload.blocks.replace import expert_names, fits_rows, linear_names
from griffin_offload.checkpoint.base import Checkpoint
from griffin_offload.checkpoint.converted import ConversionInfo, save_with_records
from griffin_offload.checkpoint.files import check_name, one_writer, renamed, temporary_name, write_text
from griffin_offload.checkpoint.mapped import FilePages
from griffin_offload.checkpoint.safetensors import INDEX, METADATA_KEY, UNFINISHED, said_untied
from griffin_offload.devices.memory import OutOfMemoryAsError
from griffin_offload.engine.calibration import Inputs
from griffin_offload.errors import CheckpointError, DoesNotFit, GriffinError, UsageError, one_line, why_unusable
from griffin_offload.formats import SMALL_MATRICES, Format, get
from griffin_offload.formats.base import Tensors
from griffin_offload.formats.compensation import Compensation, has_huge_token
from griffin_offload.formats.expert_form import RECORDS, ExpertForm
from griffin_offload.formats.translated import Codes, TranslatedTensor, row_parts, stored_bytes
from griffin_offload.transformers_api import StockModel
from griffin_offload.units import format_bytes

# Beside the tensors: headers, index, tokenizer.
MARGIN_BYTES = 50_000_000
UNMEASURED = ".measuring.json"
"""The same note in an export that is whole, and has no card yet."""
PART = ".part"
"""Ends the name of a file that grows layer by layer."""
# Our temporary names, and those that safetensors writes under before it renames to ours.
_HALVES = (".*.tmp", ".tmp*")


class CopyDirectory:
    """`note` (JSON values) tells two copies apart, `metadata` goes into every shard, `check` raises CheckpointError for
    a finished shard of another copy. `kind` is what messages call it: "conversion"."""

    def __init__(
        self,
        path: str | Path,
        kind: str,
        note: Mapping[str, object],
        metadata: dict[str, str],
        check: Callable[[Path], None],
        *,
        measured: bool = False,
    ) -> None:
        """`measured`: the same copy goes on, too, where it is whole and `UNMEASURED` is there."""
        self.path = Path(os.path.expanduser(path))
        check_name(self.path)
        self._kind, self._note, self._metadata, self._check = kind, dict(note), metadata, check
        self._measured = measured

    @contextlib.contextmanager
    def writing(self) -> Iterator[list[Path]]:
        """Make the directory and keep others out of it, who would remove our temporary files; the shards that the same
        copy has finished before. UsageError when it holds anything else, GriffinError for what fails meanwhile."""
        with self._failures_named():
            check_place(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            with one_writer(self.path, self._kind):
                yield self._finished()

    @contextlib.contextmanager
    def _failures_named(self) -> Iterator[None]:
        remedy = "finished shards are kept, run the same command again"
        doing = {"conversion": "converting"}.get(self._kind, f"{self._kind}ing")
        try:
            with OutOfMemoryAsError(doing, f"close other programs; {remedy}"):
                yield
        except (OSError, SafetensorError) as error:
            reason, more = why_unusable(self.path, error, "write to"), f"; {remedy}" * os.path.isdir(self.path)
            raise GriffinError(f"{self.path} cannot be written ({reason}){more}") from error

    def _finished(self) -> list[Path]:
        """What the same copy finished before it was interrupted, its halves deleted."""
        note = _note_in(self.path)
        halves = {path for pattern in _HALVES for path in self.path.glob(pattern)}
        if note.is_file() and _read_note(note) != self._note:
            other = {"export": "another model, form or choice"}.get(self._kind, "another model or precision")
            raise UsageError(f"{self.path} holds an unfinished {self._kind} of {other}: remove it")
        for path in halves:
            path.unlink()
        shards = sorted(self.path.glob("*.safetensors"))
        for path in shards:
            try:
                self._check(path)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{path} is damaged or of another {self._kind} ({one_line(error)}): remove it and run the same "
                    "command again"
                ) from error
        return shards

    def check(self, nbytes: int) -> None:
        """Before anything is written: `check_place`, UsageError where it cannot be, and DoesNotFit as `begin`."""
        try:
            check_place(self.path)
            there = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
            with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=there):
                self._check_room(nbytes, there)
        except OSError as error:
            raise UsageError(f"{self.path} cannot be written: {why_unusable(self.path, error, 'write to')}") from error

    def begin(self, nbytes: int) -> None:
        """Of `nbytes` in all shards, those that are missing have to fit the disk, or DoesNotFit; from now on no command
        takes the directory for a checkpoint."""
        self._check_room(nbytes, self.path)
        write_text(self.path / UNFINISHED, json.dumps(self._note))

    def _check_room(self, nbytes: int, place: Path) -> None:
        there = [*self.path.glob("*.safetensors"), *self.path.glob(f"*{PART}")]
        missing = nbytes - sum(path.stat().st_size for path in there)
        free, needed = shutil.disk_usage(place).free, missing + MARGIN_BYTES
        if needed > free and missing > 0:
            raise DoesNotFit(
                f"the {self._kind} needs {format_bytes(needed)} on the disk of {self.path}, {format_bytes(free)} are "
                "free"
            )

    def write_shard(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Whole or not at all."""
        with renamed(self.path / name) as temporary:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, self._metadata)

    def finish(self, checkpoint: Checkpoint, config: dict[str, object], names: list[str]) -> None:
        """Tokenizer, config, and last the index over the shards `names`, which makes the directory a checkpoint."""
        checkpoint.write_beside(self.path, {"config.json", INDEX})
        config = said_untied(config) if checkpoint.untied else config
        write_text(self.path / "config.json", json.dumps(config, indent=2))
        weight_map = {key: name for name in names for key in names_in(self.path / name)}
        total = sum((self.path / name).stat().st_size for name in names)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(self.path / INDEX, json.dumps(index, indent=2))
        self.whole()

    def whole(self) -> None:
        """From now on it is what it says."""
        note = self.path / UNFINISHED
        if self._measured:
            note.replace(self.path / UNMEASURED)
        else:
            note.unlink()


def check_place(path: Path) -> None:
    """UsageError for what is there and is no unfinished copy. OSError."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file: nothing is overwritten, give a new directory")
    note = _note_in(path)
    if path.is_dir() and not note.is_file() and set(path.iterdir()) - {temporary_name(note)}:
        raise UsageError(f"{path} exists already: nothing is overwritten, give a new directory")


def shard_names(count: int) -> list[str]:
    """Of so many shards, in order."""
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def names_in(path: Path) -> list[str]:
    """Of the tensors of a shard."""
    with safe_open(path, framework="np") as file:
        return list(file.keys())


def _note_in(path: Path) -> Path:
    unmeasured = path / UNMEASURED
    return unmeasured if unmeasured.is_file() and not (path / UNFINISHED).is_file() else path / UNFINISHED


def _read_note(note: Path) -> Any:
    try:
        return json.loads(note.read_bytes())
    except ValueError:
        return None


Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all) after each tensor."""


@dataclass
class Missed:
    """Large weights that `format` does not bring back, and where it misses worst."""

    format: Format
    weights: int = 0
    worst: float = 0.0
    where: str = ""

    def count(self, name: str, matrix: Tensor, format: Format, found: Tensors, *, is_down: bool) -> None:
        """Those of `matrix` [O, I], of which `found` are the tensors as `format` stores them."""
        weights, worst = format.missed(matrix, found, is_down=is_down)
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

    @contextlib.contextmanager
    def reading_expert(self, full: list[Tensor], expert: int) -> Iterator[None]:
        """Inside it an expert of `full` can be read."""
        parts = [part for tensor in full for part in row_parts(tensor, expert)]
        with self._pages.reading(parts):
            yield
        self.skip(parts)

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


class Quantizing:
    """How matrices of a layer are quantised, whose `inputs` may be known."""

    def __init__(
        self, format: Format, dtype: torch.dtype, inputs: Inputs, missed: Missed, finer: frozenset[str] = frozenset()
    ) -> None:
        """`finer` are modules, and matrices of all experts, that are written in SMALL_MATRICES."""
        self._format, self._dtype, self._inputs, self._missed, self._finer = format, dtype, inputs, missed, finer
        self._last: tuple[Tensor, Compensation] | None = None
        """Of modules that have the same inputs and follow one another."""

    def quantize(
        self, prefix: str, name: str, matrix: Tensor, codes: Codes | None, *, neurons: bool, is_down: bool
    ) -> Tensors:
        """The stored tensors of `matrix` [O, I], the module `name` of the layer; whether it holds `neurons`, and the
        `codes` of its rows, if they lie on grids: making up for errors would leave them.

        A down projection lies in rows where it has such codes, and where some tokens are huge: an output's step can
        be one that gives the few weights exactly that these hang on, a neuron's serves many outputs."""
        format = self._format if neurons else self._format.outside()
        format = SMALL_MATRICES if name in self._finer else format
        x = self._inputs.get(name)
        if is_down and fits_rows(format, *matrix.shape):
            is_down = codes is None and (x is None or not has_huge_token(x))
        found = None if codes is None or is_down else format.taken_over(codes, self._dtype)
        if found is None:
            own = self._compensation(x, is_down=is_down) if format.wants_importance else None
            found = format.quantize(matrix, self._dtype, is_down=is_down, compensation=own)
        self._missed.count(prefix + name, matrix, format, found, is_down=is_down)
        return found

    @property
    def quantises(self) -> bool:
        """Whether matrices outside of experts change."""
        return not self._format.is_plain

    def form_of(self, layer: nn.Module, block: Experts) -> ExpertForm:
        """How experts of `block` are written."""
        own, importance = self._format.rests_as(), self._inputs.get(EXPERTS_INPUT)
        finer = frozenset(matrix for name, matrix in expert_names(layer, block).items() if name in self._finer)
        form = replace(block.form, finer=SMALL_MATRICES, finer_ones=finer)
        return replace(form, precision=own, records=self._dtype, importance=importance)

    def _compensation(self, x: Tensor | None, *, is_down: bool) -> Compensation | None:
        if x is None:
            return None
        if self._last is None or self._last[0] is not x:
            self._last = None  # before the next: two take twice the memory
            self._last = x, self._format.compensation(x, is_down=is_down)
        return self._last[1]


def layer_tensors(
    prefix: str,
    layer: nn.Module,
    block: Block,
    parameters: Mapping[str, Tensor],
    reader: Reader,
    quantizing: Quantizing,
) -> dict[str, Tensor]:
    linears = {name: layer.get_submodule(name) for name in linear_names(layer)} if quantizing.quantises else {}
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        owner, _, attribute = name.rpartition(".")
        if is_experts(layer.get_submodule(owner)):
            continue  # they are written one by one
        with reader.reading(parameter) as values:
            if owner in linears and attribute == "weight":
                module = linears[owner]
                as_it_lies = isinstance(module, nn.Linear)
                matrix = values if as_it_lies else values.t()  # Conv1D
                codes = parameter.codes() if as_it_lies and isinstance(parameter, TranslatedTensor) else None
                try:
                    kind = {"neurons": module in block.linears, "is_down": block.is_down(module)}
                    found = quantizing.quantize(prefix, owner, matrix, codes, **kind)
                except CheckpointError as error:
                    raise CheckpointError(f"{prefix}{name}: {error}") from error
                tensors |= {f"{prefix}{owner}.{key}": tensor for key, tensor in found.items()}
            else:
                tensors[prefix + name] = values.clone()
    return tensors


def write_with_experts(
    path: Path,
    tensors: dict[str, Tensor],
    prefix: str,
    layer: nn.Module,
    block: Experts,
    reader: Reader,
    quantizing: Quantizing,
    mark: ConversionInfo,
) -> None:
    """A shard of `tensors`, and of the experts, of which one at a time is in memory."""
    form, full = quantizing.form_of(layer, block), block.full()
    shape = (block.neurons, replace(form, stored=form.precision).record_bytes)
    module = next(name for name, module in layer.named_modules() if module is block.module)

    def records() -> Iterator[Tensor]:
        for expert in range(block.neurons):
            with reader.reading_expert(full, expert):
                yield form.record(full, expert)

    with renamed(path) as temporary:
        name = f"{prefix}{module}.{RECORDS}"
        save_with_records(tensors, name, records(), shape, temporary, mark.metadata()[METADATA_KEY])


def tensors_outside(
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
