"""Hostile files for every parser: named errors, bounded time and memory, nothing written, no code run?

    python benchmarks/fuzz.py --cases 100000 --seed 0 --out OUT

Damages valid files (bytes, JSON values, safetensors headers) by a seeded generator and reads them with the package, in
processes that are forked after the imports, limited and watched (`fuzzing/`). `--only KIND --first N --cases 1` repeats
one case; `--more` goes on where the record in OUT ended, and counts both. The last line is JSON; the exit status is 1
if anything but an answer or a named error came back.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from fuzzing.kinds import Kind, make_kinds
from fuzzing.lanes import Lane, run_lanes
from fuzzing.worker import BAD, OUTCOMES, Verdict
from report import markdown_table, origin_lines, provenance, write

# Of every kind so many bad cases are told in full.
_TOLD = 20


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", nargs="+", metavar="KIND", help="these kinds alone, each with all the cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind")
    parser.add_argument("--out", type=Path, help="folder for the table and the JSON record")
    parser.add_argument("--more", action="store_true", help="go on after the record in --out")
    args = parser.parse_args(arguments)
    if args.more and (args.out is None or args.first):
        parser.error("--more goes on after the record in --out: give --out, and no --first")
    return args


def run_kind(kind: Kind, first: int, count: int, seed: int, workers: int, folder: Path) -> list[Verdict]:
    """Cases `first` to `first + count` of one kind."""
    cases = range(first, first + count)
    parts = [list(cases[worker::workers]) for worker in range(min(workers, count))]
    name = kind.name.replace(" ", "-")
    return run_lanes(
        [
            Lane(kind.case, part, f"{seed}/{kind.name}", folder / f"{name}-{i}", kind.files)
            for i, part in enumerate(parts)
        ]
    )


def summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    counts = Counter(verdict.outcome for verdict in verdicts)
    return {
        "cases": len(verdicts),
        **{outcome: counts[outcome] for outcome in OUTCOMES},
        "errors": dict(Counter(v.detail for v in verdicts if v.outcome == "refused").most_common()),
        "slowest_s": max((verdict.seconds for verdict in verdicts), default=0.0),
        "bad": list(
            {
                (v.outcome, re.sub(r"\d+|/\S+", "#", v.detail)): asdict(v)
                for v in reversed(verdicts)
                if v.outcome in BAD
            }.values()
        )[:_TOLD],
    }


def fuzz(arguments: argparse.Namespace, folder: Path, before: dict[str, Any]) -> dict[str, Any]:
    """Figures of every kind, those of `before` included."""
    found = {}
    for kind in make_kinds(folder):
        if arguments.only and kind.name not in arguments.only:
            continue
        count = arguments.cases if arguments.only else -int(-arguments.cases * kind.share // 1)
        earlier = before.get(kind.name)
        first = earlier["cases"] if earlier else arguments.first
        verdicts = run_kind(kind, first, count, arguments.seed, arguments.workers, folder)
        found[kind.name] = together(earlier, summary(verdicts)) if earlier else summary(verdicts)
        print(kind.name, {key: value for key, value in found[kind.name].items() if key != "bad"}, file=sys.stderr)
        for verdict in found[kind.name]["bad"]:
            print("   ", verdict, file=sys.stderr)
    return before | found


def together(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two summaries of one kind."""
    return {name: first[name] + second[name] for name in ("cases", *OUTCOMES, "bad")} | {
        "errors": dict(Counter(first["errors"]) + Counter(second["errors"])),
        "slowest_s": max(first["slowest_s"], second["slowest_s"]),
    }


def table(found: dict[str, Any]) -> str:
    names = ("cases", *OUTCOMES)
    totals = {name: sum(figures[name] for figures in found.values()) for name in names}
    rows = [
        (kind, *(f"{figures[name]:,}" for name in names), f"{figures['slowest_s']:.2g}")
        for kind, figures in found.items()
    ]
    rows.append(("**all**", *(f"**{totals[name]:,}**" for name in names), ""))
    return markdown_table([("", *names, "slowest, s"), *rows])


def main(arguments: Sequence[str]) -> int:
    args = parse_arguments(arguments)
    torch.set_num_threads(1)  # workers are forked: no thread may hold anything
    record, before = provenance("fuzz.py", arguments), {}
    if args.more:
        earlier = json.loads((args.out / "fuzz.json").read_text())
        if earlier["seed"] != args.seed:
            raise SystemExit(f"error: the record in --out is of seed {earlier['seed']}")
        record["command"], before = f"{earlier['command']}; {record['command']}", earlier["kinds"]
    with tempfile.TemporaryDirectory() as folder:
        record |= {"seed": args.seed, "kinds": fuzz(args, Path(folder), before)}
    bad = [verdict for figures in record["kinds"].values() for verdict in figures["bad"]]
    text = table(record["kinds"])
    print(text, end="\n\n")
    if args.out:
        write(args.out, "fuzz", f"{origin_lines(record)}\n\n{text}", record)
    print(json.dumps(record))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
