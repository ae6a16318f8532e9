"""Ways to choose neurons, side by side on real text: the scores and additions of METHOD's "ways to do better".

All variants go through the same streamed passes of the simulation, so windows, tokens and rounding are the same. The
prior is measured on other texts. Only predictions made by the chosen neurons count: the prompt's own last one does not.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from real_variants import documents_of
from report import markdown_table, provenance, publish
from torch import Tensor
from transformers.utils import logging as transformers_logging

from griffin_offload import GriffinModel
from griffin_offload.demo import demo_directory
from griffin_offload.evaluation.samples import SEPARATOR, Sample, Scores, first_tokens, take_windows, tokenize
from griffin_offload.evaluation.simulation import prompt_prior, simulate
from griffin_offload.method.variants import Variant

DENSITIES = (0.75, 0.5, 0.25)
VARIANTS: dict[str, dict[str, Any]] = {
    "s (GRIFFIN)": {"selection": "topk"},
    "s x norm": {"selection": "output_aware"},
    "s, prior by rank": {"selection": "topk", "prior": "rank"},
    "s x norm, prior by rank": {"selection": "output_aware", "prior": "rank"},
    "s, prior by energy": {"selection": "topk", "prior": "energy"},
    "s x norm, prior by energy": {"selection": "output_aware", "prior": "energy"},
    "prior x norm alone": {"selection": "output_aware", "prior": "rank", "prior_share": 1.0},
    "s, means": {"selection": "topk", "compensate": True},
    "s x norm, means": {"selection": "output_aware", "compensate": True},
    "s x norm, prior by energy, means": {"selection": "output_aware", "prior": "energy", "compensate": True},
    "s, one threshold": {"selection": "topk", "allocation": "global"},
    "s x norm, numbers of s by one threshold": {"selection": "output_aware", "allocation": "global"},
    "magnitude": {"selection": "magnitude"},
    "random": {"selection": "random"},
}
BASE = "s (GRIFFIN)"
REFRESHED = (BASE, "s x norm")
REFRESH_TOKENS = 32
_TABLE, _PRIOR = "a float per neuron, once", "two floats per neuron, once; other text"
COSTS = {
    "s x norm": _TABLE,
    "s, prior by rank": _PRIOR,
    "s x norm, prior by rank": _PRIOR,
    "s, prior by energy": _PRIOR,
    "s x norm, prior by energy": _PRIOR,
    "prior x norm alone": _PRIOR,
    "s, means": "H floats per layer; all of down once per prompt",
    "s x norm, means": "both",
    "s x norm, prior by energy, means": "all three",
    "s, one threshold": "a second pass over the prompt",
    "s x norm, numbers of s by one threshold": "a second pass, a float per neuron",
    "magnitude": _TABLE,
}
"""Beside what the paper's score costs."""


