"""What stays on the device: compact FFs, allocated once, and copies of everything that is not an FF; and all that a
loaded model is made of.

Tensors of the embedding, the layers and the head are allocated and installed at once, and filled by jobs, in the order
of their use (`Arrival`). The others are there when `place_residents` returns.
"""

import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from griffin_offload.blocks.base import Block
from griffin_offload.blocks.expert_products import HostExperts
from griffin_offload.blocks.experts import Experts
from griffin_offload.blocks.routing import RestrictedForward, RouterGuess
from griffin_offload.checkpoint.mapped import FilePages
from griffin_offload.devices.memory import Ledger, touch, untouched_zeros
from griffin_offload.devices.threads import put
from griffin_offload.engine.layer_pass import DecoderLayers, LayerPass, RowFeed, Visitor
from griffin_offload.formats.linear import QuantizedLinear
from griffin_offload.formats.translated import row_parts
from griffin_offload.offload.expert_cache import ExpertCache
from griffin_offload.offload.layer_stream import Job
from griffin_offload.planner.plan import Plan
from griffin_offload.transformers_api import StockModel

# Embeddings that stay on the host: looked up there, only the rows of the tokens at hand are moved.


class HostEmbedding:
    """Hooks on the stock embedding module, for the life of the model; counts the bytes of the rows it reads.

    A lookup raises CheckpointChanged when the file that the rows rest in was written to or cut since."""

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self.pages = FilePages(list(module.parameters()), evict=False)
        self.row_bytes = 0
        # A plain tensor: transformers takes a model's device from its first parameter, and moves inputs there.
        for name, parameter in list(module._parameters.items()):  # a quantised one has scales, too
            if parameter is not None:
                del module._parameters[name]
                setattr(module, name, parameter.detach())
        module.register_forward_pre_hook(self._to_host)
        module.register_forward_hook(self.to_device)

    def _to_host(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].to("cpu"), *args[1:])

    def to_device(self, module: nn.Module, args: object, rows: Tensor) -> Tensor:
        self.pages.files.check_contents()
        self.row_bytes += rows.nbytes
        return rows.to(device=self._device, dtype=self._dtype)

    def close(self) -> None:
        """Close the file."""
        self.pages.close()


@dataclass
class Loaded:
    """A model that is ready for its first prompt; residents of the layers may still be on their way.

    `owned` is the stock model until somebody takes it over (`hand_over`); it is only referred to weakly from then on.
    """

    owned: StockModel
    layers: DecoderLayers
    ledger: Ledger
    host_embedding: HostEmbedding | None
    resident_bytes: int
    offload: str
    threads: int | None
    """Threads that compute; None where the device is not the CPU."""

    def __post_init__(self) -> None:
        self._model = weakref.ref(self.owned)

    @property
    def model(self) -> StockModel:
        """The stock model."""
        model = self._model()
        assert model is not None, "whoever asks keeps it alive"
        return model

    def hand_over(self) -> StockModel:
        """The stock model, which whoever calls keeps alive now."""
        model = self.owned
        del self.owned
        return model

    def close(self) -> None:
        """End what is on its way, give back files, pinned memory and weights that are not the stock model's."""
        for owner in (self.layers.arrival, self.layers.source, self.layers.expert_store, self.host_embedding):
            if owner is not None:
                owner.close()
        self.layers.give_back()


_COPY_THREADS = 4


class _Stored(Protocol):
    @property
    def dtype(self) -> torch.dtype: ...


