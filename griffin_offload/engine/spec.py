"""What is known of a model before a weight is read: its checkpoint, its sizes, the budget, and the plan."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from griffin_offload.blocks.layouts import build_on_meta
from griffin_offload.blocks.sizes import ModelSizes, model_shape, states_of
from griffin_offload.blocks.states import lasting_kinds, state_kinds
from griffin_offload.checkpoint.base import Checkpoint
from griffin_offload.checkpoint.registry import PartSizes, open_checkpoint, part_sizes
from griffin_offload.config import (
    MAX_DRAFT_TOKENS,
    TIERS,
    WEIGHT_NORMS,
    AskedKVBits,
    CacheKind,
    KVBits,
    LoadConfig,
    pass_tokens,
)
from griffin_offload.devices.base import Device
from griffin_offload.devices.memory import budget_bytes, host_bytes, session_bytes
from griffin_offload.devices.registry import choose_device, device_kind, devices_here
from griffin_offload.engine.build import emulates_halves
from griffin_offload.engine.decode_graph import GRAPH_COSTS
from griffin_offload.errors import UnsupportedModel, UsageError
from griffin_offload.formats import INT4, INT8, RESTING_HEAD, SMALL_MATRICES, Format, every, planned_as
from griffin_offload.formats.linear import reads_head_itself
from griffin_offload.kernels.library import compiled
from griffin_offload.kv_cache.kv_cache import can_cache, why_not_back
from griffin_offload.kv_cache.sequence_file import ContextSchema, ModelIdentity
from griffin_offload.kv_cache.store import width_of
from griffin_offload.planner.plan import Plan
from griffin_offload.planner.request import PlanRequest
from griffin_offload.planner.solve import make_plan
from griffin_offload.planner.tiers import bits_of
from griffin_offload.transformers_api import StockModel, warn_if_untested
from griffin_offload.units import format_bytes


@dataclass(frozen=True)
class ModelSpec:
    """Everything known before a weight is read."""

    checkpoint: Checkpoint
    hardware: Device
    dtype: torch.dtype
    shapes: tuple[ModelSizes, ...]
    """The model in every precision its residents may have, best first."""
    others: tuple[ModelSizes, ...]
    """In the precisions that `quantize` rules out."""
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
        if kv_bits == 8:
            how = "leave out" if self.request.kv_bits == 8 else "load with exact=True, or kv_bits=16 in place of"
            raise UsageError(f"exact mode needs the KV cache as it is computed: {how} kv_bits=8")

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

    def shape_of(self, plan: Plan) -> ModelSizes:
        """The sizes in the precision of `plan`."""
        every_shape = (*self.shapes, *self.others)
        return next(s for s in every_shape if (s.precision_name, s.level_names) == (plan.precision, plan.levels))

    def small_of(self, plan: Plan) -> dict[str, list[str]]:
        """Names of small matrices by the format that they rest in, where it is another one than their neighbours'."""
        shape = self.shape_of(plan)
        names = sorted({name for layer in shape.layers for name in layer.small})
        return {} if shape.small is None else {shape.small.name: names}


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
    head = checkpoint.tables if config.exact else _resting_head(checkpoint, meta, host_embeddings)
    shapes, others = _shapes(checkpoint, meta, device, config, head)
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
        always_stream=config.always_stream,
        kv_bits=8 if config.kv_bits == 8 else 16,
        halves_kv=config.kv_bits == "auto" and cache == "ours" and not config.exact and not shapes[0].has_experts,
        cache=cache,
        converted_ff=parts.feed_forward,
        converted_bytes=parts.embeddings + parts.rest,
        host_embeddings=host_embeddings,
        stored_share=_stored_share(checkpoint, parts, dtype) if hardware.shares_host_memory else 0.0,
        translated=emulates_halves(device, dtype),
        pass_tokens=pass_tokens(config.exact, config.draft_tokens, config.refresh),
        verifies=config.exact,
        weight_norms=config.selection in WEIGHT_NORMS,
        # Where no context can be kept every prompt is read from its start.
        continued=config.keep_prompts and can_cache(checkpoint.config),
        # A forward that asks which experts it needs cannot be captured.
        graphs=GRAPH_COSTS if hardware.captures and config.cuda_graphs and not shapes[0].has_experts else None,
    )
    assumed = f"no {hardware.name} device is here, {format_bytes(overhead_bytes)} are assumed for its runtime"
    model_spec = ModelSpec(checkpoint, hardware, dtype, shapes, others, request, assumed if absent else None)
    if config.exact:
        model_spec.check_exact(checkpoint.precision, request.kv_bits)
    _check_passes(model_spec, config)
    _check_experts(model_spec, config)
    return model_spec


