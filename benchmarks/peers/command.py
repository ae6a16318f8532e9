"""Arguments and order of the comparison with peers."""

import argparse
import json
import math
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from make_checkpoint import make_checkpoint
from peers import bounds, contestants, copies, environments
from peers.bounds import ModelBytes
from peers.contestants import Settings
from peers.journal import Journal
from peers.page import Page
from shapes import SHAPES
from sides import Result, Workload, run_side
from transformers import AutoConfig

from griffin_offload.errors import UsageError
from griffin_offload.units import parse_size

DEFAULT_CAPS = (
    "12GiB=ours-int8,ours-int4,ours-exact,llama-q4_k_m,accelerate,mmap,airllm,ollm",
    "20GiB=ours-16bit,accelerate",
    "6GiB=ours-int4,llama-q4_k_m-mapped",
)
OVERHEAD_BYTES = 900_000_000  # of the cap, for our interpreter and libraries, and what large models hold beside budgets
RIVAL_SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6)  # of the cap: accelerate's trials
TRIAL_PROMPT_TOKENS, TRIAL_NEW_TOKENS = 16, 3


def parse_arguments(arguments: Sequence[str], description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benchmarks/peers", description=description)
    parser.add_argument("--dir", type=Path, required=True, help="Llama checkpoint in 16 bit; --shape makes it")
    parser.add_argument("--shape", choices=SHAPES, help="of a checkpoint to be made")
    parser.add_argument("--layers", type=int, help="override the number of layers")
    parser.add_argument("--envs", type=Path, required=True, help="folder of the peers' environments; made when absent")
    parser.add_argument("--out", type=Path, required=True, help="folder of the record, to be continued, and the page")
    parser.add_argument("--caps", nargs="+", default=DEFAULT_CAPS, help="CAP=SIDE,SIDE: cgroup and who runs in it")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--acceptance", type=float, help="simulated, of exact mode's drafts; real when not given")
    parser.add_argument("--draft-tokens", type=int, help="of exact mode; adapted when not given")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--prompt-ids", type=Path, help="JSON list of token ids; random ones when not given")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--slow-tokens", type=int, default=4, help="of sides that read all weights for every token")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one run")
    parser.add_argument("--again", nargs="*", default=[], help="sides, or ceilings, to measure again")
    args = parser.parse_args(arguments)
    try:
        args.runs = [(cap, side) for entry in args.caps for cap, side in parse_cap(entry)]
    except (ValueError, UsageError) as error:
        parser.error(str(error))
    if min(args.new_tokens, args.slow_tokens) < 2:
        parser.error("at least 2 new tokens: the first belongs to the prompt")
    return args


def parse_cap(entry: str) -> list[tuple[str, str]]:
    """'12GiB=mmap,ollm' -> [('12GiB', 'mmap'), ('12GiB', 'ollm')]"""
    cap, _, sides = entry.partition("=")
    parse_size(cap)
    unknown = [side for side in sides.split(",") if not contestants.is_known(side)]
    if unknown:
        known = ", ".join([*contestants.OURS, *contestants.FULL, "llama-TYPE", "llama-TYPE-mapped"])
        raise ValueError(f"--caps {entry}: {unknown[0]!r} is none of {known}")
    return [(cap, side) for side in sides.split(",")]


