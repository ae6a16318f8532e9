"""A model larger than the memory it may use: griffin-offload and accelerate's disk offload, side by side.

    python benchmarks/over_budget.py --shape llama-2-13b --dir DIR --quantize int8 --convert --cap 12GiB --density 0.5

Each side runs cold, in a process of its own, inside the same memory cgroup; the rival always on the 16-bit original.
The ceilings are measured and printed first, the table follows, and the last line is JSON.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ceilings import PRECISIONS
from comparison import Comparison, Summary, summarise
from converted_copy import Copy, converted_copy
from make_checkpoint import SHAPES, make_checkpoint, model_config
from measured import SideCeilings, measure_ceilings
from model_bytes import ModelBytes, full_model_bounds, our_bounds, parse_bytes
from report import gigabytes, origin_lines, provenance, seconds, table, write
from sides import RIVAL_SHARES, Result, Side, Workload, rival_settings, run_rival_trials, run_side

DEFAULT_SHAPE = "llama-2-13b"
TRIAL_PROMPT_TOKENS, TRIAL_NEW_TOKENS = 16, 3


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="checkpoint; made when absent")
    parser.add_argument("--shape", choices=SHAPES, help="what to make; an existing checkpoint must have it")
    parser.add_argument("--layers", type=int, help="override the number of layers")
    parser.add_argument("--cap", help="cgroup limit of both sides; budget + overhead when not given")
    parser.add_argument("--budget", help="what our runtime may use; cap - overhead when not given")
    parser.add_argument("--overhead", default="0.7GB", help="our interpreter and libraries, beside the budget")
    parser.add_argument("--quantize", choices=PRECISIONS, default="none", help="our residents")
    parser.add_argument("--convert", action="store_true", help="ours runs on a converted copy; made when absent")
    parser.add_argument("--rival-shares", type=float, nargs="+", default=RIVAL_SHARES, help="of the cap, to be tried")
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
    if args.convert and args.quantize == "none":
        parser.error("--convert needs --quantize int8 or int4")
    if not args.cap and not args.budget:
        parser.error("give --cap or --budget")
    try:
        overhead_bytes = parse_bytes(args.overhead)
        args.cap_bytes = parse_bytes(args.cap) if args.cap else parse_bytes(args.budget) + overhead_bytes
        args.budget_bytes = parse_bytes(args.budget) if args.budget else args.cap_bytes - overhead_bytes
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


def run_sides(args: argparse.Namespace, ceilings: SideCeilings, copy: Copy | None) -> Runs:
    runs = Runs()
    work = Workload(args.dir, args.prompt_tokens, args.cap_bytes, args.timeout)
    if "ours" in args.sides:
        options = ("--budget", str(args.budget_bytes), "--density", str(args.density), "--quantize", args.quantize)
        name = f"griffin-offload, {'16 bit' if args.quantize == 'none' else args.quantize}, density {args.density}"
        ours = Side(name, "ours", ceilings.ours.threads, args.new_tokens, options)
        our_work = replace(work, folder=copy.folder) if copy else work
        runs.ours = [run_side(ours, our_work) for _ in range(args.repeats)]
    if "rival" in args.sides:
        with tempfile.TemporaryDirectory() as folder:
            run_rival(args, work, Path(folder), ceilings.rival.threads, runs)
    return runs


def run_rival(args: argparse.Namespace, work: Workload, folder: Path, threads: int, runs: Runs) -> None:
    """A short trial of every setting, then the whole workload with the best."""
    settings = rival_settings(args.cap_bytes, args.rival_shares, folder, threads, TRIAL_NEW_TOKENS)
    trial_work = replace(work, prompt_tokens=min(TRIAL_PROMPT_TOKENS, work.prompt_tokens))
    runs.rival_trials, best = run_rival_trials(settings, trial_work)
    if best:
        side = replace(best, new_tokens=args.rival_tokens)
        runs.rival = [run_side(side, work) for _ in range(args.repeats)]


def compare(
    args: argparse.Namespace,
    model: ModelBytes,
    ceilings: SideCeilings,
    copy: Copy | None,
    runs: Runs | None = None,
) -> Comparison:
    """Before the runs, the bytes a token of ours reads are computed; after them, they are what was resident."""
    ours = summarise(runs.ours) if runs else None
    stored_bytes = copy.stored_bytes if copy else model.total_bytes
    token_bytes = model.token_bytes(args.density, args.quantize)
    if ours and ours.decoding:
        token_bytes = ours.decoding["token_bytes"]
    return Comparison(
        ours=ours,
        rival=summarise(runs.rival) if runs else None,
        our_bounds=our_bounds(model, ceilings.ours, args.prompt_tokens, stored_bytes, token_bytes),
        rival_bounds=full_model_bounds(model, ceilings.rival, args.prompt_tokens, args.cap_bytes),
        disk_bytes_per_s=ceilings.ours.disk_bytes_per_s,
        new_tokens=args.new_tokens,
    )


def statement(args: argparse.Namespace, model: ModelBytes, bare: Comparison, ceilings: SideCeilings) -> str:
    """What is possible at best, before anything has run."""
    lines = [
        f"{model.name}: {model.total_bytes / 1e9:.1f} GB in {8 * model.value_bytes} bit, memory cap "
        f"{args.cap_bytes / 1e9:.2f} GB, our budget {args.budget_bytes / 1e9:.2f} GB. Ceilings:",
        "",
        f"- disk, cold and sequential: {bare.disk_bytes_per_s / 1e9:.2f} GB/s",
    ]
    sides = (
        (f"ours, --quantize {args.quantize}", ceilings.ours, bare.our_bounds),
        ("any full-weight method", ceilings.rival, bare.rival_bounds),
    )
    for name, ceiling, bound in sides:
        lines.append(
            f"- {name}: {ceiling.threads} threads, GEMV {ceiling.gemv_bytes_per_s / 1e9:.1f} GB/s, "
            f"GEMM {ceiling.gemm_flops_per_s / 1e9:.0f} Gflop/s; load + first token at best "
            f"{seconds(bound.load_and_prefill_s)}, then at best {seconds(bound.token_s)} per token"
        )
    return "\n".join(lines)


def decode_split(ours: Summary, model: ModelBytes, ceilings: SideCeilings) -> str:
    """Where the time of a token goes: bytes at the rates of their kernels, and what is left."""
    assert ours.decoding is not None
    head_s = model.outside_bytes / ceilings.rival.gemv_bytes_per_s
    layers_s = (ours.decoding["token_bytes"] - model.outside_bytes) / ceilings.ours.gemv_bytes_per_s
    return (
        f"- a token of ours, {seconds(ours.token_s)}: layers at the ceiling of their kernel {seconds(layers_s)}, the "
        f"16-bit head at its own {seconds(head_s)}, all the rest {seconds(ours.token_s - layers_s - head_s)}"
    )


def notes(comparison: Comparison, runs: Runs, copy: Copy | None, checks: dict[str, bool]) -> str:
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
    if copy:
        made = "" if copy.seconds is None else f", made in {seconds(copy.seconds)}, once"
        lines.append(f"- ours ran on a converted copy of {gigabytes(copy.stored_bytes)}{made}")
    lines += [f"- check: {name}: {passed}" for name, passed in checks.items()]
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


def result_name(args: argparse.Namespace, model: ModelBytes) -> str:
    """16 bit is the plain name; other precisions and caps would overwrite each other's results."""
    return model.name if args.quantize == "none" else f"{model.name}-{args.quantize}-{args.cap_bytes / 1e9:.1f}GB"


