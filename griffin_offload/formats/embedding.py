"""Embeddings and head in int8, optional in a converted checkpoint: rows of tokens with one scale each."""

from typing import Any

import torch
from torch import Tensor, nn

from griffin_offload.formats.linear import QuantizedLinear, Scratch


class QuantizedEmbedding(nn.Module):
    """Token ids to rows, which are int8 [V, H] with a scale [V]; stands for the stock module it is made from."""

    weight: nn.Parameter
    scale: nn.Parameter

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.weight, self.scale = _parameters(stock)
        # Gemma 3 multiplies inside its embedding module.
        self.embed_scale: Tensor | None = getattr(stock, "embed_scale", None)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [..., H] in the precision of the scales."""
        scale = self.scale[ids]
        rows = self.weight[ids].to(scale.dtype) * scale[..., None]
        return rows if self.embed_scale is None else rows * self.embed_scale.to(rows)


def swap_tables(model: Any, scratch: Scratch) -> None:
    """Replace the embedding of token ids and the head; tied ones stay tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    new = QuantizedEmbedding(embedding)
    model.set_input_embeddings(new)
    if head is None:
        return
    outputs, inputs = head.weight.shape
    linear = QuantizedLinear(outputs, inputs, is_down=False, precision="int8", stored="int8", scratch=scratch)
    linear.bias = head.bias
    linear.weight, linear.scale = (new.weight, new.scale) if tied else _parameters(head)
    model.set_output_embeddings(linear)


def tie_tables(model: Any, *, tied: bool) -> None:
    """After the embedding's tensors were assigned: make the head's the same."""
    if tied:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        head.weight, head.scale = embedding.weight, embedding.scale


def table_bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    """Of one table [V, H] in int8."""
    return shape[0] * (shape[1] + dtype.itemsize)


def _parameters(stock: Any) -> tuple[nn.Parameter, nn.Parameter]:
    weight = stock.weight
    numbers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=weight.dtype, device=weight.device)
    return nn.Parameter(numbers, requires_grad=False), nn.Parameter(scale, requires_grad=False)
