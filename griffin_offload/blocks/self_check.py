"""The check at load: do the layout's names mean what the table says? compact(x) must equal masked(x)."""

import torch
from torch import Tensor

from griffin_offload.blocks.base import Activations, Block
from griffin_offload.blocks.layouts import REGISTER_HINT
from griffin_offload.errors import UnsupportedModel
from griffin_offload.formats.base import is_plain
from griffin_offload.formats.translated import in_memory

# Differences are summation order alone; a wrong neuron shows as an error of order one.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Of formats whose neurons rest in another one: they are rounded once more.
_TOLERANCE_ROUNDED = 0.3


@torch.no_grad()
def self_check(block: Block) -> None:
    """Run the block on two random tokens, once with half its neurons masked and once gathered.

    The block is left as it was. Raises UnsupportedModel when the results differ or when the input of the down
    projection is never seen. A block that is written inline in its layer (OPT) is checked by its projections.
    """
    stored = block.full()
    full = [in_memory(tensor) for tensor in stored]
    generator = torch.Generator().manual_seed(0)
    chosen = (
        torch.randperm(block.neurons, generator=generator, dtype=torch.long, device="cpu")[: block.neurons // 2]
        .sort()
        .values
    )
    dtype = next(tensor.dtype for tensor in full if is_plain(tensor))
    # Unit rows, scaled so that activations neither vanish nor saturate.
    x = torch.randn(1, 2, block.hidden, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    try:
        block.install_full(full)
        masked = _masked(block, chosen, x)
        compact = block.allocate((chosen.numel(),), dtype, full[0].device)
        block.gather(full, [chosen], compact)
        block.install_compact(compact)
        gathered = block.run(x)
    finally:
        block.install_full(stored)
    scale = masked.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = ((gathered - masked).abs().max() / scale).item()
    if not error <= max(_TOLERANCE[dtype], _TOLERANCE_ROUNDED * block.rounds_again):
        raise UnsupportedModel(
            f"self-check failed: the gathered FF of {type(block.module).__name__} differs from the masked one by "
            f"{error:.1e} of its output, so its neurons are not laid out as assumed; {REGISTER_HINT}"
        )


def _masked(block: Block, chosen: Tensor, x: Tensor) -> Tensor:
    seen = []
    kept = torch.zeros(block.neurons, dtype=torch.bool, device=chosen.device).index_fill_(0, chosen, True)

    def mask(found: Activations) -> None:
        seen.append(found.z.shape[-1])
        if seen == [block.width]:
            found.by_sample(x.shape[0]).leave_out(kept)

    block.observe(mask)
    try:
        output = block.run(x)
    finally:
        block.unhook()
    if seen != [block.width]:
        raise UnsupportedModel(
            f"self-check failed: the down projection of {type(block.module).__name__} is not called once with all "
            f"{block.width} activations (seen: {seen})"
        )
    return output
