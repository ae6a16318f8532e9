"""What is known of a model before a weight is read: its checkpoint, its sizes, the budget, and the plan."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from griffin_offload.blocks.layouts import build_on_meta
from griffin_offload.blocks.sizes import ModelSizes
from griffin_offload.blocks.states import cache_layers, lasting_kinds, state_kinds
from griffin_offload.checkpoint.base import Checkpoint
from griffin_offload.checkpoint.registry import PartSizes, open_checkpoint, part_sizes
from griffin_offload.config import (
    MAX_DRAFT_TOKENS,
    WEIGHT_NORMS,
    AskedKVBits,
    CacheKind,
    KVBits,
    LoadConfig,
    MissingExperts,
    pass_tokens,
)
from griffin_offload.devices.base import Device
from griffin_offload.devices.memory import budget_bytes, host_bytes, session_bytes
from griffin_offload.devices.registry import choose_device, device_kind, devices_here
from griffin_offload.engine.build import emulates_halves
from griffin_offload.engine.decode_graph import GRAPH_COSTS
from griffin_offload.engine.precisions import others_of, resting_head, shapes_of
from griffin_offload.engine.step_replay import MOST_KEPT
from griffin_offload.errors import DoesNotFit, UsageError
from griffin_offload.formats import Format, planned_as
from griffin_offload.kv_cache.kv_cache import can_cache, why_not_back
from griffin_offload.kv_cache.sequence_file import ContextSchema, ModelIdentity
from griffin_offload.kv_cache.workload import width_of
from griffin_offload.planner.plan import Plan
from griffin_offload.planner.request import GraphCosts, PlanRequest
from griffin_offload.planner.solve import make_plan
from griffin_offload.planner.tiers import bits_of
from griffin_offload.transformers_api import keeps_entries, warn_if_untested
from griffin_offload.units import format_bytes


@dataclass(frozen=True)
class ModelSpec:
    """Everything known before a weight is read."""

    checkpoint: Checkpoint
    hardware: Device
    dtype: torch.dtype
    shapes: tuple[ModelSizes, ...]
    """The model in every precision its residents may have, best first."""
    ruled_out: Callable[[], tuple[ModelSizes, ...]]
    """Makes `others`."""
    request: PlanRequest
    assumed: str | None = None
    """What is not known of a device that is not here; None where it is."""

    @property
    def device(self) -> torch.device:
        """torch's name for the hardware."""
        return self.hardware.torch_device

    @property
    def shape(self) -> ModelSizes:
        """What does not depend on the precision."""
        return self.shapes[0]

    def check_exact(self, precision: Format, kv_bits: KVBits) -> None:
        """UsageError unless residents of `precision` can draft for the full model: all but FFs must be as stored."""
        if precision is not self.checkpoint.precision or precision.rests_as() is not precision:
            raise UsageError(
                f"exact mode needs residents in the stored precision, these are {precision}: load with exact=True"
            )
        if self.request.cache != "ours":
            raise UsageError(f"exact mode takes drafts back: {why_not_back(self.checkpoint.config)}")
        if not self.shape.splits_states:
            raise UsageError(
                f"exact mode takes drafts back: layers of kind {state_kinds(self.checkpoint.config)} write keys, "
                "values and a state in one part, which cannot run once more over fewer tokens"
            )
        if kv_bits != 16:
            how = "leave out" if self.request.kv_bits == kv_bits else "load with exact=True, or kv_bits=16 in place of"
            raise UsageError(f"exact mode needs the KV cache as it is computed: {how} kv_bits={kv_bits}")

    @staticmethod
    def precision_of(plan: Plan) -> Format:
        """Of the residents, of tiers that of the most bits: a plan names the precision of the computation where they
        have that."""
        return planned_as(plan.levels[0])

    def quantises(self, plan: Plan) -> bool:
        """Whether every prompt quantises the neurons it keeps: the checkpoint holds them in another format."""
        stored = self.checkpoint.precision
        there = stored.holds or (stored.rests_as(),)
        return any(not format.is_plain and format not in there for format in map(planned_as, plan.levels))

    @property
    def stored_expert_share(self) -> float:
        """Stored bytes of what is packed, as experts are where anything is, for each in the checkpoint's floats."""
        packed = [tensor for tensor in self.checkpoint.tensors().values() if tensor.decode is not None]
        full = sum(tensor.nbytes for tensor in packed)
        return sum(tensor.stored_bytes for tensor in packed) / full if full else 1.0

    @functools.cached_property
    def others(self) -> tuple[ModelSizes, ...]:
        """In the precisions that `quantize` rules out: asked for by remedies and comparisons alone."""
        return self.ruled_out()

    def shape_of(self, plan: Plan) -> ModelSizes:
        """The sizes in the precision of `plan`."""
        wanted = (plan.precision, plan.levels, plan.as_held)

        def fits(shape: ModelSizes) -> bool:
            return (shape.precision_name, shape.level_names, shape.as_held) == wanted

        return next(filter(fits, self.shapes), None) or next(filter(fits, self.others))

    def small_of(self, plan: Plan) -> dict[str, list[str]]:
        """Names of matrices by the format that they rest in, where it is a finer one than their neighbours'."""
        shape = self.shape_of(plan)
        names = sorted({name for layer in shape.layers for name in layer.finer})
        return {} if shape.finer is None else {shape.finer.name: names}