def main(arguments: Sequence[str]) -> int:
    args = parse_arguments(arguments)
    model = prepare_checkpoint(args)
    copy = converted_copy(args.dir, args.quantize) if args.convert else None
    threads = [args.threads] if args.threads else args.thread_choices
    tokens = (args.new_tokens, args.rival_tokens)
    ceilings = measure_ceilings(args.dir, model, threads, args.prompt_tokens, args.density, args.quantize, tokens)
    stated = statement(args, model, compare(args, model, ceilings, copy), ceilings)
    print(stated, end="\n\n", flush=True)

    runs = run_sides(args, ceilings, copy)
    comparison = compare(args, model, ceilings, copy, runs)
    checks = comparison.checks(args.cap_bytes)
    found = f"{table(comparison.rows())}\n\n{notes(comparison, runs, copy, checks)}"
    if comparison.ours and comparison.ours.decoding:
        found += "\n" + decode_split(comparison.ours, model, ceilings)
    print(found, end="\n\n")
    record = provenance("over_budget.py", arguments) | {
        "model": asdict(model),
        "cap_bytes": args.cap_bytes,
        "converted_copy": asdict(copy) | {"folder": copy.folder.name} if copy else None,
        "checks": checks,
        "ceilings": asdict(ceilings),
        "comparison": comparison.record(),
        "runs": {side: list(map(as_record, results)) for side, results in vars(runs).items()},
    }
    if args.out:
        write(
            args.out,
            f"over_budget-{result_name(args, model)}",
            "\n\n".join([origin_lines(record), stated, found]),
            record,
        )
    print(json.dumps(record))
    survived = all(result.figures for result in [*runs.ours, *runs.rival])
    return 0 if survived and all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