def by_residents_alone(checkpoint: Checkpoint, options: dict[str, Any]) -> dict[str, Any]:
    """`options`, fields of `LoadConfig`, and what they lack for answers in which nothing left out has a part: of
    mixtures of experts, missing ones are not read."""
    routed = examine_checkpoint(checkpoint, LoadConfig(**options)).shape.has_experts
    return options | {"missing_experts": "route"} if routed else options


def _check_experts(model_spec: ModelSpec, config: LoadConfig) -> None:
    """UsageError for what does not go together with a mixture of experts, and for its options where there is none."""
    if not model_spec.shape.has_experts:
        if config.missing_experts != "fetch":
            raise UsageError(
                f"missing_experts={config.missing_experts!r} is for mixtures of experts, and "
                f"{model_spec.checkpoint.config.model_type} is none: leave it out"
            )
        return
    if config.offload == "ram":
        raise UsageError(
            "offload='ram' does not hold experts yet: take offload='disk', which reads each when it is needed"
        )
    if config.selection in WEIGHT_NORMS:
        raise UsageError(f"selection={config.selection!r} is by norms of neurons, and experts are none: take 'topk'")


def _stored_share(checkpoint: Checkpoint, parts: PartSizes, dtype: torch.dtype) -> float:
    """Of a layer in a slot, the stored bytes that it is made of; 0 where it is used as it is stored."""
    in_place = dtype == checkpoint.dtype and not parts.translated_share
    return 0.0 if in_place else (parts.translated_share or 1) * checkpoint.dtype.itemsize / dtype.itemsize


def check_no_passes(refresh: int) -> None:
    """UsageError for passes between two tokens where missing experts are read: there is nothing to correct."""
    if refresh:
        raise UsageError(
            f"refresh={refresh} corrects what residents alone have computed, and with missing_experts='fetch' every "
            "token is the full model's own: leave it out, or load with missing_experts='route'"
        )


def _check_passes(model_spec: ModelSpec, config: LoadConfig) -> None:
    """UsageError where the passes between two tokens cannot take the drafted ones back."""
    if model_spec.shape.has_experts and not config.exact and config.missing_experts == "fetch":
        check_no_passes(model_spec.request.pass_tokens)
    if model_spec.request.pass_tokens and model_spec.request.cache != "ours":
        reason = why_not_back(model_spec.checkpoint.config)
        raise UsageError(f"refresh={model_spec.request.pass_tokens} takes tokens back: {reason}")
    most = MAX_DRAFT_TOKENS + 1
    if model_spec.request.pass_tokens > most and any(layer.window is not None for layer in model_spec.shape.layers):
        raise UsageError(
            f"refresh={model_spec.request.pass_tokens}: of layers with a window at most {most} tokens can be taken back"
        )


def _resting_head(checkpoint: Checkpoint, meta: StockModel, host_embeddings: bool) -> Format:
    """What the head rests in among matrices of fewer bits. It stays as it is stored where that is no floats, where the
    stock forward needs floats, and where the embeddings, to which it is tied, would need the device's memory, too."""
    head, embedding = meta.get_output_embeddings(), meta.get_input_embeddings()
    if head is None or not checkpoint.tables.is_plain or reads_head_itself(type(meta)):
        return checkpoint.tables
    return RESTING_HEAD if host_embeddings or head.weight is not embedding.weight else checkpoint.tables


def small_beside(precision: Format, checkpoint: Checkpoint) -> Format | None:
    """What small matrices of a layer rest in among those of `precision`; None: in that, too. They are never made of
    what is stored in fewer bits."""
    stored = checkpoint.small or checkpoint.precision.outside()
    fits = precision.bits < SMALL_MATRICES.bits and (stored.is_plain or stored is SMALL_MATRICES)
    return SMALL_MATRICES if fits else None


