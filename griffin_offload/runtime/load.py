"""From a checkpoint to a loaded model: plan, map the weights, move the residents, install compact FFs."""

import contextlib
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from griffin_offload.config import LoadConfig
from griffin_offload.errors import CheckpointError, DoesNotFit, UsageError, one_line
from griffin_offload.plan import make_plan
from griffin_offload.pricing import Plan, PlanRequest, scratch_bytes
from griffin_offload.runtime.cpu_linear import emulates_halves, translate_linears
from griffin_offload.runtime.embedding import HostEmbedding
from griffin_offload.runtime.memory import Ledger, choose_device, device_bytes, device_overhead_bytes
from griffin_offload.runtime.prefill import StreamedLayers
from griffin_offload.runtime.stream import StreamConfig
from griffin_offload.runtime.threads import choose_threads, limited_threads
from griffin_offload.units import format_bytes, parse_size
from griffin_offload.weights.checkpoint import Checkpoint, open_checkpoint
from griffin_offload.weights.feedforward import FeedForward, find_feed_forwards
from griffin_offload.weights.pages import FilePages
from griffin_offload.weights.self_check import self_check
from griffin_offload.weights.shape import ModelShape, build_on_meta, model_shape
from griffin_offload.weights.source import MappedWeights, RamWeights, Source

# The host keeps this share of its free memory when full weights are put into it.
_RAM_SHARE = 0.8
_COPY_THREADS = 4


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


@dataclass
class Loaded:
    """A model that is ready for its first prompt."""

    model: Any
    layers: StreamedLayers
    ledger: Ledger
    host_embedding: HostEmbedding | None
    resident_bytes: int
    offload: str
    threads: int | None
    """Threads that compute; None where the device is not the CPU."""


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
        # On the CPU the rows are read in place, so their precision has to be the stored one.
        host_embeddings=device.type != "cpu" or dtype == checkpoint.dtype,
        stored_share=checkpoint.dtype.itemsize / dtype.itemsize
        if device.type == "cpu" and dtype != checkpoint.dtype
        else 0.0,
        translated=emulates_halves(device, dtype),
    )
    return Prospect(checkpoint, device, dtype, shape, request)


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


def load(prospect: Prospect, plan: Plan, config: LoadConfig) -> Loaded:
    """Load the model of `prospect` by `plan`. On failure nothing stays open."""
    _check_free_memory(prospect, plan)
    threads = _threads(prospect, config)  # its trial needs memory that the residents will take
    with limited_threads(threads), contextlib.ExitStack() as on_failure:
        loaded = _load(prospect, plan, config, threads, on_failure)
        on_failure.pop_all()
    return loaded


def _load(
    prospect: Prospect, plan: Plan, config: LoadConfig, threads: int | None, on_failure: contextlib.ExitStack
) -> Loaded:
    ledger = Ledger(prospect.device, prospect.request.overhead_bytes)
    _cap_allocator(prospect)
    model = _map_model(prospect.checkpoint)
    decoder, blocks = find_feed_forwards(model, len(prospect.shape.layers))
    self_check(blocks[0])
    full = {index: blocks[index].current() for index in plan.streamed}
    offload = _offload_tier(prospect, plan, config)
    source = _make_source(full, prospect, offload) if full else None
    if source is not None:
        on_failure.callback(source.close)
    compact = {index: _compact(blocks[index], plan.kept[index], prospect) for index in full}
    for index, parameters in compact.items():
        blocks[index].install(parameters)
    host_embedding = _place_residents(model, prospect, plan, compact)
    if prospect.request.translated:
        translate_linears(model, scratch_bytes(prospect.shape))
    layers = StreamedLayers(
        decoder=decoder,
        blocks=blocks,
        compact=compact,
        kept=plan.kept,
        source=source,
        stream=StreamConfig(prospect.device, prospect.dtype, plan.slots),
        ff_chunk_tokens=plan.ff_chunk_tokens,
        config=config,
    )
    resident = _resident_bytes(model)
    ledger.hold(residents=resident, offloaded=_offloaded_in_budget(prospect, source))
    return Loaded(model, layers, ledger, host_embedding, resident, offload, threads)


def _threads(prospect: Prospect, config: LoadConfig) -> int | None:
    if prospect.device.type != "cpu":
        return None
    return config.threads or choose_threads(
        prospect.shape.hidden_size, prospect.shape.layers[0].neurons, prospect.dtype
    )


def _check_free_memory(prospect: Prospect, plan: Plan) -> None:
    free, _ = device_bytes(prospect.device)
    needed = plan.peak_bytes - plan.parts["overhead"]
    if needed > free:
        raise DoesNotFit(
            f"the plan needs {format_bytes(needed)} but only {format_bytes(free)} of the {prospect.device.type} "
            "device's memory are free: close other programs or lower --max-gpu-mem"
        )


