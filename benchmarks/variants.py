"""The rows of `equal_bytes.py`: one variant each, and the two tables they make."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from quality import Quality

NAMES = {"none": "16 bit", "int8": "int8", "int4": "int4"}


@dataclass(frozen=True)
class Variant:
    """One row. `quality` is None for random weights."""

    precision: str
    density: float
    resident_bytes: int
    token_bytes: int
    """Weights that one token reads: the residents without the embedding, which is looked up."""
    tokens_per_s: list[float]
    quality: Quality | None

    @property
    def name(self) -> str:
        return f"{NAMES[self.precision]}, {density_name(self.density)}"

    @property
    def speed(self) -> float:
        return statistics.median(self.tokens_per_s)


def density_name(density: float) -> str:
    return "dense" if density == 1 else f"{density:g}"


def rows(variants: Sequence[Variant]) -> list[list[str]]:
    """Header and one row per variant."""
    dense, base = variants[0], variants[0].quality
    header = ["variant", "resident", "of 16 bit dense", "tokens/s", "spread", "GB/s read"]
    if base:
        header += ["perplexity", "change", "by precision alone", "KL to dense 16 bit", "top-1 agreement"]
    plain = {v.density: v.quality for v in variants if v.precision == "none"}
    table = [header]
    for v in variants:
        row = [v.name, f"{v.resident_bytes / 1e6:.4g} MB", f"{v.resident_bytes / dense.resident_bytes:.1%}"]
        row += [f"{v.speed:.3g}", f"{min(v.tokens_per_s):.3g} to {max(v.tokens_per_s):.3g}"]
        row += [f"{v.token_bytes * v.speed / 1e9:.2f}"]
        if v.quality and base:
            q = v.quality
            row += [f"{q.perplexity:.2f}", f"{q.perplexity / base.perplexity - 1:+.1%}"]
            row += [paired_change(q, plain[v.density]), f"{q.kl:.4f}", f"{q.top1_agreement:.3f}"]
        table.append(row)
    return table


def paired_change(quality: Quality, plain: Quality | None) -> str:
    """Perplexity over the one of `plain`, less 1, and its standard error over the windows, which both saw."""
    if plain is None or plain is quality or len(quality.window_nll) < 2:
        return ""
    changes = [own - other for own, other in zip(quality.window_nll, plain.window_nll, strict=True)]
    error = statistics.stdev(changes) / math.sqrt(len(changes))
    return f"{math.expm1(statistics.mean(changes)):+.2%} ± {error:.2%}"


def by_bytes(variants: Sequence[Variant]) -> list[list[str]]:
    """Ascending; a variant is worth its bytes when none of at most as many is better."""
    scored = variants[0].quality is not None
    table = [["resident", "variant", "tokens/s", *(["perplexity", "KL", "best so far"] if scored else [])]]
    best = float("inf")
    for v in sorted(variants, key=lambda v: v.resident_bytes):
        row = [f"{v.resident_bytes / 1e6:.4g} MB", v.name, f"{v.speed:.3g}"]
        if v.quality:
            row += [f"{v.quality.perplexity:.2f}", f"{v.quality.kl:.4f}", "yes" if v.quality.kl < best else ""]
            best = min(best, v.quality.kl)
        table.append(row)
    return table
