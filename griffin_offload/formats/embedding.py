"""Embeddings and head in 8 bits, optional in a converted checkpoint: rows of tokens with one scale each."""

from typing import Any

import torch
from torch import Tensor, nn

from griffin_offload.formats.base import Format
from griffin_offload.formats.floats import FLOATS
from griffin_offload.formats.int8 import INT8
from griffin_offload.formats.linear import QuantizedLinear
from griffin_offload.kernels.by_blocks import Scratch

TABLE_FORMATS = (FLOATS, INT8)
"""What embeddings and head may be in."""


class QuantizedEmbedding(nn.Module):
    """Token ids to rows, numbers [V, H] of `format` with a scale [V]; stands for the stock module it is made from."""

    weight: nn.Parameter
    scale: nn.Parameter

    def __init__(self, stock: nn.Module, format: Format) -> None:
        super().__init__()
        self.weight, self.scale = _parameters(stock, format)
        # Gemma 3 multiplies inside its embedding module.
        self.embed_scale: Tensor | None = getattr(stock, "embed_scale", None)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [..., H] in the precision of the scales."""
        scale = self.scale[ids]
        rows = self.weight[ids].to(scale.dtype) * scale[..., None]
        return rows if self.embed_scale is None else rows * self.embed_scale.to(rows)


def swap_tables(model: Any, format: Format, scratch: Scratch) -> None:
    """Put into `format` the embedding of token ids and the head; tied ones stay tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    new = QuantizedEmbedding(embedding, format)
    model.set_input_embeddings(new)
    if head is None:
        return
    (outputs, inputs), layout = head.weight.shape, format.stored(is_down=False)
    linear = QuantizedLinear(outputs, inputs, is_down=False, full=layout, resident=layout, scratch=scratch)
    linear.bias = head.bias
    linear.weight, linear.scale = (new.weight, new.scale) if tied else _parameters(head, format)
    model.set_output_embeddings(linear)


def tie_tables(model: Any, *, tied: bool) -> None:
    """After the embedding's tensors were assigned: make the head's the same."""
    if tied:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        head.weight, head.scale = embedding.weight, embedding.scale


def table_bytes(shape: torch.Size, format: Format, dtype: torch.dtype) -> int:
    """Of one table [V, H], scales in `dtype`."""
    return format.stored(is_down=False).nbytes(shape[0], shape[1], dtype, is_down=False)


def _parameters(stock: Any, format: Format) -> tuple[nn.Parameter, nn.Parameter]:
    outputs, inputs = stock.weight.shape
    specs = format.stored(is_down=False).specs(outputs, inputs, is_down=False)
    weight, scale = (
        nn.Parameter(stock.weight.new_empty(shape, dtype=own or stock.weight.dtype), requires_grad=False)
        for shape, own in (specs["weight"], specs["scale"])
    )
    return weight, scale
