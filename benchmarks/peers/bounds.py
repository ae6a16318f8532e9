"""The physical limits of this machine, the same for all sides, and what a side could do at best."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measured import PRECISIONS, measure_rates
from model_bytes import ModelBytes


def measure(folder: Path, prompt_tokens: int, threads: int, precisions: Sequence[str] = PRECISIONS) -> dict[str, Any]:
    """`memory_bytes_per_s` is the best rate at which any kernel multiplies one row with weights of the model's shape,
    `gemm_flops_per_s` the best for the prompt."""
    rates = {name: measure_rates(folder, prompt_tokens, threads, name) for name in precisions}
    return {
        "disk_bytes_per_s": max(rate.read_bytes_per_s for rate in rates.values()),
        "memory_bytes_per_s": max(rate.gemv_bytes_per_s for rate in rates.values()),
        "gemm_flops_per_s": max(rate.gemm_flops_per_s for rate in rates.values()),
        "gemv_bytes_per_s": {name: rate.gemv_bytes_per_s for name, rate in rates.items()},
    }


def token_bytes(run: dict[str, Any], model: ModelBytes, stored_bytes: int) -> float:
    """Weights that one token must read: all but embedding rows, in the form they are stored in; ours as resident."""
    decoding = run["figures"].get("decoding")
    if decoding:
        return float(decoding["token_bytes"])
    return stored_bytes * model.bytes_per_token / model.total_bytes


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
