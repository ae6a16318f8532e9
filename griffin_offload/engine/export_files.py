"""What an export is written as: shards of safetensors, plain or packed as compressed-tensors has it, or one GGUF file.

Either way a layer at a time, and what is written is kept when the same export is interrupted and goes on.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from griffin_offload.blocks.base import Block
from griffin_offload.blocks.experts import Experts
from griffin_offload.blocks.layouts import build_on_meta, find_feed_forwards
from griffin_offload.checkpoint.base import Checkpoint
from griffin_offload.checkpoint.gguf_writing import GgufLayout
from griffin_offload.checkpoint.packed import write_packed
from griffin_offload.checkpoint.renaming import saved
from griffin_offload.config import ExportForm
from griffin_offload.engine.shards import PART, CopyDirectory, shard_names
from griffin_offload.errors import CheckpointError, UnsupportedModel, UsageError
from griffin_offload.formats import FLOATS
from griffin_offload.method.selection import neurons_kept
from griffin_offload.transformers_api import StockModel

Tensors = Mapping[str, Tensor]
GGUF_FILE = "model.gguf"
_GROUPS = (128, 64, 32)
"""Of inputs with a scale, the sizes that other engines have kernels for."""


@dataclass(frozen=True)
class Smaller:
    """The model that is written."""

    checkpoint: Checkpoint
    """Its source."""
    config: PretrainedConfig
    neurons: int
    """Or experts, of each layer."""
    axes: Mapping[str, int]
    """Along which tensors are shorter, by name; what has the same shape is not there."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, neurons: int) -> "Smaller":
        """With the one number of its config that makes all layers so, and changes nothing else but routers.
        UnsupportedModel where there is none, or where attention has as many experts."""
        text = checkpoint.config.get_text_config()
        model = build_on_meta(text, checkpoint.dtype)
        blocks = find_feed_forwards(model, text.num_hidden_layers)[1]
        experts = {block.neurons for block in blocks if isinstance(block, Experts)}
        before, wanted = _shapes(model), _with_neurons(model, blocks, neurons, bool(experts))
        for name, value in text.to_dict().items():
            if not (value is None or type(value) is int) or name not in (_EXPERTS if experts else _SIZES):
                continue
            smaller = type(text).from_dict(text.to_dict() | {name: neurons})
            with contextlib.suppress(CheckpointError):
                found = _shapes(build_on_meta(smaller, checkpoint.dtype))
                axes = {name: _cut(before[name], found.get(name, ()), neurons) for name in before}
                routers = {name for name in axes if experts and before[name] == wanted[name] and axes[name] is not None}
                others = sorted(name for name in routers if len(before[name]) > _ROUTER_AXES)
                if others:
                    raise UnsupportedModel(
                        f"{text.model_type}: {others[0]} has as many experts, which no prompt chooses"
                    )
                if found == wanted | {name: found[name] for name in routers}:
                    return cls(checkpoint, smaller, neurons, {n: axis for n, axis in axes.items() if axis is not None})
        unit = "experts" if experts else "neurons"
        raise UnsupportedModel(f"{text.model_type}: its config has no number for the {unit} of a layer")

    def on_meta(self) -> StockModel:
        """With the source's generation config."""
        model = build_on_meta(self.config, self.checkpoint.dtype)
        self.checkpoint.set_generation_config(model)
        return model


