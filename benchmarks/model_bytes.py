"""Byte and work arithmetic of a checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


@dataclass(frozen=True)
class ModelBytes:
    """Weights by role. Embedding rows are looked up, so a token reads all but the embedding."""

    name: str
    hidden: int
    feed_forward: int
    layers: int
    total_bytes: int
    embedding_bytes: int
    feed_forward_bytes: int
    outside_bytes: int
    """Head and last norm: neither in a layer nor looked up."""
    value_bytes: int

    @classmethod
    def of(cls, folder: Path) -> "ModelBytes":
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
        embedding_bytes = model.get_input_embeddings().weight.nbytes
        in_layers = sum(size for name, size in sizes.items() if ".layers." in name)
        return cls(
            name=folder.name,
            hidden=config.hidden_size,
            feed_forward=config.intermediate_size,
            layers=config.num_hidden_layers,
            total_bytes=sum(sizes.values()),
            embedding_bytes=embedding_bytes,
            feed_forward_bytes=sum(size for name, size in sizes.items() if ".mlp." in name),
            outside_bytes=max(sum(sizes.values()) - in_layers - embedding_bytes, 0),
            value_bytes=model.dtype.itemsize,
        )

    @property
    def bytes_per_token(self) -> int:
        """Weight bytes a matrix-vector pass of the full model touches."""
        return self.total_bytes - self.embedding_bytes

    def prefill_flops(self, prompt_tokens: int) -> float:
        """Matrix products alone; attention scores are left out, so this is a lower bound."""
        return 2.0 * prompt_tokens * self.bytes_per_token / self.value_bytes