class Comparison:
    """Goes through the copies of the checkpoint, and with each through the sides that read it."""

    def __init__(self, args: argparse.Namespace, arguments: Sequence[str], scratch: Path) -> None:
        self.args, self.arguments, self.scratch = args, list(arguments), scratch
        self.model = ModelBytes.of(args.dir)
        for name in sorted({contestants.environment_of(side) for _, side in args.runs} - {None}):
            environments.build(args.envs, name)
        drafted = (args.acceptance, args.draft_tokens)
        split = copies.folder_of("split", args.dir)
        self.settings = Settings(args.threads, args.density, *drafted, args.envs, split)
        given = "random" if args.prompt_ids is None else args.prompt_ids.name
        shared = {"prompt": given, "memory": "at hand"}
        shared |= {name: getattr(args, name) for name in ("prompt_tokens", "threads", "density")}
        self.journal = Journal(args.out / f"peers-{args.dir.name}.json", asdict(self.model), shared)
        self.prompt_ids = args.prompt_ids or scratch / "prompt.json"
        if args.prompt_ids is None:
            vocabulary, drawn = AutoConfig.from_pretrained(args.dir).vocab_size, random.Random(0)
            self.prompt_ids.write_text(json.dumps([drawn.randrange(3, vocabulary) for _ in range(args.prompt_tokens)]))

    def measure_ceilings(self) -> None:
        if "ceilings" not in self.journal.content or "ceilings" in self.args.again:
            found = bounds.measure(self.args.dir, self.args.prompt_tokens, self.args.threads)
            self.journal.content["ceilings"] = found
            self.journal.save()

    def waiting(self) -> list[tuple[str, str]]:
        """Not yet in the record, in the order of the copies they need."""
        again = set(self.args.again)
        open_runs = [run for run in self.args.runs if " ".join(run) not in self.journal.runs or run[1] in again]
        return sorted(open_runs, key=lambda run: copies.order(contestants.copy_of(run[1])))

    def run_all(self) -> None:
        waiting = self.waiting()
        for copy in dict.fromkeys(contestants.copy_of(side) for _, side in waiting):
            made = copies.make(copy, self.args.dir, self.args.envs, self.args.threads)
            self.journal.add_copy(copy, made.stored_bytes, made.seconds)
            for cap, side in waiting:
                if contestants.copy_of(side) == copy:
                    self.run(cap, side, made.folder)

    def run(self, cap: str, key: str, folder: Path) -> None:
        cap_bytes = parse_size(cap)
        tokens = self.args.slow_tokens if contestants.reads_everything(key) else self.args.new_tokens
        work = Workload(folder, self.prompt_ids, self.args.prompt_tokens, cap_bytes, self.args.timeout)
        if key == "airllm":
            work = replace(work, folder=self.args.dir)
        settings = self.settings.within(cap_bytes, OVERHEAD_BYTES)
        trials: list[Result] = []
        if key == "accelerate":
            trials = list(self.accelerate_trials(settings, work))
            best = min(trials, key=lambda trial: trial.token_s)
            result = run_side(replace(best.side, new_tokens=tokens), work) if best.figures else best
        else:
            result = run_side(contestants.side(key, settings, tokens), work)
        self.journal.add_run(f"{cap} {key}", contestants.copy_of(key), result, trials, self.arguments)

    def accelerate_trials(self, settings: Settings, work: Workload) -> Iterator[Result]:
        """Short ones: shares of the cap in RAM, mapped and copied, the largest first, on while that makes it faster."""
        short = replace(work, prompt_tokens=min(TRIAL_PROMPT_TOKENS, work.prompt_tokens))
        for copied in (False, True):
            best_s = math.inf
            for share in RIVAL_SHARES:
                side = contestants.accelerate(share, copied, settings, TRIAL_NEW_TOKENS, self.scratch / "offload")
                result = run_side(side, short)
                yield result
                if result.token_s > best_s:
                    break
                best_s = result.token_s


def main(arguments: Sequence[str], description: str) -> int:
    args = parse_arguments(arguments, description)
    if not args.dir.exists():
        if args.shape is None:  # a mistyped folder must not cost 26 GB
            raise SystemExit(f"error: {args.dir} is not there: --shape says what to make")
        make_checkpoint(args.dir, args.shape, args.layers)
    with tempfile.TemporaryDirectory() as scratch:
        comparison = Comparison(args, arguments, Path(scratch))
        comparison.measure_ceilings()
        comparison.run_all()
    journal = comparison.journal
    text = Page(journal.content).text()
    journal.path.with_suffix(".md").write_text(text + "\n")
    print(text, end="\n\n")
    print(json.dumps(journal.content))
    return 0 if all(run["figures"] for run in journal.runs.values()) else 1