def examine(model: str | Path, config: LoadConfig, *, anywhere: bool = False) -> ModelSpec:
    """Read headers and config of `model`, and turn `config` into a request to the planner."""
    return examine_checkpoint(
        open_checkpoint(model, offline=config.offline, adapter=config.adapter), config, anywhere=anywhere
    )


def examine_checkpoint(checkpoint: Checkpoint, config: LoadConfig, *, anywhere: bool = False) -> ModelSpec:
    """The same for a checkpoint that was opened, or of which only the config is known. `anywhere`: the device may be
    another machine's, if its memory is given."""
    warn_if_untested()
    absent = anywhere and config.device not in ("auto", *devices_here())
    hardware = device_kind(config.device).absent() if absent else choose_device(config.device)
    device = hardware.torch_device
    overhead_bytes = hardware.assumed_overhead_bytes if absent else hardware.overhead_bytes()
    dtype = checkpoint.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    checkpoint = checkpoint.in_precision(dtype)
    meta = build_on_meta(checkpoint.config, dtype)
    # Elsewhere they take none of the device's memory.
    parts = part_sizes(meta, checkpoint) if hardware.shares_host_memory else PartSizes()
    # In host memory the rows are read in place, so their precision has to be the stored one.
    host_embeddings = not hardware.shares_host_memory or (dtype == checkpoint.dtype and not parts.embeddings)
    head = checkpoint.tables if config.exact else resting_head(checkpoint, meta, host_embeddings)
    shapes, slower = shapes_of(checkpoint, meta, device, config, head)

    def ruled_out() -> tuple[ModelSizes, ...]:
        return (*slower, *others_of(checkpoint, build_on_meta(checkpoint.config, dtype), device, config, head))

    cache = _cache_kind(checkpoint.config, config.kv_bits)
    request = PlanRequest(
        budget_bytes=budget_bytes(config, hardware, absent=absent),
        session_bytes=session_bytes(config, hardware, absent=absent),
        ctx_tokens=config.ctx_size,
        prompt_tokens=config.prompt_tokens,
        batch=config.batch_size,
        sequences=config.sequences,
        density=config.density,
        bits=config.bits,
        overhead_bytes=overhead_bytes,
        offloaded_in_budget=hardware.shares_host_memory and config.offload == "ram",
        ff_chunk_tokens=config.ff_chunk_tokens,
        host_computes=config.missing_experts == "host",
        always_stream=config.always_stream,
        kv_bits=16 if config.kv_bits == "auto" else config.kv_bits,
        halves_kv=config.kv_bits == "auto" and cache == "ours" and not config.exact and not shapes[0].has_experts,
        cache=cache,
        converted_ff=parts.feed_forward,
        converted_bytes=parts.embeddings + parts.rest,
        host_embeddings=host_embeddings,
        stored_share=_stored_share(checkpoint, parts, dtype) if hardware.shares_host_memory else 0.0,
        on_grids=parts.on_grids,
        translated=emulates_halves(device, dtype),
        pass_tokens=pass_tokens(config.exact, config.draft_tokens, config.refresh),
        verifies=config.exact,
        weight_norms=config.selection in WEIGHT_NORMS,
        # Where no context can be kept every prompt is read from its start.
        continued=config.keep_prompts and can_cache(checkpoint.config),
        replays=MOST_KEPT if hardware.computes_on_cpu else 0,
        graphs=_graph_costs(hardware, config, shapes[0]),
    )
    assumed = f"no {hardware.name} device is here, {format_bytes(overhead_bytes)} are assumed for its runtime"
    model_spec = ModelSpec(checkpoint, hardware, dtype, shapes, ruled_out, request, assumed if absent else None)
    if config.exact:
        model_spec.check_exact(checkpoint.precision, request.kv_bits)
    for check in (_check_neurons, _check_passes, _check_experts):
        check(model_spec, config)
    return model_spec


