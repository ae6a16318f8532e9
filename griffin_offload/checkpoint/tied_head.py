"""A head that config.json ties to the embeddings while the files hold another one: the files are right."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from griffin_offload.blocks.layouts import build_on_meta
from griffin_offload.errors import CheckpointError, memory_refused, one_line

# Of each table as much is compared at once.
_PIECE_BYTES = 16 * 2**20


def untie_other_head(config: PretrainedConfig, dtype: torch.dtype, headers: Mapping[Path, Mapping[str, Any]]) -> bool:
    """Whether `config` ties the head to the embeddings and the files hold another head, which `config` then says.

    Reads both tables, up to the first difference, where the files hold two; nothing elsewhere."""
    text = config.get_text_config()
    if not (getattr(config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False)):
        return False
    model: Any = build_on_meta(config, dtype)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    names = {id(module): name for name, module in model.named_modules()}
    here, there = (_place(f"{names[id(module)]}.weight", headers) for module in (head, embedding))
    if here is None or there is None or _equal(here, there, dtype):
        return False
    for found in (config, text):
        found.tie_word_embeddings = False
    return True


def said_untied(raw: dict[str, Any]) -> dict[str, Any]:
    """The text of a config.json, saying that the head is not tied."""
    inner = {key: said_untied(value) for key, value in raw.items() if key == "text_config" and isinstance(value, dict)}
    return raw | inner | {"tie_word_embeddings": False}


_Place = tuple[Path, str]


def _place(name: str, headers: Mapping[Path, Mapping[str, Any]]) -> _Place | None:
    """The file that holds the parameter, which may have other names in front there; and its name in it."""
    tail = ".".join(name.split(".")[-2:])
    found = [
        (key != name, len(key), path, key)
        for path, header in headers.items()
        for key in header
        if key == tail or key.endswith(f".{tail}")
    ]
    return min(found)[2:] if found else None


def _equal(head: _Place, embedding: _Place, dtype: torch.dtype) -> bool:
    try:
        with safe_open(head[0], framework="pt") as one, safe_open(embedding[0], framework="pt") as other:
            tables = one.get_slice(head[1]), other.get_slice(embedding[1])
            shapes = [tuple(table.get_shape()) for table in tables]
            if shapes[0] != shapes[1] or len(shapes[0]) != 2 or 0 in shapes[0]:
                return False  # no head of this model: loading says so
            return all(torch.equal(a.to(dtype), b.to(dtype)) for a, b in zip(*map(_pieces, tables), strict=True))
    except (SafetensorError, OSError, RuntimeError) as error:
        if memory_refused(error):
            raise
        raise CheckpointError(f"{head[0]} cannot be read: {one_line(error)}") from error


def _pieces(table: Any) -> Iterator[Tensor]:
    rows, width = table.get_shape()
    step = max(_PIECE_BYTES // (8 * width), 1)
    for at in range(0, rows, step):
        yield table[at : at + step]
