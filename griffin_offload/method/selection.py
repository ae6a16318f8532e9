"""The GRIFFIN statistic (arXiv 2404.01365, section 4.2), additive over tokens, and which neurons are kept by it.

For a layer with FF activations Z, the input of the down projection: s_j^2 = sum_t z_tj^2 / ||z_t||^2. Tokens
only ever add to it, so chunks, turns and verified tokens are summed, in float32. A token whose row is all zero
(ReLU) has no direction and contributes nothing. The paper's selection methods are seeded, and give sorted indices.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from griffin_offload.config import WEIGHT_NORMS, BatchStatistic, Density, SelectionMethod
from griffin_offload.errors import UsageError
from griffin_offload.method.allocation import Counts

# Tokens squared at a time: the float32 copy of Z stays small whatever the prompt's length.
ROWS_AT_ONCE = 128
_FLOAT_BYTES = 4
# The set chosen from the first three quarters of a prompt is measured on the last quarter.
_HELD_OUT_SHARE = 0.25


def split_tokens(mask: Tensor) -> Tensor:
    """Which tokens choose and which are held out, as float32 [B, 2, T]; padding (mask 0) is in neither.

    `mask` is [B, T]. Row 0 marks the first three quarters of each sample's own tokens, row 1 the rest. A
    sample of one token chooses with it and holds nothing out.
    """
    valid = mask.bool()
    rank = valid.cumsum(1)  # 1-based position among the sample's own tokens
    held_out = (valid.sum(1, keepdim=True).float() * _HELD_OUT_SHARE).floor()  # not in torch's default type
    chooses = valid & (rank <= valid.sum(1, keepdim=True) - held_out)
    return torch.stack([chooses, valid & ~chooses], dim=1).float()


def split_at(groups: Tensor, ends: Sequence[int]) -> Tensor:
    """Groups of consecutive tokens [1, G, T], divided further in front of the tokens `ends` (rising), float32
    [1, G', T]: sums of the first of them are then those of so many first tokens."""
    position = torch.arange(groups.shape[2], dtype=torch.int64, device=groups.device)
    bounds = list(pairwise([0, *ends, groups.shape[2]]))
    parts = [group * ((position >= start) & (position < end)) for group in groups[0] for start, end in bounds]
    return torch.stack([part for part in parts if part.any()])[None]


def squared_statistic(z: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens of weights * z^2 / ||z||^2: float32 [B, G, F] for z [B, T, F] and weights [B, G, T].

    G groups of tokens are summed apart; with 0/1 weights, and G = 1, this is the paper's s^2 per sample.
    """
    total = torch.zeros(z.shape[0], weights.shape[1], z.shape[2], dtype=torch.float32, device=z.device)
    for start in range(0, z.shape[1], ROWS_AT_ONCE):
        squares = z[:, start : start + ROWS_AT_ONCE].to(torch.float32, copy=True).square_()
        norms = squares.sum(-1)  # [B, T]
        scale = torch.where(norms > 0, norms, 1).reciprocal()
        total.baddbmm_(weights[:, :, start : start + ROWS_AT_ONCE] * scale[:, None, :], squares)
    return total


def summing_bytes(samples: int, neurons: int, tokens: int, prompts: int = 1) -> int:
    """What `squared_statistic` of so many tokens per sample takes: squares of as many as are squared at once, and the
    sums, old and new, of the parts of every prompt."""
    return samples * neurons * _FLOAT_BYTES * (min(tokens, ROWS_AT_ONCE) + 8 * prompts)


def shared_score(squared: Tensor, batch_statistic: BatchStatistic) -> Tensor:
    """One s^2 per neuron [F] for a batch that shares its experts, from s^2 per sample [B, F].

    "sum" adds them, so long prompts weigh more; "mean" averages s_i^2 / S_i, S_i = sum_j s_ij^2 being the
    number of tokens that contributed, so every sample weighs the same.
    """
    if batch_statistic == "sum":
        return squared.sum(0)
    tokens = squared.sum(-1, keepdim=True)
    return (squared / torch.where(tokens > 0, tokens, 1)).mean(0)


def share_kept(squared: Tensor, chosen: Tensor) -> Tensor:
    """Fraction of the distribution s^2 / S that the chosen neurons hold: a scalar tensor, 1 when s is zero."""
    total = squared.sum()
    return torch.where(total > 0, squared.index_select(0, chosen).sum() / total, torch.ones_like(total))


def sharing_bytes(sequences: int, neurons: int) -> int:
    """What `shared_score` of several sequences makes: their tables side by side, and each over its sum."""
    return 2 * sequences * neurons * _FLOAT_BYTES if sequences > 1 else 0


def weighted_sum(z: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens of weights * z: float32 [B, G, F] for z [B, T, F] and weights [B, G, T]."""
    total = torch.zeros(z.shape[0], weights.shape[1], z.shape[2], dtype=torch.float32, device=z.device)
    for start in range(0, z.shape[1], ROWS_AT_ONCE):
        total.baddbmm_(weights[:, :, start : start + ROWS_AT_ONCE], z[:, start : start + ROWS_AT_ONCE].float())
    return total


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


def split_levels(score: Tensor, chosen: Tensor, counts: Counts) -> Tensor:
    """`chosen` [K], of which those of the largest `score` [F] come first, as many as the first of `counts` says, and so
    on; the indices of each level rise."""
    if len(counts) == 1:
        return chosen
    ranked = chosen[score[chosen].argsort(descending=True, stable=True)]
    return torch.cat([level.sort().values for level in ranked.split(counts)])


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
