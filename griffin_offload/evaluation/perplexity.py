"""Perplexity of generation: what pruning by the prompt costs on the text that follows it (paper, figure 5)."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from griffin_offload.engine.layer_pass import Progress
from griffin_offload.engine.model import GriffinModel
from griffin_offload.evaluation.samples import Sample
from griffin_offload.evaluation.scoring import Scores
from griffin_offload.evaluation.simulation import Simulated, simulate
from griffin_offload.method.variants import Variant


@dataclass(frozen=True)
class Row:
    """One variant on all windows of one size; field names are those of `eval ppl --json`."""

    selection: str
    density: float
    prompt_tokens: int
    generate_tokens: int
    windows: int
    ppl_full: float
    ppl: float
    kl: float
    """KL(full || variant), nats per token."""
    top1: float
    """Share of tokens at which both have the same first choice."""
    activation_kept: float

    @property
    def increase(self) -> float:
        """Of the perplexity, over the full model's."""
        return self.ppl / self.ppl_full - 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    model: GriffinModel,
    windows: Sequence[Tensor],
    prompt_tokens: int,
    variants: Sequence[Variant],
    progress: Progress | None = None,
) -> list[Row]:
    """A row per variant; `windows` are ids [P + G] of one size. `progress` is called with (layers done, in all)."""
    samples = [Sample.generation(ids[:prompt_tokens], ids[prompt_tokens:]) for ids in windows]
    simulated = simulate(model, samples, variants, progress=progress)
    return rows_of(simulated, variants, prompt_tokens)


def rows_of(
    simulated: Sequence[Simulated], variants: Sequence[Variant], prompt_tokens: int, tokens: int | None = None
) -> list[Row]:
    """A row per variant, of the first `tokens` scored tokens of every sample; None: of all."""
    full = [sample.full.first(tokens) if tokens else sample.full for sample in simulated]
    columns = zip(*(sample.variants for sample in simulated), strict=True)
    rows = []
    for variant, column in zip(variants, columns, strict=True):
        scores = [score.first(tokens) for score in column] if tokens else column
        rows.append(
            Row(
                selection=variant.selection,
                density=variant.density,
                prompt_tokens=prompt_tokens,
                generate_tokens=full[0].log_probs.numel(),
                windows=len(full),
                ppl_full=_perplexity(full),
                ppl=_perplexity(scores),
                kl=_mean([float(score.kl.mean()) for score in scores]),
                top1=_mean([float(score.agrees.float().mean()) for score in scores]),
                activation_kept=_mean([score.activation_kept for score in scores]),
            )
        )
    return rows


def _perplexity(scores: Sequence[Scores]) -> float:
    return math.exp(-_mean([float(score.log_probs.double().mean()) for score in scores]))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# Perplexity against the lengths of prompt and generation (paper, figure 5).


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
