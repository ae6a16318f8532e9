"""Faults and SIGKILLs by the hundred, each in a real process: does it end, in one line, and is nothing half or wrong?

    python benchmarks/faults.py --faults 500 --kills 100 --seed 0 --out OUT

Commands of the demo model are forked from this process after its imports. The ceiling is zero: a hang, a traceback, an
exit code that is not documented for the fault, an output that differs from the undisturbed one, or a file that is
neither whole nor absent counts as a problem. The last line is JSON; the exit status is 1 if there was any.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before torch is imported: forked processes may have no threads to lose.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

from fault_cases import cases
from fault_kills import KILLS
from fault_world import Result, World, made_world
from report import markdown_table, origin_lines, provenance, write

_PROBLEMS_SHOWN = 20


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="WORDS", help="kinds whose names hold these words")
    parser.add_argument("--out", type=Path, help="folder for the record")
    return parser.parse_args(arguments)


def import_everything() -> None:
    """What commands import when they need it."""
    import transformers.models.llama.modeling_llama  # noqa: F401
    import uvicorn.protocols.http.h11_impl  # noqa: F401

    import griffin_offload.engine.chat
    import griffin_offload.engine.convert
    import griffin_offload.engine.model
    import griffin_offload.serving.server  # noqa: F401


def shares(weights: dict[str, int], total: int) -> list[str]:
    """Kinds in proportion to their weights, `total` in all, in turns."""
    turns = [(place / weight, kind) for kind, weight in weights.items() for place in range(1, weight + 1)]
    order = [kind for _, kind in sorted(turns)]
    return [order[i % len(order)] for i in range(total)]


def one(kind: str, case: Any, world: World, rng: random.Random) -> Result:
    with world.folder() as place:
        try:
            return Result(*case(world, rng, place))
        except Exception as error:  # a server that does not answer, for example: a finding, too
            return Result("no outcome", f"{type(error).__name__}: {error}")


def run_all(options: argparse.Namespace, world: World) -> list[dict[str, Any]]:
    faults = {kind: found for kind, found in cases(world).items() if options.only in kind}
    kills = {kind: case for kind, case in KILLS.items() if options.only in kind}
    plan = [
        (kind, faults[kind][1]) for kind in shares({k: w for k, (w, _) in faults.items()}, options.faults) if faults
    ]
    plan += [(kind, kills[kind]) for kind in shares(dict.fromkeys(kills, 1), options.kills) if kills]
    records = []
    for number, (kind, case) in enumerate(plan):
        start = time.monotonic()
        outcome, problem = one(kind, case, world, random.Random(f"{options.seed} {number} {kind}"))
        records.append({"number": number, "kind": kind, "outcome": outcome, "problem": problem})
        records[-1]["seconds"] = round(time.monotonic() - start, 2)
        mark = f"PROBLEM {problem}" if problem else outcome
        print(f"{number + 1}/{len(plan)} {kind}: {mark}", file=sys.stderr, flush=True)
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    rows = [["kind", "count", "outcomes", "problems"]]
    for kind in dict.fromkeys(record["kind"] for record in records):
        own = [record for record in records if record["kind"] == kind]
        outcomes = Counter(record["outcome"] for record in own).most_common()
        told = ", ".join(f"{count} {outcome}" for outcome, count in outcomes)
        rows.append([kind, str(len(own)), told, str(sum(record["problem"] is not None for record in own))])
    rows.append(["all", str(len(records)), "", str(sum(record["problem"] is not None for record in records))])
    return markdown_table(rows)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    import_everything()
    with tempfile.TemporaryDirectory(prefix="griffin-faults-") as folder:
        Path(folder).chmod(0o755)  # for the cases that run as nobody
        with made_world(Path(folder)) as world:
            return run_all(options, world)


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    start = time.monotonic()
    records = measure(options)
    problems = [record for record in records if record["problem"] is not None]
    record = provenance("faults.py", arguments) | {
        "wall_s": round(time.monotonic() - start, 1),
        "faults": sum(not r["kind"].startswith("kill") for r in records),
        "kills": sum(r["kind"].startswith("kill") for r in records),
        "problems": problems,
    }
    page = f"# Faults and kills\n\n{origin_lines(record)}\n\n{table(records)}\n"
    print(table(records))
    for found in problems[:_PROBLEMS_SHOWN]:
        print(f"problem: {str(found)[:500]}")
    if options.out is not None:
        counted = Counter((r["kind"], r["outcome"]) for r in records)
        outcomes = [{"kind": kind, "outcome": outcome, "count": n} for (kind, outcome), n in counted.items()]
        write(options.out, "faults", page, record | {"outcomes": outcomes})
    print(json.dumps(record))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
