"""Perplexity against the lengths of prompt and generation (paper, figure 5)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from griffin_offload.evaluation.perplexity import Row, rows_of
from griffin_offload.evaluation.samples import Sample
from griffin_offload.evaluation.simulation import simulate
from griffin_offload.method.variant import Variant
from griffin_offload.runtime.model import GriffinModel
from griffin_offload.runtime.prefill import Progress


def measure_lengths(
    model: GriffinModel,
    windows: Sequence[Tensor],
    prompts: Sequence[int],
    generates: Sequence[int],
    variants: Sequence[Variant],
    *,
    first: Sequence[int] = (),
    progress: Progress | None = None,
) -> list[Row]:
    """A row per prompt length, generation length and variant, in this order.

    `windows` are ids of max(prompts) + max(generates) tokens, `first` what every prompt begins with, counted in it.
    The prompt is what stands right before the generated part, so the same tokens are scored behind prompts of every
    length: what differs between rows is the length alone. Shorter generations are the beginnings of the longest, which
    tokens behind them do not change.
    """
    split, longest = max(prompts), max(generates)
    begin = torch.tensor(list(first), dtype=torch.long, device="cpu")
    samples = [
        Sample.generation(torch.cat([begin, ids[split - prompt + len(first) : split]]), ids[split : split + longest])
        for prompt in prompts
        for ids in windows
    ]
    simulated = simulate(model, samples, variants, progress=progress)
    rows = []
    for place, prompt in enumerate(prompts):
        own = simulated[place * len(windows) : (place + 1) * len(windows)]
        for tokens in generates:
            rows += rows_of(own, variants, prompt, tokens)
    return rows