@dataclass(frozen=True)
class Row:
    """One variant over all windows."""

    name: str
    density: float
    perplexity: float
    increase: float
    """Of the perplexity over the full model's."""
    kl: float
    top1: float
    activation_kept: float
    window_nll: list[float]
    against_base: float
    """Perplexity over that of the paper's score at the same density, less 1."""
    against_base_error: float
    """Its standard error over the windows, which both saw."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=demo_directory(), help="checkpoint (default: the demo)")
    parser.add_argument("--text", type=Path, required=True, help=f"what is scored; documents between {SEPARATOR}")
    parser.add_argument("--prior", type=Path, action="append", required=True, help="other text, may be .xz; repeatable")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window-start", choices=("even", "documents"), default="even")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--generate-tokens", type=int, default=128)
    parser.add_argument("--prior-windows", type=int, default=256, help="of each prior text, of 256 tokens")
    parser.add_argument("--prior-characters", type=int, default=3_000_000, help="so much of each prior text is read")
    parser.add_argument("--max-mem", default="auto", help="the budget of the passes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", help="of the record (default: after the text)")
    parser.add_argument("--out", type=Path, help="folder for the record")
    args = parser.parse_args(arguments)
    args.name = args.name or f"{'demo' if args.dir == demo_directory() else args.dir.name}-{args.text.stem}"
    return args


def cut(model: GriffinModel, documents: list[str], tokens: int, count: int, start: Any = "even") -> list[Tensor]:
    first = first_tokens(model.model.config, model.tokenizer)
    return take_windows(tokenize(documents, model.tokenizer), tokens, count, start, first)


def measure_prior(model: GriffinModel, args: argparse.Namespace) -> list[Tensor]:
    """The mean over the prior texts, each weighing the same."""
    windows = [
        ids
        for path in args.prior
        for ids in cut(model, documents_of(path, args.prior_characters), 257, args.prior_windows)
    ]
    return prompt_prior(model, [Sample(ids, 256, 256) for ids in windows])


def nll(scores: Sequence[Scores]) -> list[float]:
    """Of each window."""
    return [-float(score.log_probs.double().mean()) for score in scores]


def row_of(name: str, density: float, scores: list[Scores], full: list[Scores], base: list[Scores]) -> Row:
    own = nll(scores)
    changes = [ours - theirs for ours, theirs in zip(own, nll(base), strict=True)]
    return Row(
        name=name,
        density=density,
        perplexity=math.exp(statistics.mean(own)),
        increase=math.expm1(statistics.mean(own) - statistics.mean(nll(full))),
        kl=statistics.mean(float(score.kl.mean()) for score in scores),
        top1=statistics.mean(float(score.agrees.double().mean()) for score in scores),
        activation_kept=statistics.mean(score.activation_kept for score in scores),
        window_nll=own,
        against_base=math.expm1(statistics.mean(changes)),
        against_base_error=statistics.stdev(changes) / math.sqrt(len(changes)),
    )


def measure(model: GriffinModel, args: argparse.Namespace, prior: list[Tensor]) -> tuple[float, list[Row], list[str]]:
    """(the full model's perplexity, a row for every variant and density, confidence by density)"""
    tokens = args.prompt_tokens + args.generate_tokens + 1
    windows = cut(model, documents_of(args.text), tokens, args.windows, args.window_start)
    samples = [Sample(ids, args.prompt_tokens, args.prompt_tokens + 1) for ids in windows]
    variants = {
        (name, density): Variant(density=density, **VARIANTS[name]) for density in DENSITIES for name in VARIANTS
    }
    simulated = simulate(model, samples, list(variants.values()), prior=prior)
    full = [sample.full for sample in simulated]
    scores = dict(
        zip(variants, (list(row) for row in zip(*(sample.variants for sample in simulated), strict=True)), strict=True)
    )
    base = {density: scores[BASE, density] for density in DENSITIES}
    rows = [row_of(name, density, own, full, base[density]) for (name, density), own in scores.items()]
    rows += refreshed(model, args, windows, full, base)
    rows.sort(key=lambda row: -row.density)
    return math.exp(statistics.mean(nll(full))), rows, confidence(model, args, windows, base)


def refreshed(
    model: GriffinModel,
    args: argparse.Namespace,
    windows: list[Tensor],
    full: list[Scores],
    base: dict[float, list[Scores]],
) -> list[Row]:
    """The same tokens, with neurons chosen anew by all tokens so far before every REFRESH_TOKENS of them."""
    variants = {(name, density): Variant(density, **VARIANTS[name]) for density in DENSITIES for name in REFRESHED}
    starts = range(args.prompt_tokens, args.prompt_tokens + args.generate_tokens, REFRESH_TOKENS)
    end = args.prompt_tokens + args.generate_tokens + 1
    samples = [
        Sample(ids[: min(start + REFRESH_TOKENS + 1, end)], start, start + 1) for ids in windows for start in starts
    ]
    simulated = simulate(model, samples, list(variants.values()))
    rows = []
    for place, (name, density) in enumerate(variants):
        parts = [sample.variants[place] for sample in simulated]
        whole = [joined(parts[first : first + len(starts)]) for first in range(0, len(parts), len(starts))]
        label = f"{'s' if name == BASE else name}, refreshed every {REFRESH_TOKENS}"
        rows.append(row_of(label, density, whole, full, base[density]))
    return rows


def joined(parts: list[Scores]) -> Scores:
    """Of one window, in the order of its tokens."""
    names = ("log_probs", "kl", "agrees", "greedy")
    tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return Scores(**tensors, activation_kept=statistics.mean(part.activation_kept for part in parts))


def confidence(
    model: GriffinModel, args: argparse.Namespace, windows: list[Tensor], base: dict[float, list[Scores]]
) -> list[str]:
    """How well top-1 agreement on the last quarter of a prompt, with neurons of its first three, tells the loss."""
    quarter = args.prompt_tokens // 4
    start = args.prompt_tokens - quarter
    samples = [Sample(ids[: args.prompt_tokens], start, start + 1) for ids in windows]
    simulated = simulate(model, samples, [Variant(density, "topk") for density in DENSITIES])
    lines = []
    for place, density in enumerate(DENSITIES):
        agreement = [float(sample.variants[place].agrees.double().mean()) for sample in simulated]
        losses = [float(score.kl.mean()) for score in base[density]]
        found = rank_correlation(agreement, losses)
        lines.append(f"{density:g}: {statistics.mean(agreement):.3f} agree there, {found:+.2f}")
    return lines


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, equal values at their mean rank."""
    ranks = [[sum(y < x for y in values) + sum(y == x for y in values) / 2 for x in values] for values in (a, b)]
    return statistics.correlation(*ranks)


def table(rows: Sequence[Row]) -> str:
    head = ["density", "variant", "perplexity", "increase", "against s", "KL", "top-1", "activation kept", "costs"]
    found = [head]
    for row in rows:
        against = "" if row.name == BASE else f"{row.against_base:+.1%} ± {row.against_base_error:.1%}"
        numbers = [f"{row.perplexity:.4g}", f"{row.increase:+.1%}", against, f"{row.kl:.3f}", f"{row.top1:.3f}"]
        cost = f"a streamed pass every {REFRESH_TOKENS} tokens" if "refreshed" in row.name else COSTS.get(row.name, "")
        found.append([f"{row.density:g}", row.name, *numbers, f"{row.activation_kept:.3f}", cost])
    return markdown_table(found)


def variants_record(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The table of all variants, and the figures behind it."""
    tokens = args.prompt_tokens + args.generate_tokens + 1
    with GriffinModel.from_pretrained(
        args.dir, density=0.0, ctx_size=max(tokens, 257), max_gpu_mem=args.max_mem, threads=args.threads, device="cpu"
    ) as model:
        prior = measure_prior(model, args)
        full, rows, confident = measure(model, args, prior)
    stated = (
        f"{args.windows} windows of {args.prompt_tokens} + {args.generate_tokens} tokens; full model: perplexity "
        f"{full:.2f}. Prior: {args.prior_windows} windows of 256 tokens of each of "
        f"{', '.join(path.name.split('.')[0] for path in args.prior)}. Against s: perplexity over that of s at the "
        "same density, with the standard error over the windows."
    )
    told = (
        "Confidence: top-1 agreement with the full model on the last quarter of the prompt, neurons of s chosen on the "
        "rest, and its rank correlation over the windows with KL of the generation. " + "; ".join(confident) + "."
    )
    figures = {"full_perplexity": full, "confidence": confident, "rows": [asdict(r) for r in rows]}
    return "\n\n".join([stated, table(rows), told]), figures


def main(arguments: Sequence[str]) -> int:
    args = parse_arguments(arguments)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    body, figures = variants_record(args)
    record = provenance("score_variants.py", arguments) | figures
    publish(args.out, f"score_variants-{args.name}", f"Ways to choose neurons: {args.name}", body, record)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
