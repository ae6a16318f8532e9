"""How many drafts the full model accepts: by density, draft length, selection, and whether passes choose anew.

    python benchmarks/acceptance.py --dir MODEL --text TEXT --out OUT

Greedy exact mode on windows of held-out text, each prompt alone, so that all figures but the seconds are the same on
every machine. A pass costs the same whatever is accepted, so tokens per pass is what counts: 1 would be no draft at
all, the draft length and one its ceiling. The last line is JSON.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from quality import Windows, take_windows
from report import markdown_table, origin_lines, provenance, write
from transformers import AutoTokenizer

from griffin_offload import GriffinModel

DENSITIES = (0.75, 0.5, 0.25)
DRAFT_TOKENS = (4, 8, 16)
# (selection, decay of the statistic, refresh): what is compared.
METHODS = (
    ("topk", 1.0, "never"),
    ("topk", 1.0, "turn"),
    ("topk", 0.8, "turn"),
    ("output_aware", 1.0, "never"),
    ("output_aware", 1.0, "turn"),
    ("output_aware", 0.8, "turn"),
    ("random", 1.0, "never"),
)


@dataclass(frozen=True)
class Acceptance:
    """Of all windows together."""

    density: float
    selection: str
    decay: float
    refresh: str
    draft_tokens: int
    passes: int
    mean_accepted: float
    tokens_per_pass: float
    accepted_by_position: list[float]
    """Share accepted at each position, of drafts before which all were."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="a checkpoint that fits memory")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8, documents separated by lines of <|endoftext|>")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", help="of the result files; the directory's and the text's when not given")
    parser.add_argument("--out", type=Path, help="folder for the table and the JSON record")
    args = parser.parse_args(arguments)
    args.name = args.name or f"{args.dir.name}-{args.text.stem}"
    return args


def measure(model: GriffinModel, windows: Windows, new_tokens: int, draft_tokens: int, refresh: str) -> dict[str, Any]:
    """Exact mode over all windows; the ends of texts are ignored, so that every window gives as many tokens."""
    reports = []
    for ids in windows.ids:
        prompt = ids[None, : windows.prompt_tokens]
        model.generate(
            prompt,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            draft_tokens=draft_tokens,
            refresh=refresh,
        )
        reports.append(model.last_report.drafting)
    passes = sum(report.passes for report in reports)
    judged, accepted = (
        [sum(values[i] for values in lists if i < len(values)) for i in range(draft_tokens)]
        for lists in ([r.judged_by_position for r in reports], [r.accepted_by_position for r in reports])
    )
    return {
        "passes": passes,
        "mean_accepted": sum(report.accepted for report in reports) / passes,
        "tokens_per_pass": sum(report.tokens for report in reports) / passes,
        "accepted_by_position": [a / j if j else 0.0 for a, j in zip(accepted, judged, strict=True)],
    }


def measure_all(args: argparse.Namespace) -> list[Acceptance]:
    tokenizer = AutoTokenizer.from_pretrained(args.dir)
    windows = take_windows(args.text, tokenizer, args.windows, args.prompt_tokens, args.new_tokens)
    found = []
    for density, (selection, decay, refresh) in product(DENSITIES, METHODS):
        with GriffinModel.from_pretrained(
            args.dir,
            device="cpu",
            density=density,
            selection=selection,
            decay=decay,
            exact=True,
            ctx_size=args.prompt_tokens + args.new_tokens,
            threads=args.threads,
        ) as model:
            for draft_tokens in DRAFT_TOKENS:
                figures = measure(model, windows, args.new_tokens, draft_tokens, refresh)
                found.append(Acceptance(density, selection, decay, refresh, draft_tokens, **figures))
                print(json.dumps(asdict(found[-1])), file=sys.stderr)
    return found


def table(found: list[Acceptance]) -> str:
    """A line per density and method, a column per draft length."""
    lines = []
    for density, (selection, decay, refresh) in product(DENSITIES, METHODS):
        method = (density, selection, decay, refresh)
        row = [a for a in found if (a.density, a.selection, a.decay, a.refresh) == method]
        lines.append(
            [
                f"{density:g}",
                selection,
                "never" if refresh == "never" else "every pass",
                f"{decay:g}" if refresh != "never" else "",
                *(f"{a.tokens_per_pass:.2f} ({a.mean_accepted:.2f})" for a in row),
            ]
        )
    heads = ["density", "selection", "chosen anew", "decay", *(f"{n} drafts" for n in DRAFT_TOKENS)]
    return markdown_table([heads, *lines])


def main(arguments: Sequence[str]) -> int:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    found = measure_all(args)
    record = provenance("acceptance.py", arguments) | {"acceptance": [asdict(a) for a in found]}
    text = "\n".join(
        [
            f"# Accepted drafts: {args.dir.name}, {args.text.stem}",
            "",
            origin_lines(record),
            "",
            f"Tokens per verifying pass (accepted drafts per pass), greedy, {args.windows} windows of "
            f"{args.prompt_tokens} prompt and {args.new_tokens} generated tokens.",
            "",
            table(found),
        ]
    )
    print(text)
    if args.out is not None:
        write(args.out, f"acceptance-{args.name}", text, record)
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
