"""The GRIFFIN statistic (arXiv 2404.01365, section 4.2), additive over tokens.

For a layer with FF activations Z, the input of the down projection: s_j^2 = sum_t z_tj^2 / ||z_t||^2. Tokens
only ever add to it, so chunks, turns and verified tokens are summed, in float32. A token whose row is all zero
(ReLU) has no direction and contributes nothing.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from griffin_offload.config import BatchStatistic

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
