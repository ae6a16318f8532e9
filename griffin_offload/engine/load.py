"""From a plan to a loaded model: map the weights, install compact FFs, place the residents."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from griffin_offload.blocks.base import Block
from griffin_offload.blocks.expert_products import HostExperts
from griffin_offload.blocks.experts import Experts
from griffin_offload.blocks.layouts import find_feed_forwards, self_check
from griffin_offload.blocks.replace import swap_experts, swap_linears
from griffin_offload.blocks.sizes import ModelSizes
from griffin_offload.checkpoint.base import Checkpoint
from griffin_offload.checkpoint.config_files import settle_generation_config
from griffin_offload.checkpoint.files import Mappings
from griffin_offload.checkpoint.mapped import FilePages
from griffin_offload.config import LoadConfig
from griffin_offload.devices.memory import Ledger, beside_bytes, host_bytes
from griffin_offload.devices.threads import limited_threads
from griffin_offload.engine.build import build, emulates_halves, use_own_attention, use_own_linears, use_own_norms
from griffin_offload.engine.calibration import Importance, importance_of
from griffin_offload.engine.layer_pass import DecoderLayers
from griffin_offload.engine.residents import (
    Loaded,
    cache_experts,
    compact_blocks,
    forget_codes,
    place_residents,
    resident_bytes,
)
from griffin_offload.engine.spec import ModelSpec, evicts
from griffin_offload.errors import CheckpointError, DoesNotFit, GriffinError, UsageError, memory_refused, unreadable
from griffin_offload.formats.linear import swap_head
from griffin_offload.kernels.by_blocks import Scratch
from griffin_offload.kernels.library import HALVES
from griffin_offload.method.allocation import tiers_of
from griffin_offload.offload.expert_buffers import ExpertBuffers, HostBuffers
from griffin_offload.offload.expert_store import ExpertStore
from griffin_offload.offload.layer_stream import BackgroundLoader, StreamConfig
from griffin_offload.offload.weight_store import HostStore, MmapStore, Source
from griffin_offload.planner.plan import Plan
from griffin_offload.transformers_api import StockModel
from griffin_offload.units import format_bytes, parse_size

# The host keeps this share of its free memory when full weights are put into it.
_RAM_SHARE = 0.8
_SLACK_BYTES = 100_000_000


def load(model_spec: ModelSpec, plan: Plan, config: LoadConfig) -> Loaded:
    """Load the model of `model_spec` by `plan`. On failure nothing stays open."""
    described = (
        model_spec.shape_of(plan).weight_bytes * model_spec.checkpoint.dtype.itemsize // model_spec.dtype.itemsize
    )
    check_stored(model_spec.checkpoint, described)
    check_free_memory(model_spec, plan)
    threads = _threads(model_spec, config)  # its trial needs memory that the residents will take
    # Tensors of inference mode could not be filled again outside of it.
    with limited_threads(threads), torch.inference_mode(False), contextlib.ExitStack() as on_failure:
        with _unchanged(model_spec.checkpoint):
            loaded = _load(model_spec, plan, config, threads, on_failure)
        on_failure.pop_all()
    return loaded


@contextlib.contextmanager
def _unchanged(checkpoint: Checkpoint) -> Iterator[None]:
    """CheckpointChanged unless its files are the same when the block ends, whatever went wrong inside; GriffinError
    where they cannot be read."""
    try:
        with contextlib.closing(checkpoint.watched()) as files:
            files.check()
            try:
                yield
            except (GriffinError, OSError):
                files.check()  # it may be the reason
                raise
            files.check()
    except OSError as error:
        if memory_refused(error):
            raise
        raise GriffinError(unreadable(checkpoint.directory, error)) from error


def _load(
    model_spec: ModelSpec, plan: Plan, config: LoadConfig, threads: int | None, on_failure: contextlib.ExitStack
) -> Loaded:
    hardware, overhead_bytes = model_spec.hardware, model_spec.request.overhead_bytes
    ledger = Ledger(hardware, overhead_bytes)
    hardware.cap(model_spec.request.budget_bytes - overhead_bytes)
    shape = model_spec.shape_of(plan)
    scratch = make_scratch(model_spec, shape)
    model, decoder, blocks = _map_layers(model_spec, plan, scratch)
    full = {index: blocks[index].full() for index in plan.streamed}
    offload = _offload_tier(model_spec, plan, config)
    mappings = Mappings()
    dense = {index: tensors for index, tensors in full.items() if not isinstance(blocks[index], Experts)}
    source = _make_source(dense, model_spec, offload, mappings) if dense else None
    if source is not None:
        on_failure.callback(source.close)
    if isinstance(source, HostStore):
        for index in dense:
            forget_codes(blocks[index])
    store = _expert_store({index: full[index] for index in full if index not in dense}, blocks, model_spec)
    if store is not None:
        on_failure.callback(store.close)
    pages = FilePages(list(model.parameters()), evict=evicts(model_spec), mappings=mappings)
    on_failure.callback(pages.close)
    compact, jobs = compact_blocks(blocks, full, model_spec, plan, pages)
    head = model.get_output_embeddings()
    stages = [model.get_input_embeddings(), *decoder, *([] if head is None else [head])]
    jobs = [[], *jobs, *([] if head is None else [[]])]
    host_embedding = place_residents(model, stages, model_spec, plan, compact, pages, jobs)
    if host_embedding is not None:
        on_failure.callback(host_embedding.close)
    if hardware.computes_on_cpu and model_spec.dtype in HALVES:
        use_own_linears(model, scratch, translated=model_spec.request.translated)
        use_own_attention(model)
        use_own_norms(model)
    layers = DecoderLayers(
        decoder=decoder,
        blocks=blocks,
        compact={index: compact[index] for index in full},
        counts=tuple(plan.counts_of(index) for index in range(len(blocks))),
        source=source,
        stream=_stream_config(model_spec, plan),
        ff_chunk_tokens=plan.ff_chunk_tokens,
        config=config,
        expert_store=store,
        expert_buffers=_expert_buffers(model_spec, plan),
    )
    host = HostExperts(hardware, make_scratch(model_spec, shape, torch.device("cpu"))) if plan.host_bytes else None
    cache_experts(layers, host)
    resident = resident_bytes(model)
    ledger.hold(residents=resident, offloaded=_offloaded_in_budget(model_spec, source))
    layers.arrival = BackgroundLoader(stages, jobs, check=pages.files.check_contents, finished=pages.close)
    on_failure.callback(layers.arrival.close)
    layers.arrival.start()
    return Loaded(model, layers, ledger, host_embedding, resident, offload, threads)


def _stream_config(model_spec: ModelSpec, plan: Plan) -> StreamConfig:
    keeps_pages = model_spec.request.on_grids and not model_spec.shape_of(plan).is_plain
    return StreamConfig(model_spec.hardware, model_spec.dtype, plan.slots, keeps_pages=keeps_pages)


def _expert_store(full: dict[int, list[Tensor]], blocks: list[Block], model_spec: ModelSpec) -> ExpertStore | None:
    made = (block if isinstance(block, Experts) and block.form.makes else None for block in blocks)
    fills = {index: block.form.fill for index, block in enumerate(made) if block is not None}
    return ExpertStore(full, evict=evicts(model_spec), fills=fills) if full else None


def _expert_buffers(model_spec: ModelSpec, plan: Plan) -> ExpertBuffers:
    few = model_spec.shape_of(plan).expert_slots_in_decode(plan.expert_slots)
    return ExpertBuffers(plan.expert_slots, few, HostBuffers(few, few) if plan.host_bytes else None)


def make_scratch(model_spec: ModelSpec, shape: ModelSizes, device: torch.device | None = None) -> Scratch:
    """What matrices are multiplied through that are not multiplied as they rest, on the model's device or another one;
    empty where there are none."""
    translated = model_spec.request.translated if device is None else emulates_halves(device, model_spec.dtype)
    dtype = torch.float32 if translated else model_spec.dtype
    return Scratch(shape.scratch_bytes if translated or not shape.is_plain else 0, dtype, device or model_spec.device)


def _map_layers(model_spec: ModelSpec, plan: Plan, scratch: Scratch) -> tuple[StockModel, nn.ModuleList, list[Block]]:
    """The model with its parameters in the mapped files, linear layers swapped where residents are quantised."""
    checkpoint, shape = model_spec.checkpoint, model_spec.shape_of(plan)
    model = build(checkpoint, scratch)
    model.name_or_path = model.config.name_or_path = str(checkpoint.directory)
    decoder, blocks = find_feed_forwards(model, len(shape.layers))
    settle_generation_config(model, shape.vocab_size, checkpoint.directory)
    for block in blocks:
        if block.neurons and not isinstance(block, Experts):  # whose own code says how they lie
            self_check(block)
            break
    others = shape.formats != (checkpoint.precision.rests_as(),)
    if not shape.is_plain and (others or any(block.in_rows for block in blocks)):
        importance: Importance = {}
        anew = others or any(blocks[index].in_rows for index in plan.streamed)
        rounded = [format for format in shape.formats if anew and format not in checkpoint.precision.holds]
        if any(format.wants_importance for format in rounded):
            importance = importance_of(checkpoint, model, decoder, blocks, evict=evicts(model_spec))
        tiers = [[(shape.levels[level], kept) for level, kept in tiers_of(own)] for own in plan.counts]
        formats, finer = (shape.precision, checkpoint.precision), [layer.finer for layer in shape.layers]
        in_rows = {
            i
            for i, (layer, own) in enumerate(zip(shape.layers, plan.counts, strict=True))
            if layer.bytes_in_rows(own, streamed=i in plan.streamed) is not None
        }
        swap_linears(decoder, blocks, *formats, scratch, importance, tiers, shape.finer, finer, in_rows)
        if others:  # else they are as the copy has them
            records = checkpoint.records
            swap_experts(decoder, blocks, *formats, records, scratch, importance, shape.finer, finer)
        decoder, blocks = find_feed_forwards(model, len(shape.layers))
    if shape.head is not checkpoint.tables:
        swap_head(model, checkpoint.tables, shape.head, scratch)
    return model, decoder, blocks


def _threads(model_spec: ModelSpec, config: LoadConfig) -> int | None:
    if not model_spec.hardware.computes_on_cpu:
        return config.threads if config.missing_experts == "host" else None
    shape = model_spec.shape
    return config.threads or model_spec.hardware.choose_threads(
        shape.hidden_size, shape.width or shape.hidden_size, model_spec.dtype
    )


def check_stored(checkpoint: Checkpoint, described_bytes: int) -> None:
    """CheckpointError where the files hold far less than the config describes: what they lack would be made of random
    numbers, in memory, before it is found missing by name."""
    stored_bytes = sum(tensor.nbytes for tensor in checkpoint.tensors().values())
    if described_bytes > 2 * stored_bytes + _SLACK_BYTES:  # files of several precisions, buffers that are none
        raise CheckpointError(
            f"{checkpoint.directory / 'config.json'} describes {format_bytes(described_bytes)} of weights, the files "
            f"hold {format_bytes(stored_bytes)}: one of them is of another model"
        )


def check_free_memory(model_spec: ModelSpec, plan: Plan) -> None:
    """DoesNotFit where the plan's memory is not free, or on the CPU that and what the process holds beside it: the
    kernel would take the pages of the program itself, and read them again for every token."""
    free, _ = model_spec.hardware.memory_bytes()
    needed = plan.peak_bytes - plan.parts["overhead"]
    beside = beside_bytes(model_spec.hardware, plan.full_bytes) or 0
    if needed + beside > free:
        more = f" and the program itself up to {format_bytes(beside)}" if beside else ""
        raise DoesNotFit(
            f"the plan needs {format_bytes(needed)}{more}, but only {format_bytes(free)} of the "
            f"{model_spec.hardware.name} device's memory are free: close other programs or lower --max-gpu-mem"
        )


def _offload_tier(model_spec: ModelSpec, plan: Plan, config: LoadConfig) -> str:
    """ "ram" or "disk"; DoesNotFit when RAM was asked for and there is too little."""
    if config.max_cpu_mem is not None and config.offload == "disk":
        raise UsageError(
            "--max-cpu-mem limits what RAM holds, and --offload disk holds nothing there: give one of them"
        )
    if model_spec.hardware.shares_host_memory:
        return "ram" if config.offload == "ram" else "disk"  # the budget has counted it
    stored = sum(model_spec.shape_of(plan).layers[i].ff_bytes for i in plan.streamed)
    free, total = host_bytes()
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


def _make_source(full: dict[int, list[Tensor]], model_spec: ModelSpec, offload: str, mappings: Mappings) -> Source:
    if offload == "disk":
        mapped = MmapStore(full, evict=evicts(model_spec), mappings=mappings)
        if mapped.unmapped_bytes:
            size = format_bytes(mapped.unmapped_bytes)
            warnings.warn(f"{size} of the weights were converted while loading and rest in RAM", stacklevel=2)
        return mapped
    with contextlib.closing(MmapStore(full, evict=evicts(model_spec), mappings=mappings)) as mapped:
        return HostStore(mapped, list(full), model_spec.dtype, model_spec.hardware)


def _offloaded_in_budget(model_spec: ModelSpec, source: Source | None) -> int:
    """Host bytes of full weights that count against the budget: in host memory, those no file backs."""
    if not model_spec.hardware.shares_host_memory or source is None:
        return 0
    return source.nbytes if isinstance(source, HostStore) else source.unmapped_bytes
