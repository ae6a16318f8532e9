"""Which neurons are kept: the paper's selection methods, seeded, as sorted indices."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from griffin_offload.config import WEIGHT_NORMS, Density, SelectionMethod
from griffin_offload.errors import UsageError


def neurons_kept(neurons: int, density: float) -> int:
    """K = int(F * density). The added 1e-9 keeps k / F * F at k where floats would land just below it."""
    return min(neurons, math.floor(neurons * density + 1e-9))


def densities_per_layer(density: Density, layers: int) -> tuple[float, ...]:
    """One density per layer from a number or a list; UsageError when the list has another length."""
    if not isinstance(density, Sequence):
        return (float(density),) * layers
    if len(density) != layers:
        raise UsageError(f"{len(density)} densities for {layers} layers: give one number, or one per layer")
    return tuple(float(value) for value in density)


def layer_generator(seed: int, layer: int) -> torch.Generator:
    """One generator a layer: what a layer draws does not depend on which others are streamed."""
    return torch.Generator().manual_seed((seed * 100_003 + layer) % 2**63)


def score_of(squared: Tensor, method: SelectionMethod, norms: Tensor | None = None) -> Tensor:
    """What neurons [F] are ranked by: s^2 where a method has no other score. Arguments as of `select_neurons`."""
    if method not in WEIGHT_NORMS:
        return squared
    if norms is None:
        raise ValueError(f"{method} selection needs the weights' norms")
    return norms if method == "magnitude" else squared.sqrt() * norms


def select_neurons(
    squared: Tensor,
    kept: int,
    method: SelectionMethod,
    generator: torch.Generator,
    norms: Tensor | None = None,
) -> Tensor:
    """Sorted indices [K] of the neurons to keep, on the device of `squared`.

    `squared` is s^2 [F]; `norms` [F] are the static scores of "magnitude", or of "output_aware" the norms by which s is
    multiplied. "sample" draws K without replacement in
    proportion to s, "topk_sample" keeps the K // 2 largest and draws the rest. `generator` lives on the CPU, so
    that a seed chooses the same neurons on every device.
    """
    if method == "random":
        chosen = torch.randperm(squared.numel(), generator=generator, dtype=torch.long, device="cpu")[:kept]
    elif method == "sample":
        chosen = _draw(squared.sqrt().cpu(), kept, generator)
    elif method == "topk_sample":
        top = squared.topk(kept // 2).indices.cpu()
        rest = squared.sqrt().cpu().index_fill(0, top, 0.0)
        chosen = torch.cat([top, _draw(rest, kept - kept // 2, generator, excluded=top)])
    else:
        chosen = score_of(squared, method, norms).topk(kept).indices
    return chosen.sort().values.to(squared.device)


def _draw(s: Tensor, count: int, generator: torch.Generator, excluded: Tensor | None = None) -> Tensor:
    """`count` indices without replacement in proportion to `s`; neurons that never fired fill up, if they must."""
    fired = int((s > 0).sum())
    if count == 0:
        return torch.empty(0, dtype=torch.long, device="cpu")
    drawn = torch.multinomial(s, min(count, fired), generator=generator) if fired else s.new_empty(0).long()
    if drawn.numel() == count:
        return drawn
    taken = drawn if excluded is None else torch.cat([drawn, excluded])
    free = torch.ones_like(s, dtype=torch.bool).index_fill(0, taken, False).nonzero().squeeze(1)
    return torch.cat([drawn, free[: count - drawn.numel()]])
