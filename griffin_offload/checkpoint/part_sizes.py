"""What of a checkpoint does not stay in its files as the model needs it: sizes by part, for the planner."""

import math
import re
from dataclasses import dataclass
from typing import Any

from griffin_offload.blocks.base import Block
from griffin_offload.blocks.experts import Experts
from griffin_offload.blocks.layouts import find_feed_forwards, left_out_parts
from griffin_offload.checkpoint.base import Checkpoint, StoredTensor
from griffin_offload.transformers_api import StockModel

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


class _LayerSizes:
    """Of one decoder layer; `experts` of a mixture are translated one by one."""

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self.made = self.translated = 0
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
    left_out = left_out_parts(model)
    for name, tensor in tensors.items():
        if left_out & set(name.split(".")):
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
    return PartSizes(tuple(layer.made for layer in layers), embeddings, rest, max(layer.share for layer in layers))


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
