"""A model larger than the memory it may use: griffin-offload and accelerate's disk offload, side by side.

    python benchmarks/over_budget.py --shape llama-2-13b --dir DIR --budget 16GB --density 0.25

Each side runs cold, in a process of its own, inside the same memory cgroup. The ceilings are measured and
printed first, the table follows, and the last line is JSON.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from comparison import Comparison, summarise
from make_checkpoint import SHAPES, make_checkpoint, model_config
from measured import SideCeilings, measure_ceilings
from model_bytes import ModelBytes, full_model_bounds, our_bounds, parse_bytes
from report import origin_lines, provenance, seconds, table, write
from sides import Result, Side, Workload, rival_settings, run_rival_trials, run_side

DEFAULT_SHAPE = "llama-2-13b"
TRIAL_PROMPT_TOKENS, TRIAL_NEW_TOKENS = 16, 3


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="checkpoint; made when absent")
    parser.add_argument("--shape", choices=SHAPES, help="what to make; an existing checkpoint must have it")
    parser.add_argument("--layers", type=int, help="override the number of layers")
    parser.add_argument("--budget", default="16GB", help="what the runtime may use")
    parser.add_argument("--overhead", default="1GB", help="interpreter and libraries, added to the cap")
    parser.add_argument("--cap", help="cgroup limit of both sides; budget + overhead when not given")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rival-tokens", type=int, default=4, help="it needs a full read per token")
    parser.add_argument("--threads", type=int, help="skip the trial and use this many on both sides")
    parser.add_argument("--thread-choices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=["ours", "rival"], default=["ours", "rival"])
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one run")
    parser.add_argument("--out", type=Path, help="folder for the table and the JSON record")
    args = parser.parse_args(arguments)
    if min(args.new_tokens, args.rival_tokens) < 2:
        parser.error("at least 2 new tokens: the first belongs to the prompt")
    try:
        args.cap_bytes = parse_bytes(args.cap) if args.cap else parse_bytes(args.budget) + parse_bytes(args.overhead)
    except ValueError as error:
        parser.error(str(error))
    return args


def prepare_checkpoint(args: argparse.Namespace) -> ModelBytes:
    """Make it when absent; a checkpoint of another shape than the one asked for is refused."""
    if not args.dir.exists():
        make_checkpoint(args.dir, args.shape or DEFAULT_SHAPE, args.layers)
    model = ModelBytes.of(args.dir)
    if args.shape:
        wanted = model_config(args.shape, args.layers)
        found = (model.hidden, model.feed_forward, model.layers)
        if found != (wanted.hidden_size, wanted.intermediate_size, wanted.num_hidden_layers):
            raise SystemExit(f"error: --dir is not of --shape {args.shape}: hidden, FF, layers are {found}")
    return model


@dataclass
class Runs:
    ours: list[Result] = field(default_factory=list)
    rival: list[Result] = field(default_factory=list)
    rival_trials: list[Result] = field(default_factory=list)


def run_sides(args: argparse.Namespace, ceilings: SideCeilings) -> Runs:
    runs = Runs()
    work = Workload(args.dir, args.prompt_tokens, args.cap_bytes, args.timeout)
    if "ours" in args.sides:
        options = ("--budget", args.budget, "--density", str(args.density))
        name = f"griffin-offload, density {args.density}"
        ours = Side(name, "ours", ceilings.ours.threads, args.new_tokens, options)
        runs.ours = [run_side(ours, work) for _ in range(args.repeats)]
    if "rival" in args.sides:
        with tempfile.TemporaryDirectory() as folder:
            run_rival(args, work, Path(folder), ceilings.rival.threads, runs)
    return runs


def run_rival(args: argparse.Namespace, work: Workload, folder: Path, threads: int, runs: Runs) -> None:
    """A short trial of every setting, then the whole workload with the best."""
    settings = rival_settings(parse_bytes(args.budget), folder, threads, TRIAL_NEW_TOKENS)
    trial_work = replace(work, prompt_tokens=min(TRIAL_PROMPT_TOKENS, work.prompt_tokens))
    runs.rival_trials, best = run_rival_trials(settings, trial_work)
    if best:
        side = replace(best, new_tokens=args.rival_tokens)
        runs.rival = [run_side(side, work) for _ in range(args.repeats)]


def compare(
    args: argparse.Namespace, model: ModelBytes, ceilings: SideCeilings, runs: Runs | None = None
) -> Comparison:
    return Comparison(
        ours=summarise(runs.ours) if runs else None,
        rival=summarise(runs.rival) if runs else None,
        our_bounds=our_bounds(model, ceilings.ours, args.prompt_tokens, args.density),
        rival_bounds=full_model_bounds(model, ceilings.rival, args.prompt_tokens, args.cap_bytes),
        disk_bytes_per_s=ceilings.ours.disk_bytes_per_s,
        new_tokens=args.new_tokens,
    )


def statement(model: ModelBytes, bare: Comparison, ceilings: SideCeilings, cap_bytes: int) -> str:
    """What is possible at best, before anything has run."""
    lines = [
        f"{model.name}: {model.total_bytes / 1e9:.1f} GB, memory cap {cap_bytes / 1e9:.1f} GB. Ceilings:",
        "",
        f"- disk, cold and sequential: {bare.disk_bytes_per_s / 1e9:.2f} GB/s",
    ]
    sides = (
        ("ours", ceilings.ours, bare.our_bounds),
        ("any full-weight method", ceilings.rival, bare.rival_bounds),
    )
    for name, ceiling, bound in sides:
        lines.append(
            f"- {name}: {ceiling.threads} threads, GEMV {ceiling.gemv_bytes_per_s / 1e9:.1f} GB/s, "
            f"GEMM {ceiling.gemm_flops_per_s / 1e9:.0f} Gflop/s; load + first token at best "
            f"{seconds(bound.load_and_prefill_s)}, then at best {seconds(bound.token_s)} per token"
        )
    return "\n".join(lines)


def notes(comparison: Comparison, runs: Runs) -> str:
    """What a reader must know beside the table; a missing cap or a failed side is never silent."""
    everything = [*runs.ours, *runs.rival, *runs.rival_trials]
    lines = [f"- {result.side.name}: {result.failure}" for result in everything if not result.figures]
    lines += [
        f"- trial: {result.side.name}: {seconds(result.token_s)} per token"
        for result in runs.rival_trials
        if result.figures
    ]
    if any(result.outcome.limit_bytes is None for result in everything):
        lines.append("- **no memory cgroup could be made: the sides ran without a cap**")
    warm_bytes = max((result.cached_before_bytes for result in everything), default=0)
    lines.append(f"- still in the page cache before a run, at most: {warm_bytes / 1e9:.2f} GB")
    if comparison.first_token_equal() is not None:
        lines.append(f"- first token equal on both sides: {comparison.first_token_equal()}")
    if comparison.ours and comparison.ours.report:
        lines.append(f"- report of griffin-offload: `{json.dumps(comparison.ours.report)}`")
    return "\n".join(lines)


def as_record(result: Result) -> dict[str, Any]:
    """Options and raw output are left out: they name folders of this machine."""
    outcome = {key: value for key, value in asdict(result.outcome).items() if key != "stdout"}
    side = {key: value for key, value in asdict(result.side).items() if key != "options"}
    return {
        "side": side,
        "cached_before_bytes": result.cached_before_bytes,
        "figures": result.figures,
    } | outcome


def main(arguments: Sequence[str]) -> int:
    args = parse_arguments(arguments)
    model = prepare_checkpoint(args)
    threads = [args.threads] if args.threads else args.thread_choices
    tokens = (args.new_tokens, args.rival_tokens)
    ceilings = measure_ceilings(args.dir, model, threads, args.prompt_tokens, args.density, tokens)
    stated = statement(model, compare(args, model, ceilings), ceilings, args.cap_bytes)
    print(stated, end="\n\n", flush=True)

    runs = run_sides(args, ceilings)
    comparison = compare(args, model, ceilings, runs)
    found = f"{table(comparison.rows())}\n\n{notes(comparison, runs)}"
    print(found, end="\n\n")
    record = provenance("over_budget.py", arguments) | {
        "model": asdict(model),
        "cap_bytes": args.cap_bytes,
        "ceilings": asdict(ceilings),
        "comparison": comparison.record(),
        "runs": {side: list(map(as_record, results)) for side, results in vars(runs).items()},
    }
    if args.out:
        write(args.out, f"over_budget-{model.name}", "\n\n".join([origin_lines(record), stated, found]), record)
    print(json.dumps(record))
    return 0 if all(result.figures for result in [*runs.ours, *runs.rival]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
