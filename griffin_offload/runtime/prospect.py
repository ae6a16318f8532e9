"""What is known of a model before a weight is read: its checkpoint, its sizes, the budget, and the plan."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from griffin_offload.config import CacheKind, KVBits, LoadConfig
from griffin_offload.errors import UsageError
from griffin_offload.plan import make_plan
from griffin_offload.pricing import Plan, PlanRequest
from griffin_offload.runtime.cache import can_cache
from griffin_offload.runtime.cpu_linear import emulates_halves
from griffin_offload.runtime.memory import choose_device, device_bytes, device_overhead_bytes
from griffin_offload.units import parse_size
from griffin_offload.weights.checkpoint import Checkpoint, open_checkpoint
from griffin_offload.weights.shape import ModelShape, build_on_meta, model_shape


@dataclass(frozen=True)
class Prospect:
    """Everything known before a weight is read."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    shape: ModelShape
    request: PlanRequest

    @property
    def precision(self) -> str:
        """The precision of the computation, in words."""
        return str(self.dtype).removeprefix("torch.")


def examine(model: str | Path, config: LoadConfig) -> Prospect:
    """Read headers and config of `model`, and turn `config` into a request to the planner."""
    checkpoint = open_checkpoint(model, offline=config.offline)
    device = choose_device(config.device)
    dtype = checkpoint.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    shape = model_shape(build_on_meta(checkpoint.config, dtype))
    request = PlanRequest(
        budget_bytes=budget_bytes(config, device),
        ctx_tokens=config.ctx_size,
        prompt_tokens=config.prompt_tokens,
        batch=config.batch_size,
        density=config.density,
        overhead_bytes=device_overhead_bytes(device),
        offloaded_in_budget=device.type == "cpu" and config.offload == "ram",
        ff_chunk_tokens=config.ff_chunk_tokens,
        always_stream=config.always_stream,
        kv_bits=config.kv_bits,
        cache=_cache_kind(checkpoint.config, config.kv_bits),
        # On the CPU the rows are read in place, so their precision has to be the stored one.
        host_embeddings=device.type != "cpu" or dtype == checkpoint.dtype,
        stored_share=checkpoint.dtype.itemsize / dtype.itemsize
        if device.type == "cpu" and dtype != checkpoint.dtype
        else 0.0,
        translated=emulates_halves(device, dtype),
    )
    return Prospect(checkpoint, device, dtype, shape, request)


def _cache_kind(config: Any, bits: KVBits) -> CacheKind:
    if can_cache(config):
        return "ours"
    if bits != LoadConfig.kv_bits:
        raise UsageError(f"kv_bits={bits} cannot be used with {config.model_type}: not all its layers are attention")
    return "dynamic"


def budget_bytes(config: LoadConfig, device: torch.device) -> int:
    """The device budget in bytes. On the CPU there is one budget, so only one of the two limits may be given."""
    limit = config.max_gpu_mem
    if device.type == "cpu" and config.max_cpu_mem is not None:
        if limit != "auto":
            raise UsageError(
                "on the CPU device there is one budget: give --max-gpu-mem (or its alias --max-mem) alone, "
                "without --max-cpu-mem"
            )
        limit = config.max_cpu_mem
    free, total = device_bytes(device)
    return parse_size(limit, total_bytes=total, free_bytes=free)


def plan_for(prospect: Prospect) -> Plan:
    """The plan; DoesNotFit when there is none."""
    return make_plan(prospect.shape, prospect.request, prospect.precision)


def evicts(prospect: Prospect) -> bool:
    """Whether used file pages are dropped from the page cache: when the whole file would not fit beside us."""
    free, _ = device_bytes(torch.device("cpu"))
    return prospect.checkpoint.weight_bytes + prospect.request.budget_bytes > free
