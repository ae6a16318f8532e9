"""What a shard of a converted copy is made of: tensors of a layer read one at a time, quantised, and written."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from griffin_offload.blocks.base import Block
from griffin_offload.blocks.experts import EXPERTS_INPUT, Experts, is_experts
from griffin_offload.blocks.replace import linear_names
from griffin_offload.checkpoint.base import Checkpoint
from griffin_offload.checkpoint.converted import ConversionInfo, save_with_records
from griffin_offload.checkpoint.files import renamed
from griffin_offload.checkpoint.mapped import FilePages
from griffin_offload.checkpoint.safetensors import METADATA_KEY
from griffin_offload.engine.calibration import LayerInputs
from griffin_offload.errors import CheckpointError
from griffin_offload.formats import Format, get
from griffin_offload.formats.base import Tensors
from griffin_offload.formats.compensation import Compensation
from griffin_offload.formats.expert_form import RECORDS, ExpertForm
from griffin_offload.formats.stacked import row_parts
from griffin_offload.formats.translated import stored_bytes
from griffin_offload.transformers_api import StockModel

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all) after each tensor."""


@dataclass
class Missed:
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

    def __init__(self, format: Format, dtype: torch.dtype, inputs: LayerInputs, missed: Missed) -> None:
        self._format, self._dtype, self._inputs, self._missed = format, dtype, inputs, missed
        self._last: tuple[Tensor, Compensation] | None = None
        """Of modules that have the same inputs and follow one another."""

    def quantize(self, prefix: str, name: str, matrix: Tensor, *, is_down: bool) -> Tensors:
        """The stored tensors of `matrix` [O, I], the module `name` of the layer."""
        own = self._compensation(name, is_down=is_down)
        found = self._format.quantize(matrix, self._dtype, is_down=is_down, compensation=own)
        self._missed.count(prefix + name, matrix, found, is_down=is_down)
        self.take(name, found, is_down=is_down)
        return found

    def knows(self, name: str) -> bool:
        """Whether the inputs of the module `name` are known."""
        return name in self._inputs

    def take(self, name: str, found: Tensors, *, is_down: bool) -> None:
        """Let what follows know the stored tensors of the module `name`."""
        if self.knows(name):
            neurons = torch.arange(len(found["weight"]), dtype=torch.long, device="cpu")
            dtype = self._inputs[name].dtype
            self._inputs.rounded(name, self._format.chosen_floats(found, neurons, dtype, is_down=is_down))

    @property
    def quantises(self) -> bool:
        """Whether matrices outside of experts change."""
        return not self._format.is_plain

    def form_of(self, block: Experts) -> ExpertForm:
        """How experts of `block` are written."""
        own, importance = self._format.rests_as(), self._inputs.get(EXPERTS_INPUT)
        return replace(block.form, precision=own, records=self._dtype, importance=importance)

    def _compensation(self, name: str, *, is_down: bool) -> Compensation | None:
        x = self._inputs.get(name)
        if x is None:
            return None
        if self._last is None or self._last[0] is not x:
            self._last = None  # before the next: two take twice the memory
            behind = self._inputs.behind_rounded(name)
            self._last = x, self._format.compensation(behind, is_down=is_down, meant=x)
        return self._last[1]


def take_shard(path: Path, prefix: str, layer: nn.Module, block: Block, quantizing: Quantizing) -> None:
    """Let layers behind it know a shard that is there already."""
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        for name in filter(quantizing.knows, linear_names(layer)):
            own = {key: f"{prefix}{name}.{key}" for key in ("weight", "groups", "scale", "input_scale")}
            found = {key: file.get_tensor(stored) for key, stored in own.items() if stored in names}
            quantizing.take(name, found, is_down=block.is_down(layer.get_submodule(name)))


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
                matrix = values if isinstance(module, nn.Linear) else values.t()  # Conv1D
                try:
                    found = quantizing.quantize(prefix, owner, matrix, is_down=block.is_down(module))
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
    form, full = quantizing.form_of(block), block.full()
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
