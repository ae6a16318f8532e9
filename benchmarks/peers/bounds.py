"""The physical limits of this machine, the same for all sides, and what a side could do at best."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from capped_run import drop_page_cache
from sides import checkpoint_files, in_own_process
from transformers import AutoConfig, AutoModelForCausalLM

from griffin_offload import formats
from griffin_offload.config import LoadConfig
from griffin_offload.engine.spec import examine
from griffin_offload.evaluation.ceilings import measure_ceilings

PRECISIONS = ("none", "int8", "int4")


@dataclass(frozen=True)
class ModelBytes:
    """Weights by role. Embedding rows are looked up, so a token reads all but the embedding."""

    name: str
    total_bytes: int
    embedding_bytes: int
    value_bytes: int

    @classmethod
    def of(cls, folder: Path) -> "ModelBytes":
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        total_bytes = sum(parameter.nbytes for parameter in model.parameters())
        return cls(folder.name, total_bytes, model.get_input_embeddings().weight.nbytes, model.dtype.itemsize)

    @property
    def bytes_per_token(self) -> int:
        """Weight bytes a matrix-vector pass of the full model touches."""
        return self.total_bytes - self.embedding_bytes

    def prefill_flops(self, prompt_tokens: int) -> float:
        """Matrix products alone; attention scores are left out, so this is a lower bound."""
        return 2.0 * prompt_tokens * self.bytes_per_token / self.value_bytes


def trials(folder: Path, precision: str, prompt_tokens: int, threads: int) -> dict[str, Any]:
    """Those of `griffin-offload bench`: cold disk, one row times matrices of the model's FF shape in a precision, and
    many rows, in 16 bit or more whatever the precision is."""
    prospect = examine(folder, LoadConfig(device="cpu"))
    return asdict(measure_ceilings(prospect, formats.get(precision), [prompt_tokens], threads))


def measure(folder: Path, prompt_tokens: int, threads: int) -> dict[str, Any]:
    """`memory_bytes_per_s` is the best rate at which any kernel multiplies one row with weights of the model's shape,
    `gemm_flops_per_s` the best for the prompt. Each precision has a process of its own: its matrices are gone from
    memory before anything else runs."""
    found = {}
    for name in PRECISIONS:
        drop_page_cache(checkpoint_files(folder))
        found[name] = in_own_process(trials, folder, name, prompt_tokens, threads)
    return {
        "disk_bytes_per_s": max(rates["read_bytes_per_s"] for rates in found.values()),
        "memory_bytes_per_s": max(rates["gemv_bytes_per_s"] for rates in found.values()),
        "gemm_flops_per_s": max(max(rates["gemm_flops_per_s"].values()) for rates in found.values()),
        "gemv_bytes_per_s": {name: rates["gemv_bytes_per_s"] for name, rates in found.items()},
    }


def token_bytes(run: dict[str, Any], model: ModelBytes, stored_bytes: int) -> float:
    """Weights that one token must read: all but embedding rows, in the form they are stored in; ours as resident."""
    found = run["figures"].get("token_bytes")
    return float(found) if found else stored_bytes * model.bytes_per_token / model.total_bytes


def first_token_s(ceilings: dict[str, Any], model: ModelBytes, prompt_tokens: int, stored_bytes: int) -> float:
    compute_s = model.prefill_flops(prompt_tokens) / ceilings["gemm_flops_per_s"]
    return float(max(stored_bytes / ceilings["disk_bytes_per_s"], compute_s))


def token_s(ceilings: dict[str, Any], needed_bytes: float, cap_bytes: int) -> float:
    """What the cap cannot hold comes from the disk, for every token."""
    missing_bytes = max(0.0, needed_bytes - cap_bytes)
    return float(max(missing_bytes / ceilings["disk_bytes_per_s"], needed_bytes / ceilings["memory_bytes_per_s"]))


def statement(ceilings: dict[str, Any], threads: int) -> Sequence[str]:
    kernels = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in ceilings["gemv_bytes_per_s"].items())
    return [
        f"Ceilings on {threads} threads: disk, cold {ceilings['disk_bytes_per_s'] / 1e9:.2f} GB/s; one row times "
        f"weights {ceilings['memory_bytes_per_s'] / 1e9:.1f} GB/s (our kernels, none/int8/int4: {kernels}); many rows "
        f"{ceilings['gemm_flops_per_s'] / 1e9:.0f} Gflop/s."
    ]