class Placement(Protocol):
    """What is asked of a `ModelSpec` here: where residents go, in which precision, and in which they are stored."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def checkpoint(self) -> _Stored: ...


def compact_blocks(
    blocks: list[Block], full: dict[int, list[Tensor]], model_spec: Placement, plan: Plan, pages: FilePages
) -> tuple[dict[int, list[nn.Parameter]], list[list[Job]]]:
    """Compact tensors of every layer that has them, installed: streamed layers', to be filled by each prompt, and
    those of quantised layers that stay whole, filled by the jobs of their layer. `full` are the streamed layers' full
    tensors."""
    compact: dict[int, list[nn.Parameter]] = {}
    jobs: list[list[Job]] = [[] for _ in blocks]
    for index, block in enumerate(blocks):
        if index not in full and block.rests_as_stored:
            continue
        compact[index] = block.allocate(plan.counts_of(index), model_spec.dtype, model_spec.device)
        if index in full:
            # No prompt has to wait for their pages.
            jobs[index] += [partial(touch, parameter) for parameter in compact[index]]
        else:
            jobs[index].append(partial(_fill_whole, block, block.full(), compact[index], model_spec, pages))
        block.install_compact(compact[index])
    return compact, jobs


def cache_experts(layers: DecoderLayers, host: HostExperts | None) -> None:
    """Give every streamed layer of experts what keeps account of its places, and what keeps its router to them; and
    `host`, where the CPU computes what is missing."""
    for index, places in layers.compact.items():
        block = layers.blocks[index]
        if not isinstance(block, Experts):
            continue
        assert layers.expert_store is not None, "streamed experts rest somewhere"
        cache = ExpertCache(index, layers.expert_store, block.places(places), layers.expert_buffers, block.neurons)
        block.source = layers.experts[index] = cache
        if host is not None:
            block.take_host(host)
        layers.routers[index] = block.parent.forward = RestrictedForward(block.parent, cache.allowed)
    layers.restrict()
    guess_experts(layers)


def guess_experts(layers: DecoderLayers) -> None:
    """Have what goes into a layer say which experts to read ahead: its own, and those of the next such layer. Not where
    layers differ: what one has read would fit no place of another."""
    blocks = {index: block for index in layers.experts if isinstance(block := layers.blocks[index], Experts)}
    if len({tuple(shape for shape, _ in block.compact_specs((1,))) for block in blocks.values()}) != 1:
        return
    guesses = [(RouterGuess(layers.decoder[i], block.parent), layers.experts[i]) for i, block in blocks.items()]
    for place, index in enumerate(blocks):
        layers.decoder[index].register_forward_pre_hook(partial(_guess, guesses[place : place + 2]))


def _guess(guesses: Sequence[tuple[RouterGuess, ExpertCache]], _: nn.Module, args: tuple[Any, ...]) -> None:
    for router, cache in guesses:
        if cache.may_guess and args:
            cache.guess(router(args[0]))


class GatherSelected(Visitor):
    """Gathers neurons that were chosen before into the compact parameters."""

    def __init__(self, layers: DecoderLayers, selected: dict[int, Tensor]) -> None:
        self._layers, self._selected = layers, selected

    def end(self, index: int, block: Block, full: list[Tensor]) -> None:
        if index in self._layers.whole:
            return
        chosen, compact = self._selected[index].cpu().split(self._layers.counts[index]), self._layers.compact[index]
        if self._layers.stream.device.shares_host_memory:
            block.gather(full, chosen, compact)
        else:
            _gather_through_host(block, full, chosen, compact)


@torch.no_grad()
def materialise(layers: DecoderLayers, selected: dict[int, Tensor], dtype: torch.dtype) -> None:
    """Gather `selected` from where the full weights rest: a layer at a time, of which only their rows are read, and
    matrices that hold neurons as columns. `dtype` is the computation's."""
    layers.selected = {}
    dense = {index: chosen for index, chosen in selected.items() if index not in layers.experts}
    feed = RowFeed(layers, dense, dtype)
    LayerPass(layers.decoder, layers.blocks, feed, [GatherSelected(layers, dense)]).walk()
    for index, cache in layers.experts.items():
        if cache.keeps_choice:  # else any that are there will do
            cache.place(selected[index].tolist())
    layers.selected = selected


def _gather_through_host(
    block: Block, full: list[Tensor], chosen: Sequence[Tensor], compact: list[nn.Parameter]
) -> None:
    # Quantising wants the device; plain neurons are gathered where they rest.
    if block.is_plain:
        host = [torch.empty(p.shape, dtype=p.dtype, device="cpu") for p in compact]
        block.gather(full, chosen, host)
        for parameter, gathered in zip(compact, host, strict=True):
            parameter.copy_(gathered)
    else:
        device = compact[0].device
        block.gather([tensor.to(device) for tensor in full], [own.to(device) for own in chosen], compact)


