"""The check at load: do the layout's names mean what the table says? compact(x) must equal masked(x)."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from griffin_offload.blocks.feedforward import FeedForward
from griffin_offload.blocks.layouts import REGISTER_HINT
from griffin_offload.errors import UnsupportedModel
from griffin_offload.formats.translated import plain

# Differences are summation order alone; a wrong neuron shows as an error of order one.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@torch.no_grad()
def self_check(block: FeedForward) -> None:
    """Run the block on two random tokens, once with half its neurons masked and once gathered.

    The block is left as it was. Raises UnsupportedModel when the results differ or when the input of the down
    projection is never seen. A block that is written inline in its layer (OPT) is checked by its projections.
    """
    stored = block.full()
    full = [plain(tensor) for tensor in stored]
    generator = torch.Generator().manual_seed(0)
    chosen = (
        torch.randperm(block.neurons, generator=generator, dtype=torch.long, device="cpu")[: block.neurons // 2]
        .sort()
        .values
    )
    dtype = next(tensor.dtype for tensor in full if tensor.is_floating_point())
    # Unit rows, scaled so that activations neither vanish nor saturate.
    x = torch.randn(1, 2, block.projections[0].hidden, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    forward = _forward(block)
    try:
        block.install_full(full)
        masked = _masked(block, forward, chosen, x)
        compact = block.allocate(chosen.numel(), dtype, full[0].device)
        block.gather(full, chosen, compact)
        block.install_compact(compact)
        gathered = forward(x)
    finally:
        block.install_full(stored)
    scale = masked.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = ((gathered - masked).abs().max() / scale).item()
    if not error <= _TOLERANCE[dtype]:
        raise UnsupportedModel(
            f"self-check failed: the gathered FF of {type(block.module).__name__} differs from the masked one by "
            f"{error:.1e} of its output, so its neurons are not laid out as assumed; {REGISTER_HINT}"
        )


def _forward(block: FeedForward) -> Callable[[Tensor], Tensor]:
    """The block as a function of hidden states: its module's forward, or its projections where it is inline."""
    module = block.module
    if block.inline:
        first = block.projections[0].owner
        return lambda x: block.down(torch.relu(first(x)))
    parameters = inspect.signature(module.forward).parameters.values()
    needed = sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    # BLOOM's FF takes the residual, too, and adds it.
    return lambda x: module(*(x,) * needed)


def _masked(block: FeedForward, forward: Callable[[Tensor], Tensor], chosen: Tensor, x: Tensor) -> Tensor:
    seen = []

    def mask(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0].shape[-1])
        keep = torch.zeros_like(args[0]).index_fill(-1, chosen, 1)
        return (args[0] * keep, *args[1:])

    handle = block.down.register_forward_pre_hook(mask)
    try:
        output = forward(x)
    finally:
        handle.remove()
    if seen != [block.neurons]:
        raise UnsupportedModel(
            f"self-check failed: the down projection of {type(block.module).__name__} is not called once with all "
            f"{block.neurons} activations (seen: {seen})"
        )
    return output
