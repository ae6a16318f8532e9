"""Files of several precisions: what is not of the model's own is converted by loading, and rests in memory then."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from griffin_offload.weights.layouts import find_feed_forwards
from griffin_offload.weights.text_model import left_out_parts
from griffin_offload.weights.weight_files import DTYPES, Header

_IN_LAYER = re.compile(r"(?:^|\.)(\d+)\.(.+)$")


@dataclass(frozen=True)
class Converted:
    """Bytes that loading makes of other precisions, in the model's."""

    feed_forward: tuple[int, ...]
    """Of each layer: they are streamed from there, as long as the model lives."""
    embeddings: int
    rest: int
    """Gone when the residents are there."""


def converted_tensors(headers: Iterable[Header], dtype: torch.dtype) -> dict[str, int]:
    """Name and bytes, in `dtype`, of every tensor of floats that is stored in another one."""
    return {
        name: size_bytes // DTYPES[stored].itemsize * dtype.itemsize
        for header in headers
        for name, (stored, size_bytes) in header.items()
        if stored in DTYPES and DTYPES[stored] != dtype
    }


def converted_sizes(model: Any, tensors: dict[str, int]) -> Converted:
    """What `tensors` (`converted_tensors`) are in `model`. A name that no other part has counts as feed-forward."""
    decoder, blocks = find_feed_forwards(model, model.config.get_text_config().num_hidden_layers)
    feed_forward, embeddings, rest = [0] * len(blocks), 0, 0
    others = [_names_outside_ff(layer, block) for layer, block in zip(decoder, blocks, strict=True)]
    table = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    left_out = left_out_parts(model)
    for name, size_bytes in tensors.items():
        if left_out & set(name.split(".")):
            continue  # given up before anything else is allocated
        match = _IN_LAYER.search(name)
        index = int(match[1]) if match else len(blocks)
        if match and index < len(blocks) and match[2] not in others[index]:
            feed_forward[index] += size_bytes
        elif name.split(".")[-2:-1] == table.split(".")[-1:]:
            embeddings += size_bytes
        else:
            rest += size_bytes
    return Converted(tuple(feed_forward), embeddings, rest)


def _names_outside_ff(layer: Any, block: Any) -> set[str]:
    inside = {id(tensor) for part in block.projections for tensor in part.owner.parameters(recurse=False)}
    return {name for name, tensor in layer.named_parameters() if id(tensor) not in inside}