@torch.no_grad()
def _fill_whole(
    block: Block, source: list[Tensor], target: list[nn.Parameter], model_spec: Placement, pages: FilePages
) -> None:
    if isinstance(block, Experts):
        for expert in range(block.neurons):
            with pages.reading([part for tensor in source for part in row_parts(tensor, expert)]):
                block.form.fill(source, expert, [tensor[expert] for tensor in block.places(target)])
        return
    everything = torch.arange(block.neurons, dtype=torch.long, device=model_spec.device)
    with pages.reading(source, translate=False) as found:
        block.gather([tensor.to(model_spec.device) for tensor in found], [everything], target)
    forget_codes(block)


def forget_codes(block: Block) -> None:
    """For what the file's pages are not there any more."""
    for linear in block.linears:
        if isinstance(linear, QuantizedLinear):
            linear.codes = None


def place_residents(
    model: StockModel,
    stages: list[nn.Module],
    model_spec: Placement,
    plan: Plan,
    compact: dict[int, list[nn.Parameter]],
    pages: FilePages,
    jobs: list[list[Job]],
) -> HostEmbedding | None:
    """Give every parameter that still lies in a file its place in the device's memory; embeddings may stay behind.
    Those of `stages`, modules in the order of their use, are filled by `jobs`, which are added to.

    Copies, on the CPU as well: mapped pages can be evicted, and decoding would read them again.
    """
    embedding = model.get_input_embeddings()
    stay = {id(embedding)} if plan.embeddings == "host" else set()
    placed = {id(parameter): parameter for parameters in compact.values() for parameter in parameters}
    for stage, of_stage in zip(stages, jobs, strict=True):
        for module in stage.modules():
            if isinstance(module, QuantizedLinear) and module.layout is not module.resident:
                of_stage.append(_quantize_resident(module, model_spec, pages))
                placed |= {id(p): p for p in module.parameters() if p is not module.bias}
    modules = [module for module in model.modules() if id(module) not in stay]
    stage_of = {id(module): index for index, stage in enumerate(stages) for module in stage.modules()}
    # By identity, so that tied weights stay tied; one that is used outside the stages, too, is there first.
    at_once: list[Job] = []
    for module in sorted(modules, key=lambda module: stage_of.get(id(module), -1)):
        own = jobs[stage_of[id(module)]] if id(module) in stage_of else at_once
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in placed:
                placed[id(parameter)] = target = _allocated(parameter, model_spec)
                own.append(partial(pages.copy, parameter.detach(), target.detach()))
            module._parameters[name] = placed[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(model_spec.device)
    with ThreadPoolExecutor(_COPY_THREADS) as pool:
        list(pool.map(lambda job: job(), at_once))
    return HostEmbedding(embedding, model_spec.device, model_spec.dtype) if stay else None


def _allocated(parameter: nn.Parameter, model_spec: Placement) -> nn.Parameter:
    # Only the stored precision is translated: what transformers keeps in float32 stays so.
    changed = parameter.dtype == model_spec.checkpoint.dtype
    dtype = model_spec.dtype if changed else parameter.dtype
    return nn.Parameter(untouched_zeros(parameter.shape, dtype, model_spec.device), requires_grad=False)


def _quantize_resident(module: QuantizedLinear, model_spec: Placement, pages: FilePages) -> Job:
    """Give a matrix outside the FF (attention, head) its resident form; the job fills it."""
    full = {name: p.detach() for name, p in module.named_parameters() if name != "bias"}
    outputs, inputs = module.out_features, module.in_features
    resident = {
        name: untouched_zeros(shape, own or model_spec.dtype, model_spec.device)
        for name, (shape, own) in module.resident.specs(outputs, inputs, is_down=False).items()
    }
    for name, tensor in resident.items():
        put(module, name, tensor)
    module.take_layout(module.resident)

    @torch.no_grad()
    def fill() -> None:
        everything = torch.arange(outputs, dtype=torch.long, device=model_spec.device)
        with pages.reading(list(full.values()), translate=False) as found:
            here = {name: tensor.to(model_spec.device) for name, tensor in zip(full, found, strict=True)}
            module.gather(module.resident, here, everything, resident)
        module.codes = None

    return fill


def resident_bytes(model: StockModel) -> int:
    """Bytes of all parameters and buffers; an embedding that stays on the host is none of them."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