def by_residents_alone(checkpoint: Checkpoint, options: dict[str, Any]) -> dict[str, Any]:
    """`options`, fields of `LoadConfig`, and what they lack for answers in which nothing left out has a part: of
    mixtures of experts, missing ones are not read."""
    routed = examine_checkpoint(checkpoint, LoadConfig(**options)).shape.has_experts
    return options | {"missing_experts": "route"} if routed else options


def _graph_costs(hardware: Device, config: LoadConfig, shape: ModelSizes) -> GraphCosts | None:
    """Of captured decode steps. A forward that asks which experts it needs cannot be captured."""
    return GRAPH_COSTS if hardware.captures and config.cuda_graphs and not shape.has_experts else None


def _check_experts(model_spec: ModelSpec, config: LoadConfig) -> None:
    """UsageError for what does not go together with a mixture of experts, and for its options where there is none."""
    if not model_spec.shape.has_experts:
        if config.missing_experts != "fetch":
            raise UsageError(
                f"missing_experts={config.missing_experts!r} is for mixtures of experts, and "
                f"{model_spec.checkpoint.config.model_type} is none: leave it out"
            )
        return
    if config.missing_experts == "host" and model_spec.hardware.shares_host_memory:
        raise UsageError(
            "missing_experts='host' has the CPU compute for another device, and here it is the device itself: take "
            "missing_experts='fetch'"
        )
    if config.offload == "ram":
        raise UsageError(
            "offload='ram' holds no experts: they rest in their files, which the page cache holds where RAM has room: "
            "leave it out"
        )
    if config.selection in WEIGHT_NORMS:
        raise UsageError(f"selection={config.selection!r} is by norms of neurons, and experts are none: take 'topk'")


def _stored_share(checkpoint: Checkpoint, parts: PartSizes, dtype: torch.dtype) -> float:
    """Of a layer in a slot, the stored bytes that it is made of; 0 where it is used as it is stored."""
    in_place = dtype == checkpoint.dtype and not parts.translated_share
    return 0.0 if in_place else (parts.translated_share or 1) * checkpoint.dtype.itemsize / dtype.itemsize


def check_no_passes(refresh: int, missing: MissingExperts) -> None:
    """UsageError for passes between two tokens where missing experts are read or computed by the CPU: there is nothing
    to correct."""
    if refresh:
        raise UsageError(
            f"refresh={refresh} corrects what residents alone have computed, and with missing_experts={missing!r} "
            "every token is the full model's own: leave it out, or load with missing_experts='route'"
        )


def _check_neurons(model_spec: ModelSpec, config: LoadConfig) -> None:
    """UsageError for what chooses neurons where no layer has any."""
    if model_spec.shape.with_neurons:
        return
    none = f"{model_spec.checkpoint.config.model_type} has no feed-forward: there are no neurons"
    densities = config.density if isinstance(config.density, Sequence) else [config.density]
    measures = config.always_stream and config.density == 0  # in a measurement nothing need stay
    if config.density != "auto" and not measures and any(density != 1 for density in densities):
        raise UsageError(f"{none} to leave out, and no density below 1")
    if config.exact:
        raise UsageError(f"{none} to draft with: leave exact mode out, every answer is the full model's")


