"""A model's sizes, read off its architecture on the meta device."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from griffin_offload.blocks.base import ALIGNMENT, Block, padded
from griffin_offload.blocks.experts import Experts
from griffin_offload.blocks.feedforward import features
from griffin_offload.blocks.layouts import find_feed_forwards
from griffin_offload.blocks.replace import (
    check_layer,
    expert_names,
    finer_names,
    fits_rows,
    linear_names,
    outside_names,
)
from griffin_offload.blocks.sizes import LayerSizes, ModelSizes, NeuronSizes
from griffin_offload.blocks.states import LayerState, check_decodable, kept_states, positions_reached, windows_of
from griffin_offload.errors import UnsupportedModel
from griffin_offload.formats.base import Format, Spec, specs_bytes
from griffin_offload.formats.floats import FLOATS
from griffin_offload.formats.linear import table_bytes
from griffin_offload.transformers_api import StockModel


def model_shape(
    model: StockModel,
    precision: Format = FLOATS,
    stored: Format = FLOATS,
    tables: Format = FLOATS,
    parts: "ModelParts | None" = None,
    levels: Sequence[Format] = (),
    head: Format | None = None,
    finer: Format | None = None,
    held: Mapping[int, Collection[str]] = MappingProxyType({}),
    in_rows: Mapping[int, Collection[str]] = MappingProxyType({}),
    *,
    by_layer: bool = False,
) -> ModelSizes:
    """Measure `model`, a stock transformers causal LM on the meta device, as if its layers were of `precision` on the
    device and `stored` in the checkpoint, and its embeddings and head of `tables`. `parts` are `parts_of(model)`, for
    callers who ask more than once; `levels` are formats of FF neurons, if not `precision` alone, of a layer's each if
    `by_layer`; `head` is the format that the head rests in on the device, if not that of `tables`, and `finer` the one
    that small matrices of a layer rest in, if not `precision`, and those of `held`, names by layer; `in_rows` are those
    of matrices whose codes are stored in rows of outputs, down projections, too. Raises UnsupportedModel."""
    levels = tuple(levels) or (precision,)
    config = model.config.get_text_config()
    parts = parts or parts_of(model)
    layers = _layer_shapes(_Formats(precision, levels, stored, finer, held, in_rows, by_layer), parts)
    embedding = model.get_input_embeddings().weight
    linear = model.get_output_embeddings()
    tied = linear is None or linear.weight is embedding
    plain_tables = (_nbytes([embedding]), 0 if tied else _nbytes([linear.weight]))
    stored_head = 0 if tied else table_bytes(linear.weight.shape, tables, embedding.dtype)
    head = head or tables
    head_bytes = stored_head if head is tables else table_bytes(linear.weight.shape, head, embedding.dtype)
    heads, attention_width = _attention_sizes(config)
    return ModelSizes(
        layers=layers,
        embedding_bytes=table_bytes(embedding.shape, tables, embedding.dtype),
        head_bytes=head_bytes,
        stored_head_bytes=stored_head,
        other_bytes=parts.outside_bytes - sum(plain_tables),
        plain_embedding_bytes=plain_tables[0],
        plain_head_bytes=plain_tables[1],
        head=head,
        item_bytes=embedding.element_size(),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        attention_width=attention_width,
        heads=heads,
        kv_width=max(state.kv_width for state in parts.states),
        kv_heads=max(state.kv_heads for state in parts.states),
        max_positions=positions_reached(config),
        gated=any(block.gated for block in parts.blocks),
        inline_ff=any(block.inline for block in parts.blocks),
        materialises_scores=_materialises_scores(config),
        dtype=str(embedding.dtype).removeprefix("torch."),
        precision=precision,
        levels=levels,
        by_layer=by_layer,
        stored=stored,
        finer=finer if any(layer.finer for layer in layers) else None,
        as_held=bool(held),
    )


@dataclass(frozen=True)
class ModelParts:
    """What is the same of a model in every precision."""

    decoder: nn.ModuleList
    blocks: list[Block]
    windows: list[int | None]
    states: list[LayerState]
    kinds: Sequence[Hashable]
    """Of each layer; those of the same kind have the same sizes. Most models have one or two."""
    outside_bytes: int
    """Of tensors in no layer, each once."""


def parts_of(model: StockModel) -> ModelParts:
    """Raises UnsupportedModel."""
    check_decodable(model)
    config = model.config.get_text_config()
    decoder, blocks = find_feed_forwards(model, config.num_hidden_layers)
    states, windows = kept_states(model, decoder), windows_of(config)
    known = zip(decoder, blocks, windows, states, strict=True)
    kinds = [(_structure(layer), block.neurons, block.active, *more) for layer, block, *more in known]
    in_layers = {id(t) for layer in decoder for t in (*layer.parameters(), *layer.buffers())}
    outside = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in in_layers}
    return ModelParts(decoder, blocks, windows, states, kinds, _nbytes(outside.values()))


def _structure(layer: nn.Module) -> Hashable:
    """Its modules and their tensors, which of them are the same one among these."""
    numbers: dict[int, int] = {}

    def known(tensors: Mapping[str, Tensor | None]) -> Hashable:
        there = [(name, t) for name, t in tensors.items() if t is not None]
        return tuple((name, t.shape, t.dtype, numbers.setdefault(id(t), len(numbers))) for name, t in there)

    named = layer.named_modules()
    return tuple((name, type(module), known(module._parameters), known(module._buffers)) for name, module in named)


def states_of(model: StockModel) -> list[LayerState]:
    """What each decoder layer of `model` keeps of a sequence; errors as `kept_states`."""
    check_decodable(model)
    return kept_states(model, find_feed_forwards(model, model.config.get_text_config().num_hidden_layers)[0])


def _attention_sizes(config: PretrainedConfig) -> tuple[int, int]:
    """(heads, numbers per token in the queries) of the widest layer; none where no layer is attention."""
    layers = [layer for layer in config.per_layer_config if getattr(layer, "num_attention_heads", None)]
    sizes = [getattr(layer, "head_dim", None) or config.hidden_size // layer.num_attention_heads for layer in layers]
    heads = [int(layer.num_attention_heads) for layer in layers]
    return max(heads, default=0), max((count * size for count, size in zip(heads, sizes, strict=True)), default=0)


_MOST_TIERED = 2**22  # allocation sorts all of a layer; the largest open models have 60 thousand


@dataclass(frozen=True)
class _Formats:
    """What the layers of a model are in: as the arguments of `model_shape`."""

    precision: Format
    levels: Sequence[Format]
    stored: Format
    finer: Format | None
    held: Mapping[int, Collection[str]]
    in_rows: Mapping[int, Collection[str]]
    by_layer: bool

    @property
    def whole(self) -> bool:
        """Whether all neurons of a layer are on one level."""
        return len(self.levels) == 1 or self.by_layer


def _layer_shapes(formats: _Formats, parts: ModelParts) -> tuple[LayerSizes, ...]:
    found: dict[Hashable, LayerSizes] = {}
    layers = []
    for index, kind in enumerate(parts.kinds):
        key = (kind, *(frozenset(names.get(index, ())) for names in (formats.held, formats.in_rows)))
        if key not in found:
            own = (parts.decoder[index], parts.blocks[index], parts.windows[index], parts.states[index])
            found[key] = _layer_shape(formats, index, *own)
        layers.append(found[key])
    return tuple(layers)


def _layer_shape(
    formats: _Formats, index: int, layer: nn.Module, block: Block, window: int | None, state: LayerState
) -> LayerSizes:
    precision, levels, stored, finer = formats.precision, formats.levels, formats.stored, formats.finer
    finer_ones = frozenset[str]() if finer is None else finer_names(layer, block, formats.held.get(index, ()))
    if block.active and len(levels) > 1:
        raise UnsupportedModel("experts are of one format each, tiers are of FF neurons: take --quantize int4")
    if len(levels) > 1 and block.neurons > _MOST_TIERED:
        raise UnsupportedModel(f"tiers rank up to {_MOST_TIERED} neurons a layer, here are {block.neurons}")
    for format in dict.fromkeys((precision, *levels)):
        check_layer(layer, block, format)
    outside = {name: layer.get_submodule(name) for name in outside_names(layer, block)}
    finer_ff = [name for name in sorted(finer_ones) if name not in outside]
    full = _stored_specs(layer, block, stored, finer, finer_ff, formats.in_rows.get(index, ()))
    if len(levels) > 1:  # all matrices of a neuron are on its level
        finer_ones, finer_ff = finer_ones.difference(finer_ff), []
    dtype = next(layer.parameters()).dtype
    sizes = tuple(_neuron_sizes(layer, block, format, dtype, finer, finer_ff) for format in levels)
    rows = _in_rows(layer, block, stored, formats.in_rows.get(index, ()), dtype) if formats.whole else None
    own_formats = [finer if finer and rows and rows.name in finer_ff else format for format in levels]
    ff = {id(tensor) for tensor in block.full()}
    rest = [p for p in layer.parameters() if id(p) not in ff]
    attention = _nbytes(p for p in rest if p.dim() > 1)
    resting = {name: finer if finer and name in finer_ones else precision for name in outside}
    quantised = sum(
        resting[name].resident(is_down=False).nbytes(*features(module), dtype, is_down=False) - _nbytes([module.weight])
        for name, module in outside.items()
    )
    return LayerSizes(
        neurons=block.neurons,
        levels=sizes,
        ff_bytes=specs_bytes(full, dtype),
        ff_flat_bytes=sum(padded(specs_bytes([spec], dtype), ALIGNMENT) for spec in full),
        attention_bytes=attention + quantised,
        norm_bytes=_nbytes(p for p in rest if p.dim() <= 1) + _nbytes(layer.buffers()),
        window=window,
        plain_neuron_bytes=_neuron_sizes(layer, block, FLOATS, dtype).neuron_bytes,
        plain_attention_bytes=attention,
        kv_width=state.kv_width,
        key_width=state.key_width,
        kv_heads=state.kv_heads,
        states=state.states,
        state_writer=state.writer,
        own_width=block.width,
        experts=block.active,
        mixing_bytes=state.mixing_bytes(sum(features(module)[0] for module in outside.values())),
        finer=finer_ones,
        whole_bytes=() if rows is None else tuple(map(rows.whole_bytes, own_formats, sizes)),
    )


@dataclass(frozen=True)
class _DownInRows:
    """A down projection [outputs, neurons] that rests in rows of outputs where all neurons stay, which are not to be
    told apart then. A group of a row follows what each of its inputs counts, and what a huge token hangs on."""

    name: str
    outputs: int
    neurons: int
    copied: Format | None
    """The format that a copy has it in, in rows; None: it is made of floats."""
    has_codes: bool
    """Whether it lies in rows already."""
    dtype: torch.dtype

    def whole_bytes(self, format: Format, size: NeuronSizes) -> int | None:
        """Of all neurons of a layer that is not streamed; None where neurons are of this `size` there, too."""
        if self.copied not in (None, format) or not fits_rows(format, self.outputs, self.neurons):
            return None
        if not self.has_codes and self.outputs % format.neuron_multiple:
            return None  # neurons are filled up there, so that a copy would take more
        rows, columns = (
            format.resident(is_down=is_down).nbytes(self.outputs, self.neurons, self.dtype, is_down=is_down)
            for is_down in (False, True)
        )
        return size.nbytes(self.neurons) + rows - columns


def _in_rows(
    layer: nn.Module, block: Block, stored: Format, in_rows: Collection[str], dtype: torch.dtype
) -> _DownInRows | None:
    if isinstance(block, Experts):
        return None
    for name in linear_names(layer):
        module = layer.get_submodule(name)
        lies_so = isinstance(module, nn.Linear) and (stored.is_plain or name in in_rows)
        if block.is_down(module) and lies_so:
            copied = None if stored.is_plain else stored.rests_as()
            return _DownInRows(name, *features(module), copied, name in in_rows, dtype)
    return None


def _stored_specs(
    layer: nn.Module,
    block: Block,
    stored: Format,
    finer: Format | None,
    finer_ones: Sequence[str],
    in_rows: Collection[str],
) -> list[Spec]:
    """Of a block's matrices as the checkpoint has them: some in a `finer` format if `stored` has fewer bits, and a down
    projection maybe in rows."""
    in_finer = finer is not None and finer.bits > stored.bits
    if isinstance(block, Experts):
        names = expert_names(layer, block)
        return block.full_specs(stored, finer if in_finer else None, [names[name] for name in finer_ones])
    found = list(block.full_specs(stored))
    downs = [name for name in linear_names(layer) if block.is_down(layer.get_submodule(name))]
    others = {name: (stored, False) for name in downs if name in in_rows}
    if finer is not None and in_finer:
        others |= {name: (finer, block.is_down(layer.get_submodule(name))) for name in finer_ones}
    for name, (format, is_down) in others.items():
        outputs, inputs = features(module := layer.get_submodule(name))
        as_down = block.is_down(module)
        for spec in stored.stored(is_down=as_down).specs(outputs, inputs, is_down=as_down).values():
            found.remove(spec)
        found += format.stored(is_down=is_down).specs(outputs, inputs, is_down=is_down).values()
    return found


def _neuron_sizes(
    layer: nn.Module,
    block: Block,
    format: Format,
    dtype: torch.dtype,
    finer: Format | None = None,
    finer_ones: Sequence[str] = (),
) -> NeuronSizes:
    """Sizes are linear in whole multiples of neurons; some of the block's matrices may be in a `finer` format."""
    if isinstance(block, Experts):
        names = expert_names(layer, block)
        return NeuronSizes(block.place_bytes(format, dtype, finer, [names[name] for name in finer_ones]), 0, 1)

    def nbytes(count: int) -> int:
        total = specs_bytes(block.compact_specs((count,), (format,)), dtype)
        for module in map(layer.get_submodule, finer_ones):
            assert finer is not None
            (outputs, inputs), is_down = features(module), block.is_down(module)
            sizes = (outputs, count) if is_down else (outputs // block.neurons * count, inputs)
            own, other = (one.resident(is_down=is_down) for one in (finer, format))
            total += own.nbytes(*sizes, dtype, is_down=is_down) - other.nbytes(*sizes, dtype, is_down=is_down)
        return total

    step = max(block.multiple(format), finer.neuron_multiple if finer is not None and finer_ones else 1)
    one, two = nbytes(step), nbytes(2 * step)
    return NeuronSizes((two - one) // step, one - (two - one) // step * step, step)


def _nbytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _materialises_scores(config: PretrainedConfig) -> bool:
    eager = getattr(config, "_attn_implementation", None) == "eager"
    return eager or config.model_type == "bloom" or bool(getattr(config, "alibi", False))
