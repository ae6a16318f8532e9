"""What stays on the device: compact FFs, allocated once, and copies of everything that is not an FF."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from griffin_offload.pricing import Plan
from griffin_offload.runtime.embedding import HostEmbedding
from griffin_offload.runtime.prospect import Prospect, evicts
from griffin_offload.weights.feedforward import FeedForward
from griffin_offload.weights.pages import FilePages

_COPY_THREADS = 4


def compact_parameters(block: FeedForward, kept: int, prospect: Prospect) -> list[nn.Parameter]:
    return [
        nn.Parameter(torch.empty(shape, dtype=prospect.dtype, device=prospect.device), requires_grad=False)
        for shape in block.compact_shapes(kept)
    ]


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


def resident_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers; an embedding that stays on the host is none of them."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