def _check_passes(model_spec: ModelSpec, config: LoadConfig) -> None:
    """UsageError where the passes between two tokens cannot take the drafted ones back."""
    if model_spec.shape.has_experts and not config.exact and config.missing_experts != "route":
        check_no_passes(model_spec.request.pass_tokens, config.missing_experts)
    if model_spec.request.pass_tokens and model_spec.request.cache != "ours":
        reason = why_not_back(model_spec.checkpoint.config)
        raise UsageError(f"refresh={model_spec.request.pass_tokens} takes tokens back: {reason}")
    most = MAX_DRAFT_TOKENS + 1
    if model_spec.request.pass_tokens > most and any(layer.window is not None for layer in model_spec.shape.layers):
        raise UsageError(
            f"refresh={model_spec.request.pass_tokens}: of layers with a window at most {most} tokens can be taken back"
        )


def _cache_kind(config: PretrainedConfig, bits: AskedKVBits) -> CacheKind:
    if can_cache(config) and (bits not in (8, 4) or keeps_entries(cache_layers(config))):
        return "ours"
    if bits in (8, 4):
        kinds = lasting_kinds(config) or state_kinds(config)
        raise UsageError(
            f"kv_bits={bits} needs layers of {config.model_type} that keep keys and values, some are {kinds}"
        )
    return "dynamic"


def plan_for(model_spec: ModelSpec) -> Plan:
    """The plan; DoesNotFit when there is none."""
    try:
        return make_plan(model_spec.shapes, model_spec.request)
    except DoesNotFit:
        return make_plan(model_spec.shapes, model_spec.request, model_spec.others)  # for a better remedy


def evicts(model_spec: ModelSpec) -> bool:
    """Whether used file pages are dropped from the page cache: when the whole file would not fit beside us."""
    free, _ = host_bytes()
    return model_spec.checkpoint.weight_bytes + model_spec.request.budget_bytes > free


# What a saved context must agree with before a loaded model goes on from it.


def identity_of(model_spec: ModelSpec, plan: Plan, config: LoadConfig) -> ModelIdentity:
    """What the numbers in a context depend on."""
    shape = model_spec.shape_of(plan)
    of_experts: ModelIdentity = {"missing_experts": config.missing_experts} if plan.experts else {}
    return of_experts | {
        "model": model_spec.checkpoint.fingerprint(),
        "precision": plan.in_words if plan.as_held else plan.precision,
        "dtype": str(model_spec.dtype).removeprefix("torch."),
        "density": [layer.density(kept) for kept, layer in zip(plan.kept, shape.layers, strict=True)],
        "streamed": list(plan.streamed),
        "kv_bits": plan.kv_bits,
        "selection": config.selection,
        "batch_statistic": config.batch_statistic,
        "decay": config.decay,
        **({"tiers": [list(own) for own in plan.counts], "bits": bits_of(shape, plan.counts)} if plan.tiers else {}),
    }


def like_of(model_spec: ModelSpec, plan: Plan) -> ContextSchema:
    """What the parts of a saved context must look like."""
    shape = model_spec.shape_of(plan)
    neurons = {index: (shape.layers[index].neurons, plan.counts_of(index)) for index in plan.streamed}
    widths = tuple(width for layer in shape.layers if (width := width_of(shape, layer)))
    states = tuple(layer.states for layer in shape.layers if layer.states)
    return ContextSchema(plan.context_tokens, shape.vocab_size, widths, model_spec.dtype, neurons, states)


def why_no_checkpoint(spec: ModelSpec, plan: Plan) -> str | None:
    """Why the parameters of a model that was loaded by `plan` are no checkpoint; None if they are one."""
    shape = spec.shape_of(plan)
    whole = all(kept == layer.neurons for kept, layer in zip(plan.kept, shape.layers, strict=True))
    if not shape.is_plain:
        return (
            f"its matrices are {plan.precision}: load it with quantize='none', or make a copy on the disk by "
            "griffin-offload convert"
        )
    if not whole:
        return (
            f"it holds {plan.density:.2g} of the neurons, those of the last prompt: load it with density=1.0, "
            f"or copy {spec.checkpoint.directory}"
        )
    if plan.streamed:
        return "its layers are streamed: load it without always_stream"
    if plan.embeddings == "host":
        return "its embeddings rest in the checkpoint: load it with device='cpu'"
    return None
