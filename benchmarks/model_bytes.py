"""Byte and work arithmetic of a checkpoint, and the bounds that follow from measured ceilings."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# A number of a quantised matrix with its share of the scales; int4 has two of 8 bit for 32 numbers.
NUMBER_BYTES = {"int8": 1.0, "int4": 0.5 + 2 / 32}
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_bytes(text: str) -> int:
    """'16GB' is 16e9, '16GiB' is 16 * 2**30; a bare number is bytes."""
    found = re.fullmatch(r"\s*([\d.eE+]+?)\s*([KMG]i?B|B|)\s*", text)
    if not found:
        raise ValueError(f"not a size: {text!r}; write 16GB, 16GiB or a number of bytes")
    return int(float(found[1]) * UNITS[found[2] or "B"])


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

    def token_bytes(self, density: float, precision: str) -> int:
        """Weights a token reads when FF blocks are cut to the density and layers are held in the precision."""
        kept = int(self.feed_forward * density) / self.feed_forward
        in_layers = self.bytes_per_token - self.outside_bytes - self.feed_forward_bytes * (1 - kept)
        return round(self.outside_bytes + in_layers * NUMBER_BYTES.get(precision, self.value_bytes) / self.value_bytes)

    def prefill_flops(self, prompt_tokens: int) -> float:
        """Matrix products alone; attention scores are left out, so this is a lower bound."""
        return 2.0 * prompt_tokens * self.bytes_per_token / self.value_bytes


@dataclass(frozen=True)
class Ceilings:
    """Measured on this machine; `threads` is what GEMV and GEMM were measured with."""

    threads: int
    disk_bytes_per_s: float
    gemv_bytes_per_s: float
    gemm_flops_per_s: float


@dataclass(frozen=True)
class Bounds:
    """No run can be faster than this, given the ceilings."""

    load_and_prefill_s: float
    token_s: float


def our_bounds(
    model: ModelBytes, ceilings: Ceilings, prompt_tokens: int, stored_bytes: int, token_bytes: int
) -> Bounds:
    """Every stored byte is read once and overlapped with the prompt's products; then everything is resident."""
    compute_s = model.prefill_flops(prompt_tokens) / ceilings.gemm_flops_per_s
    return Bounds(
        load_and_prefill_s=max(stored_bytes / ceilings.disk_bytes_per_s, compute_s),
        token_s=token_bytes / ceilings.gemv_bytes_per_s,
    )


def full_model_bounds(model: ModelBytes, ceilings: Ceilings, prompt_tokens: int, cap_bytes: int) -> Bounds:
    """Any method that keeps the full weights: what the cap does not hold is read again for every token."""
    compute_s = model.prefill_flops(prompt_tokens) / ceilings.gemm_flops_per_s
    missing_bytes = max(0, model.bytes_per_token - cap_bytes)
    return Bounds(
        load_and_prefill_s=max(model.total_bytes / ceilings.disk_bytes_per_s, compute_s),
        token_s=max(missing_bytes / ceilings.disk_bytes_per_s, model.bytes_per_token / ceilings.gemv_bytes_per_s),
    )
