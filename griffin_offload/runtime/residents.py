"""What stays on the device: compact FFs, allocated once, and copies of everything that is not an FF."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from griffin_offload.pricing import Plan
from griffin_offload.runtime.embedding import HostEmbedding
from griffin_offload.runtime.prefill import StreamedLayers
from griffin_offload.runtime.prospect import Prospect, evicts
from griffin_offload.weights.direct import touch, untouched_zeros
from griffin_offload.weights.feedforward import FeedForward
from griffin_offload.weights.gather import gather_outputs
from griffin_offload.weights.pages import FilePages
from griffin_offload.weights.quantized_linear import QuantizedLinear, specs
from griffin_offload.weights.source import stream_dtype

_COPY_THREADS = 4


def compact_blocks(
    blocks: list[FeedForward], full: dict[int, list[Tensor]], prospect: Prospect, plan: Plan
) -> dict[int, list[nn.Parameter]]:
    """Compact tensors of every layer that has them, installed: streamed layers', to be filled by each prompt, and
    those of quantised layers that stay whole, filled here. `full` are the streamed layers' full tensors."""
    compact = {}
    with contextlib.closing(FilePages([t for block in blocks for t in block.full()], evict=evicts(prospect))) as pages:
        for index, block in enumerate(blocks):
            if index not in full and block.precision == "none":
                continue
            compact[index] = block.allocate(plan.kept[index], prospect.dtype, prospect.device)
            if index not in full:
                _fill_whole(block, compact[index], prospect, pages)
            block.install_compact(compact[index])
    return compact


@torch.no_grad()
def materialise(layers: StreamedLayers, selected: dict[int, Tensor], prospect: Prospect) -> None:
    """Gather `selected` from where the full weights rest: a layer at a time, of which only their rows are read, and
    matrices that hold neurons as columns."""
    layers.selected = {}
    if layers.source is not None:
        layers.source.check_files()
    for index, chosen in selected.items():
        block, compact, chosen_here = layers.blocks[index], layers.compact[index], chosen.cpu()
        assert layers.source is not None, "streamed layers have a source"
        full = layers.source.fetch_rows(index, block.rows_needed(chosen_here))
        full = [tensor.to(stream_dtype(tensor, prospect.dtype)) for tensor in full]
        if prospect.device.type == "cpu":
            block.gather(full, chosen_here, compact)
        else:
            _gather_through_host(block, full, chosen_here, compact)
        layers.source.check(index)
        layers.source.drop(index)
    layers.selected = selected


def _gather_through_host(block: FeedForward, full: list[Tensor], chosen: Tensor, compact: list[nn.Parameter]) -> None:
    # Quantising (and CUDA's int4 tiles) wants the device; plain neurons are gathered where they rest.
    if block.precision == "none":
        host = [torch.empty(p.shape, dtype=p.dtype) for p in compact]
        block.gather(full, chosen, host)
        for parameter, gathered in zip(compact, host, strict=True):
            parameter.copy_(gathered)
    else:
        device = compact[0].device
        block.gather([tensor.to(device) for tensor in full], chosen.to(device), compact)


def _fill_whole(block: FeedForward, target: list[nn.Parameter], prospect: Prospect, pages: FilePages) -> None:
    source = block.full()
    spans = pages.spans(source)
    pages.read(spans)
    everything = torch.arange(block.neurons, device=prospect.device)
    block.gather([tensor.to(prospect.device) for tensor in source], everything, target)
    pages.drop(spans)


def place_residents(
    model: Any, prospect: Prospect, plan: Plan, compact: dict[int, list[nn.Parameter]]
) -> HostEmbedding | None:
    """Copy every parameter that still lies in a file into the device's memory; embeddings may stay behind.

    Copies, on the CPU as well: mapped pages can be evicted, and decoding would read them again.
    """
    embedding = model.get_input_embeddings()
    stay = {id(embedding)} if plan.embeddings == "host" else set()
    copies = {id(parameter): parameter for parameters in compact.values() for parameter in parameters}
    with contextlib.closing(FilePages(list(model.parameters()), evict=evicts(prospect))) as pages:
        for module in model.modules():
            if isinstance(module, QuantizedLinear) and module.form != module.resident_form:
                _quantize_resident(module, prospect, pages)
                copies |= {
                    id(parameter): parameter for parameter in module.parameters() if parameter is not module.bias
                }
        _copy_residents(model, prospect, stay, copies, pages)
    return HostEmbedding(embedding, prospect.device, prospect.dtype) if stay else None


def _copy_residents(
    model: Any, prospect: Prospect, stay: set[int], copies: dict[int, nn.Parameter], pages: FilePages
) -> None:
    """Copy by several threads: most of the time goes into page faults, which the kernel takes in parallel. `copies` are
    on the device already, and touched here, so that no prompt has to wait for their pages."""
    modules = [module for module in model.modules() if id(module) not in stay]
    parameters = {id(p): p for m in modules for p in m._parameters.values() if p is not None and id(p) not in copies}
    with ThreadPoolExecutor(_COPY_THREADS) as pool:
        touched = pool.map(touch, copies.values())
        done = pool.map(lambda parameter: _resident(parameter, prospect, pages), parameters.values())
        # By identity, so that tied weights stay tied.
        copies.update(zip(parameters, done, strict=True))
        list(touched)
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = copies[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(prospect.device)


def _resident(parameter: nn.Parameter, prospect: Prospect, pages: FilePages) -> nn.Parameter:
    # Only the stored precision is translated: what transformers keeps in float32 stays so.
    changed = parameter.dtype == prospect.checkpoint.dtype and parameter.is_floating_point()
    dtype = prospect.dtype if changed else parameter.dtype
    target = untouched_zeros(parameter.shape, dtype, prospect.device)
    pages.copy(parameter.detach(), target)
    return nn.Parameter(target, requires_grad=False)


def _quantize_resident(module: QuantizedLinear, prospect: Prospect, pages: FilePages) -> None:
    """Give a matrix outside the FF (attention) its resident form."""
    full = {name: p.detach() for name, p in module.named_parameters() if name != "bias"}
    spans = pages.spans(list(full.values()))
    pages.read(spans)
    outputs, inputs = module.out_features, module.in_features
    resident = {
        name: untouched_zeros(shape, own or prospect.dtype, prospect.device)
        for name, (shape, own) in specs(module.resident_form, outputs, inputs, is_down=False).items()
    }
    everything = torch.arange(outputs, device=prospect.device)
    gather_outputs({name: tensor.to(prospect.device) for name, tensor in full.items()}, everything, 1, resident)
    pages.drop(spans)
    for name, tensor in resident.items():
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    module.form = module.resident_form


def resident_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers; an embedding that stays on the host is none of them."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