def _shapes(
    checkpoint: Checkpoint, meta: StockModel, device: torch.device, config: LoadConfig, head: Format
) -> tuple[tuple[ModelSizes, ...], tuple[ModelSizes, ...]]:
    """The model, which is on the meta device, in the precisions it may have on the device, and in those that it could
    have; the head is in `head` where the others are in fewer bits."""
    stored = checkpoint.precision
    if config.exact and stored.holds:
        raise UsageError(
            f"exact mode drafts in the stored precision, and {checkpoint.directory} holds {stored}: give an int4 or "
            "int8 copy, or the original"
        )
    asked_of = ("auto", stored.name, stored.option, *([TIERS] if _gives_tiers(stored) else []))
    if not stored.is_plain and config.quantize not in asked_of:
        raise UsageError(
            f"the checkpoint was converted to {stored}, --quantize {config.quantize} needs the original: leave it out"
        )
    if config.exact and config.quantize not in ("auto", stored.name):
        raise UsageError(
            f"exact mode keeps the stored precision, --quantize {config.quantize} another one: leave it out, or "
            "convert the checkpoint first"
        )
    states = states_of(meta)
    allowed: list[ModelSizes] = []
    others: list[ModelSizes] = []
    for name, levels in _precisions(stored, config):
        wanted = stored.name if config.exact else config.quantize
        # A stored format may rest in another one, which has its own name.
        fits = wanted in ("auto", name) or (wanted == stored.name != TIERS != name and not stored.is_plain)
        precision = levels[0]
        try:
            for format in levels:
                format.check_device(device.type)
            # In exact mode another precision is one of a converted copy.
            full = precision if config.exact else stored
            own_head = head if levels[-1].bits < head.bits else checkpoint.tables
            beside = small_beside(precision, checkpoint)
            shape = model_shape(meta, precision, full, checkpoint.tables, states, levels, own_head, beside)
        except UnsupportedModel:
            if name in (config.quantize, stored.name) or not (stored.is_plain or name == TIERS):
                raise
            continue
        (allowed if fits else others).append(shape)
    if config.prefer == "speed":
        fewest = max((i for i, shape in enumerate(allowed) if len(shape.levels) == 1), default=0)
        if not fewest:
            raise UsageError(
                f"--prefer speed has nothing to choose: {checkpoint.directory} gives {allowed[0].precision_name} alone"
            )
        return tuple(allowed[fewest:]), (*allowed[:fewest], *others)
    return tuple(allowed), tuple(others)


def _precisions(stored: Format, config: LoadConfig) -> Iterator[tuple[str, tuple[Format, ...]]]:
    """Names, and formats of neurons, of all that residents of a `stored` checkpoint may be planned in, best first."""
    # A density is of one format, and exact mode drafts in what is stored. Without kernels of ours a prompt would wait
    # minutes for its neurons to be rounded.
    quickly = bool(stored.holds) or compiled()
    unasked = config.density == "auto" and not config.exact and quickly
    tiers = config.quantize == TIERS or (unasked and _gives_tiers(stored))
    for format in every() if stored.is_plain else (stored.rests_as(),):
        if not format.by_name_only or format.name == config.quantize or not stored.is_plain:
            yield format.name, (format,)
        if format is INT8 and tiers:
            yield TIERS, (INT8, INT4)
    if tiers:
        yield TIERS, _tiers()


def _gives_tiers(stored: Format) -> bool:
    """Whether neurons of all tiers can be made of what is `stored`."""
    return stored.is_plain or (stored.gives_chosen and stored.bits >= _tiers()[0].bits)


def _tiers() -> tuple[Format, ...]:
    """From the most bits to the fewest."""
    return tuple(format for format in every() if format.is_tier)


def _cache_kind(config: PretrainedConfig, bits: AskedKVBits) -> CacheKind:
    if can_cache(config):
        return "ours"
    if bits == 8:
        kinds = lasting_kinds(config) or state_kinds(config)
        raise UsageError(
            f"kv_bits={bits} needs layers of {config.model_type} that keep keys and values, some are {kinds}"
        )
    return "dynamic"


def plan_for(model_spec: ModelSpec) -> Plan:
    """The plan; DoesNotFit when there is none."""
    return make_plan(model_spec.shapes, model_spec.request, model_spec.others)


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
        "precision": plan.precision,
        "dtype": str(model_spec.dtype).removeprefix("torch."),
        "density": [kept / layer.neurons for kept, layer in zip(plan.kept, shape.layers, strict=True)],
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