def _cap_allocator(prospect: Prospect) -> None:
    # A backstop, not the promise: it covers the caching allocator alone, so the context comes off first.
    if prospect.device.type == "cuda":
        budget = prospect.request.budget_bytes - prospect.request.overhead_bytes
        _, total = device_bytes(prospect.device)
        torch.cuda.set_per_process_memory_fraction(min(max(budget / total, 0.0), 1.0), prospect.device)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _map_model(checkpoint: Checkpoint) -> Any:
    """The stock model on the CPU, its parameters views of the mapped files; every parameter must be there."""
    try:
        with _quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                checkpoint.directory,
                dtype=checkpoint.dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
            )
    except Exception as error:  # each architecture fails in its own way
        raise CheckpointError(f"{checkpoint.directory} cannot be loaded: {one_line(error)}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info[problem])
        if names:
            raise CheckpointError(
                f"{checkpoint.directory} does not match its config.json: {len(names)} {problem.replace('_', ' ')}, "
                f"first {names[0]}"
            )
    return model.eval()


def _offload_tier(prospect: Prospect, plan: Plan, config: LoadConfig) -> str:
    """ "ram" or "disk"; DoesNotFit when RAM was asked for and there is too little."""
    if config.max_cpu_mem is not None and config.offload == "disk":
        raise UsageError(
            "--max-cpu-mem limits what RAM holds, and --offload disk holds nothing there: give one of them"
        )
    if prospect.device.type == "cpu":
        return "ram" if config.offload == "ram" else "disk"  # the budget has counted it
    stored = sum(prospect.shape.layers[i].ff_bytes for i in plan.streamed)
    free, total = device_bytes(torch.device("cpu"))
    room = int(free * _RAM_SHARE)
    if config.max_cpu_mem is not None:
        room = min(room, parse_size(config.max_cpu_mem, total_bytes=total, free_bytes=free))
    if config.offload == "auto":
        return "ram" if stored <= room else "disk"
    if config.offload == "ram" and stored > room:
        raise DoesNotFit(
            f"--offload ram needs {format_bytes(stored)} of host memory and {format_bytes(room)} are allowed: use "
            "--offload disk or raise --max-cpu-mem"
        )
    return config.offload


def _evicts(prospect: Prospect) -> bool:
    """Whether used file pages are dropped from the page cache: when the whole file would not fit beside us."""
    free, _ = device_bytes(torch.device("cpu"))
    return prospect.checkpoint.weight_bytes + prospect.request.budget_bytes > free


def _make_source(full: dict[int, list[Tensor]], prospect: Prospect, offload: str) -> Source:
    if offload == "disk":
        mapped = MappedWeights(full, evict=_evicts(prospect))
        if mapped.unmapped_bytes:
            size = format_bytes(mapped.unmapped_bytes)
            warnings.warn(f"{size} of the weights were converted while loading and rest in RAM", stacklevel=2)
        return mapped
    with contextlib.closing(MappedWeights(full, evict=_evicts(prospect))) as mapped:
        return RamWeights(mapped, list(full), prospect.dtype, pin=prospect.device.type == "cuda")


def _offloaded_in_budget(prospect: Prospect, source: Source | None) -> int:
    """Host bytes of full weights that count against the budget: on the CPU, those no file backs."""
    if prospect.device.type != "cpu" or source is None:
        return 0
    return source.nbytes if isinstance(source, RamWeights) else source.unmapped_bytes


def _compact(block: FeedForward, kept: int, prospect: Prospect) -> list[nn.Parameter]:
    return [
        nn.Parameter(torch.empty(shape, dtype=prospect.dtype, device=prospect.device), requires_grad=False)
        for shape in block.compact_shapes(kept)
    ]


def _place_residents(
    model: Any, prospect: Prospect, plan: Plan, compact: dict[int, list[nn.Parameter]]
) -> HostEmbedding | None:
    """Copy every parameter that still lies in a file into the device's memory; embeddings may stay behind.

    Copies, on the CPU as well: mapped pages can be evicted, and decoding would read them again.
    """
    embedding = model.get_input_embeddings()
    stay = {id(embedding)} if plan.embeddings == "host" else set()
    copies = {id(parameter): parameter for parameters in compact.values() for parameter in parameters}
    with contextlib.closing(FilePages(list(model.parameters()), evict=_evicts(prospect))) as pages:
        _copy_residents(model, prospect, stay, copies, pages)
    return HostEmbedding(embedding, prospect.device, prospect.dtype) if stay else None


def _copy_residents(
    model: Any, prospect: Prospect, stay: set[int], copies: dict[int, nn.Parameter], pages: FilePages
) -> None:
    """Copy by several threads: most of the time goes into page faults, which the kernel takes in parallel."""
    modules = [module for module in model.modules() if id(module) not in stay]
    parameters = {id(p): p for m in modules for p in m._parameters.values() if p is not None and id(p) not in copies}
    with ThreadPoolExecutor(_COPY_THREADS) as pool:
        done = pool.map(lambda parameter: _resident(parameter, prospect, pages), parameters.values())
        # By identity, so that tied weights stay tied.
        copies.update(zip(parameters, done, strict=True))
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = copies[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(prospect.device)


def _resident(parameter: nn.Parameter, prospect: Prospect, pages: FilePages) -> nn.Parameter:
    # Only the stored precision is translated: what transformers keeps in float32 stays so.
    changed = parameter.dtype == prospect.checkpoint.dtype
    target = torch.empty(parameter.shape, dtype=prospect.dtype if changed else parameter.dtype, device=prospect.device)
    spans = pages.spans([parameter])
    pages.read(spans)
    target.copy_(parameter.detach())
    pages.drop(spans)
    return nn.Parameter(target, requires_grad=False)


def _resident_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers; an embedding that stays on the host is none of them."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
