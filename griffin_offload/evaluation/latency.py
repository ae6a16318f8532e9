"""Latency of generation: prompts and answers of fixed lengths (paper, table 3)."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from griffin_offload.engine.model import GriffinModel
from griffin_offload.evaluation.speed import run_fixed, warm_up
from griffin_offload.method.variants import Variant


@dataclass(frozen=True)
class Timing:
    """One variant at one size; seconds are medians, with the smallest and largest total beside."""

    selection: str
    density: float
    precision: str
    prompt_tokens: int
    generate_tokens: int
    repeats: int
    prefill_s: float
    decode_s: float
    total_s: float
    least_s: float
    most_s: float
    tokens_per_s: float
    """Of the tokens behind the first, while decoding."""
    streamed_bytes: int
    """Weights that were fetched for the prompt."""
    resident_bytes: int
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def time_generation(
    model: GriffinModel,
    prompt: Tensor,
    generate_tokens: int,
    variant: Variant,
    repeats: int,
    done: Callable[[], None] = lambda: None,
) -> Timing:
    """Generate exactly so many tokens behind `prompt` [P], greedily, `repeats` times after a warm-up."""
    warm_up(model, prompt, generate_tokens)
    reports = []
    for _ in range(repeats):
        reports.append(run_fixed(model, prompt, generate_tokens))
        done()
    totals = [report.prefill_s + report.decode_s for report in reports]
    decode_s = statistics.median(report.decode_s for report in reports)
    return Timing(
        selection=variant.selection,
        density=variant.density,
        precision=model.plan.precision,
        prompt_tokens=prompt.numel(),
        generate_tokens=generate_tokens,
        repeats=repeats,
        prefill_s=statistics.median(report.prefill_s for report in reports),
        decode_s=decode_s,
        total_s=statistics.median(totals),
        least_s=min(totals),
        most_s=max(totals),
        tokens_per_s=(generate_tokens - 1) / decode_s,
        streamed_bytes=reports[-1].prefill_streamed_bytes,
        resident_bytes=model.resident_bytes,
        peak_bytes=max(report.peak_device_bytes for report in reports),
    )


def full_total_s(timings: Sequence[Timing], like: Timing) -> float | None:
    """Seconds of the full model at the size of `like`, if it was measured."""
    size = (like.prompt_tokens, like.generate_tokens)
    same = [t.total_s for t in timings if t.density == 1 and (t.prompt_tokens, t.generate_tokens) == size]
    return same[0] if same else None