# What configs call it; the others have to stay as they are, whatever their value.
_SIZES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "ffn_intermediate_size", "d_ff")
_ROUTER_AXES = 2
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _with_neurons(
    model: StockModel, blocks: Sequence[Block], neurons: int, experts: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of `model` if its blocks (those of experts alone) had so many."""
    found = _shapes(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for block in blocks:
        if experts and not isinstance(block, Experts):
            continue
        specs = block.compact_specs((neurons,), (FLOATS,))
        for tensor, (shape, _) in zip(block.full(), specs, strict=True):
            found[names[id(tensor)]] = tuple(shape)
    return found


def _cut(before: tuple[int, ...], after: tuple[int, ...], count: int) -> int | None:
    """The one axis that became `count` long; None where that is not all that changed."""
    if len(before) != len(after):
        return None
    changed = [axis for axis, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
    return changed[0] if len(changed) == 1 and after[changed[0]] == count else None


class ExportFiles(Protocol):
    """Part 0 is the first layer; the last part is what lies outside of layers."""

    nbytes: int
    """About so many in all."""

    def has(self, part: int) -> bool:
        """Whether an earlier, interrupted export wrote it."""

    def write(self, part: int, tensors: Tensors) -> None:
        """Parts that are not there, in order."""

    def finish(self) -> int:
        """The rest of a checkpoint; bytes of all weights."""


# Multiples of which as many neurons are kept: the first that is not too large. 16-bit kernels of others want whole
# tiles, 4-bit ones whole groups of 128 inputs, and blocks of 32 are the least.
_MULTIPLES: dict[ExportForm, tuple[int, ...]] = {
    "unquantized": (64, 1),
    "w8a16": (128, 32),
    "w4a16": (128, 32),
    "gguf": (64, 1),
    "gguf-q8_0": (64, 32),
    "gguf-q4_0": (64, 32),
}


def _rounded_neurons(wanted: int, form: ExportForm) -> int:
    """As many as a layer of `form` can have; 0 where that is none."""
    multiple = next((size for size in _MULTIPLES[form] if wanted >= size), _MULTIPLES[form][-1])
    return wanted // multiple * multiple


@dataclass(frozen=True)
class KeptCounts:
    """Of what is chosen in each layer that has any: neurons, or experts."""

    unit: str
    neurons: int
    kept: int
    groups: int
    """Of experts, among which the router chooses first: each keeps as many."""
    matrices: bool
    """Whether one of each layer maps what is chosen to hidden states."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, density: float, form: ExportForm) -> "KeptCounts":
        """UnsupportedModel where layers differ; UsageError for a density that keeps none, all, or fewer than a token
        needs."""
        text = checkpoint.config.get_text_config()
        blocks = find_feed_forwards(build_on_meta(checkpoint.config, checkpoint.dtype), text.num_hidden_layers)[1]
        experts = [block for block in blocks if isinstance(block, Experts)]
        unit = "experts" if experts else "neurons"
        blocks = [block for block in experts or blocks if block.neurons]
        sizes = {block.neurons for block in blocks}
        if not sizes:
            raise UnsupportedModel(f"{text.model_type} has no feed-forward: there are no neurons to leave out")
        if len(sizes) > 1:
            raise UnsupportedModel(
                f"the layers have {min(sizes)} to {max(sizes)} {unit}: a config has one number for all"
            )
        neurons, groups = sizes.pop(), (getattr(text, "n_group", None) or 1) if experts else 1
        kept = neurons_kept(neurons, density)
        kept = kept // groups * groups if experts else _rounded_neurons(kept, form)
        if not 0 < kept < neurons:
            raise UsageError(f"a density of {density} keeps {kept} of {neurons} {unit}: give a share between 0 and 1")
        # A group is judged by its best two, and those that a token goes to have to hold all of its experts.
        least = experts[0].active if experts else 0
        if groups > 1:
            least = groups * max(2, -(-least // (getattr(text, "topk_group", None) or groups)))
        if kept < least:
            raise UsageError(
                f"a density of {density} keeps {kept} of {neurons} experts, and the router needs {least}: give "
                f"{math.ceil(100 * least / neurons) / 100:g} or more"
            )
        return cls(unit, neurons, kept, groups, all(block.neuron_axis is not None for block in blocks))


def files_of(smaller: Smaller, form: ExportForm) -> Callable[[CopyDirectory], ExportFiles]:
    """What writes `form` into a directory. UnsupportedModel where the form cannot hold the model."""
    model = smaller.on_meta()
    if form.startswith("gguf"):
        layout = _gguf_layout(smaller, model, form.removeprefix("gguf").removeprefix("-").upper())
        return lambda directory: _Gguf(layout, directory)
    packing = _Packing.of(model, form, smaller) if form != "unquantized" else None
    return lambda directory: _Shards(smaller, packing, directory)


def _decoder(model: StockModel) -> tuple[nn.ModuleList, Sequence[Block], str]:
    """The layers of `model`, their blocks, and what their names begin with."""
    decoder, blocks = find_feed_forwards(model, model.config.num_hidden_layers)
    return decoder, blocks, next(name for name, module in model.named_modules() if module is decoder)


# Shards.


@dataclass(frozen=True)
class _Packing:
    """compressed-tensors' pack-quantized, of every matrix inside of layers, experts one by one; what chooses among
    experts stays as it is."""

    bits: int
    group: int | None
    """None: a scale for each row."""
    matrices: frozenset[str]
    """As checkpoints name them, without .weight."""
    left_out: tuple[str, ...]
    """Other software finds these by the names of its modules, and ours differ from those of checkpoints: both."""
    nbytes: int

    @classmethod
    def of(cls, model: StockModel, form: ExportForm, smaller: Smaller) -> "_Packing":
        bits, where = int(form[1]), smaller.checkpoint.directory
        inside, left_out = _matrices(model, form, smaller)
        widths = {matrix.shape[1] for matrix in inside.values()}
        group = next((size for size in _GROUPS if not any(width % size for width in widths)), None)
        if not inside:
            raise UnsupportedModel(f"{where}: its matrices are no nn.Linear, {form} packs only those")
        if (bits == 4 and group is None) or any(width % 4 for width in widths):
            raise UnsupportedModel(
                f"{where}: {form} needs rows in groups of {_GROUPS[-1] if bits == 4 else 4}, its "
                f"matrices have rows of {', '.join(map(str, sorted(widths)))}: leave --to out"
            )
        plain = sum(p.nbytes for p in model.parameters()) - sum(matrix.nbytes for matrix in inside.values())
        packed = sum(_packed_bytes(matrix, bits, group if bits == 4 else None) for matrix in inside.values())
        return cls(bits, group if bits == 4 else None, frozenset(inside), left_out, plain + packed)

    def config(self) -> dict[str, Any]:
        """quantization_config of config.json."""
        strategy = {"strategy": "channel"} if self.group is None else {"strategy": "group", "group_size": self.group}
        weights = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False, **strategy}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(self.left_out),
        }

    def packed(self, tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
        """All of `tensors`, which are named as in checkpoints, the matrices packed."""
        for name, tensor in tensors.items():
            owner, _, own = name.rpartition(".")
            if own != "weight" or owner not in self.matrices:
                yield name, tensor
                continue
            found = write_packed(tensor, self.bits, self.group or tensor.shape[1], tensor.dtype)
            yield from ((f"{owner}.{key}", packed) for key, packed in found.items())


def _matrices(model: StockModel, form: ExportForm, smaller: Smaller) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """What is packed of `model`, which is on meta, by the names of checkpoints without .weight; and what is not, of the
    matrices of linears and routers. UnsupportedModel where a checkpoint has all experts in one tensor."""
    _, blocks, prefix = _decoder(model)
    experts = {id(tensor) for block in blocks if isinstance(block, Experts) for tensor in block.full()}
    linears = {f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    routers = set(smaller.axes) if experts else set()
    inside: dict[str, Tensor] = {}
    left_out: set[str] = set()
    for name, tensor in {**dict(model.named_parameters()), **linears}.items():
        pieces = {key.removesuffix(".weight"): piece for key, piece in saved(model, {name: tensor}).items()}
        if id(tensor) in experts:
            if any(piece.dim() != 2 for piece in pieces.values()):
                raise UnsupportedModel(
                    f"{smaller.checkpoint.directory}: a checkpoint of {model.config.model_type} has all experts of a "
                    f"layer in one tensor, and {form} packs matrices: leave --to out"
                )
            inside |= pieces
        # A shared expert's gate is one row.
        elif name in linears and name.startswith(f"{prefix}.") and name not in routers and tensor.shape[0] > 1:
            inside |= pieces
        elif tensor.dim() == 2 and (name in linears or name in routers):
            left_out |= {name.removesuffix(".weight"), *pieces}
    return inside, tuple(sorted(left_out))


def _packed_bytes(matrix: Tensor, bits: int, group: int | None) -> int:
    scales = 1 if group is None else matrix.shape[1] // group
    return matrix.shape[0] * (matrix.shape[1] * bits // 8 + scales * matrix.element_size())


class _Shards:
    def __init__(self, smaller: Smaller, packing: _Packing | None, directory: CopyDirectory) -> None:
        self._smaller, self._packing, self._directory = smaller, packing, directory
        self._model = model = smaller.on_meta()
        self._names = shard_names(model.config.num_hidden_layers + 1)
        self._architecture = type(model).__name__
        self.nbytes = sum(p.nbytes for p in model.parameters()) if packing is None else packing.nbytes

    def has(self, part: int) -> bool:
        return (self._directory.path / self._names[part]).is_file()

    def write(self, part: int, tensors: Tensors) -> None:
        found = saved(self._model, tensors)
        packed = found if self._packing is None else dict(self._packing.packed(found))
        self._directory.write_shard(self._names[part], packed)

    def finish(self) -> int:
        said = config_json(self._smaller.config, self._architecture, self._smaller.checkpoint.dtype)
        said |= {} if self._packing is None else {"quantization_config": self._packing.config()}
        self._directory.finish(self._smaller.checkpoint, said, self._names)
        return sum((self._directory.path / name).stat().st_size for name in self._names)


def config_json(config: PretrainedConfig, architecture: str, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says of the export."""
    named = {"architectures": [architecture], "dtype": str(dtype).removeprefix("torch.")}
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return found | named


# GGUF.


def _gguf_layout(smaller: Smaller, model: StockModel, blocks: str) -> GgufLayout:
    decoder, _, prefix = _decoder(model)
    names = [name for name, _ in model.named_parameters()]
    layers = [[name for name in names if name.startswith(f"{prefix}.{index}.")] for index in range(len(decoder))]
    outside = [name for name in names if not name.startswith(f"{prefix}.")]
    return GgufLayout(smaller.checkpoint, model, smaller.neurons, blocks, [*layers, outside])


class _Gguf:
    """The file grows under another name. How long it is says which parts are there; the last one may not have reached
    the disk, and is written again."""

    def __init__(self, layout: GgufLayout, directory: CopyDirectory) -> None:
        self._layout, self._directory, self.nbytes = layout, directory, layout.nbytes
        self._path = directory.path / (GGUF_FILE + PART)
        self._ends: list[int] = []
        self._done = 0

    def _begin(self) -> None:
        header = self._directory.path / ".header.tmp"
        at = self._layout.begin(header)
        for group in self._layout.groups:
            self._ends.append(at)
            at += sum(planned.padded_bytes for planned in group)
        size = self._path.stat().st_size if self._path.is_file() else 0
        self._done = max(sum(end <= size for end in self._ends) - 2, 0)
        if size and self._done:
            header.unlink()
            os.truncate(self._path, self._ends[self._done])
        else:
            header.replace(self._path)

    def has(self, part: int) -> bool:
        if not self._ends:
            self._begin()
        return part < self._done

    def write(self, part: int, tensors: Tensors) -> None:
        self._layout.write_group(self._path, part, tensors)

    def finish(self) -> int:
        made = self._path.with_name(GGUF_FILE)
        self._path.replace(made)
        self._directory.whole()
        return made.stat().st_size
