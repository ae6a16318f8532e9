"""Speed of prefill and decode against ceilings, where the rest of the time goes, and the latency of the paper's
table 3."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from griffin_offload.checkpoint.base import Checkpoint
from griffin_offload.engine.model import GriffinModel
from griffin_offload.engine.report import RunReport
from griffin_offload.evaluation.ceilings import Ceilings
from griffin_offload.method.variants import Variant

_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Spread:
    """Of the repeats, in seconds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Speed:
    """One prompt length and one answer length at one density. Parts are medians, in seconds."""

    density: float
    precision: str
    prompt_tokens: int
    generate_tokens: int
    repeats: int
    cache: str
    """Whether the files were dropped from the page cache before each prompt ("cold") or not ("warm")."""
    prefill: Spread
    decode: Spread
    """Of one token behind the first."""
    prefill_ceiling_s: float | None
    decode_ceiling_s: float | None
    prefill_parts: dict[str, float]
    """wait_for_bytes, statistic, select_and_gather, compute (what is left: GEMM, attention, Python)."""
    decode_parts: dict[str, float]
    """Of one token: forward, and outside of it (sampling, Python of generate)."""
    streamed_bytes: int
    resident_bytes: int
    peak_bytes: int
    budget_bytes: int
    """What `peak_bytes` may reach."""
    decode_streamed_bytes: int
    """Weights fetched while tokens were generated: 0, but for experts that tokens missed."""
    decode_host_bytes: int
    """Those of experts that the CPU computed for the device."""
    graphs: dict[str, Any] | None
    """CUDA graphs of the last run."""

    @property
    def prefill_share(self) -> float | None:
        """Of the ceiling: 1 is as fast as is possible."""
        return None if self.prefill_ceiling_s is None else self.prefill_ceiling_s / self.prefill.median

    @property
    def decode_share(self) -> float | None:
        return None if self.decode_ceiling_s is None else self.decode_ceiling_s / self.decode.median

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"prefill_share": self.prefill_share, "decode_share": self.decode_share}


def run_fixed(model: GriffinModel, prompt: Tensor, generate_tokens: int) -> RunReport:
    """Generate exactly so many tokens behind `prompt` [P], greedily."""
    model.generate(
        prompt[None],
        attention_mask=prompt.new_ones(1, prompt.numel()),
        min_new_tokens=generate_tokens,
        max_new_tokens=generate_tokens,
        num_beams=1,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    assert model.last_report is not None
    return model.last_report


def warm_up(model: GriffinModel, prompt: Tensor, generate_tokens: int) -> None:
    """Code, tables and memory that the first run brings in."""
    run_fixed(model, prompt, min(_WARM_UP_TOKENS, generate_tokens))


def measure_speed(
    model: GriffinModel,
    prompt: Tensor,
    generate_tokens: int,
    repeats: int,
    ceilings: Ceilings,
    checkpoint: Checkpoint,
    *,
    cold: bool = False,
    done: Callable[[], object] = lambda: None,
) -> Speed:
    """`repeats` runs after a warm-up; `cold` drops the checkpoint's files from the page cache before each."""
    warm_up(model, prompt, generate_tokens)
    reports, forwards = [], []
    for _ in range(repeats):
        if cold:
            drop_cached(checkpoint)
        with _timed_forwards(model) as taken:
            reports.append(run_fixed(model, prompt, generate_tokens))
        forwards.append(sum(taken[1:]) / (generate_tokens - 1))  # the first is the prompt's
        done()
    tokens = [report.decode_s / (generate_tokens - 1) for report in reports]
    prefill, decode = Spread.of([report.prefill_s for report in reports]), Spread.of(tokens)
    parts = {
        "wait_for_bytes": statistics.median(report.wait_s for report in reports),
        "statistic": statistics.median(report.statistic_s for report in reports),
        "select_and_gather": statistics.median(report.select_s for report in reports),
    }
    forward = statistics.median(forwards)
    streamed_bytes = reports[-1].prefill_streamed_bytes
    from_disk = cold or model.engine.streams_from_disk
    return Speed(
        density=model.plan.density,
        precision=model.plan.precision,
        prompt_tokens=prompt.numel(),
        generate_tokens=generate_tokens,
        repeats=repeats,
        cache="cold" if cold else "warm",
        prefill=prefill,
        decode=decode,
        prefill_ceiling_s=_prefill_ceiling(model, prompt.numel(), ceilings, streamed_bytes, from_disk),
        decode_ceiling_s=_decode_ceiling(model, ceilings),
        prefill_parts=parts | {"compute": prefill.median - sum(parts.values())},
        decode_parts={"forward": forward, "outside": decode.median - forward},
        streamed_bytes=streamed_bytes,
        resident_bytes=model.resident_bytes,
        peak_bytes=max(report.peak_device_bytes for report in reports),
        budget_bytes=model.plan.budget_bytes,
        decode_streamed_bytes=sum(report.decode_streamed_bytes for report in reports),
        decode_host_bytes=sum(report.experts.host_bytes for report in reports if report.experts),
        graphs=reports[-1].to_json()["graphs"],
    )


def drop_cached(checkpoint: Checkpoint) -> None:
    """Drop the files of a checkpoint from the page cache, as far as nobody has them mapped."""
    for file in checkpoint.files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _timed_forwards(model: GriffinModel) -> Iterator[list[float]]:
    """Seconds of every forward inside the context."""
    engine, taken = model.engine, list[float]()
    own = engine.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        output = own(*args, **kwargs)
        model.hardware.synchronize()
        taken.append(time.perf_counter() - start)
        return output

    engine.forward = forward  # type: ignore[method-assign]
    try:
        yield taken
    finally:
        del engine.forward


def _prefill_ceiling(
    model: GriffinModel, tokens: int, ceilings: Ceilings, streamed_bytes: int, from_disk: bool
) -> float | None:
    """The larger of reading (or copying) what is streamed and of multiplying by every matrix in the layers."""
    weights = sum(block.read_numbers for block in model.engine.blocks)
    shape = model.engine.shape
    attention = sum(layer.plain_attention_bytes for layer in shape.layers) // shape.item_bytes
    bounds = [2.0 * tokens * (weights + attention) / ceilings.gemm_flops_per_s[tokens]]
    rate = ceilings.copy_pinned_bytes_per_s
    if rate is None and from_disk:
        rate = ceilings.read_bytes_per_s
    if rate is not None:
        bounds.append(streamed_bytes / rate)
    return max(bounds)


def _decode_ceiling(model: GriffinModel, ceilings: Ceilings) -> float | None:
    """Reading every resident once per token, but for an embedding of which one row is read."""
    if ceilings.gemv_bytes_per_s is None:
        return None
    shape = model.engine.shape
    table = 0 if shape.tied or model.plan.embeddings == "host" else shape.embedding_bytes
    return (model.resident_bytes - table) / ceilings.gemv_bytes_per_s


# Latency of generation: prompts and answers of fixed lengths (paper, table 3).


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
