"""Running the two sides: cold, capped, one after the other, and choosing the rival's best setting."""

import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from capped_run import Outcome, run_capped
from disk import checkpoint_files, drop_page_cache
from host_memory import memory_at_hand

BENCHMARKS = Path(__file__).parent
Found = TypeVar("Found")
RIVAL_SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6)  # of the cap, descending


@dataclass(frozen=True)
class Workload:
    folder: Path
    prompt_tokens: int
    cap_bytes: int | None
    timeout_s: float
    prompt_ids: Path | None = None


@dataclass(frozen=True)
class Side:
    """What a worker is started with; `name` is how the report calls it. A `program` of its own takes the same options
    as `worker.py` and prints the same line."""

    name: str
    worker: str
    threads: int
    new_tokens: int
    options: tuple[str, ...] = ()
    program: tuple[str, ...] = ()

    def command(self, work: Workload) -> list[str]:
        program = self.program or (sys.executable, str(BENCHMARKS / "worker.py"), self.worker)
        command = [*program, "--dir", str(work.folder), "--prompt-tokens", str(work.prompt_tokens)]
        command += ["--new-tokens", str(self.new_tokens), "--threads", str(self.threads), *self.options]
        return command + (["--prompt-ids", str(work.prompt_ids)] if work.prompt_ids else [])


@dataclass
class Result:
    """`figures` is the worker's JSON line, None when it did not survive."""

    side: Side
    outcome: Outcome
    figures: dict[str, Any] | None
    cached_before_bytes: int

    @property
    def failure(self) -> str:
        if self.outcome.oom_kills:
            return "killed by the memory cap"
        return "timed out" if self.outcome.timed_out else self.error or f"exit status {self.outcome.returncode}"

    @property
    def error(self) -> str | None:
        """In the words of a worker that could still say so."""
        try:
            return str(json.loads(self.outcome.stdout.splitlines()[-1])["error"])
        except (ValueError, LookupError, TypeError):
            return None

    @property
    def token_s(self) -> float:
        return statistics.median(self.figures["token_s"]) if self.figures else float("inf")


def run_side(side: Side, work: Workload) -> Result:
    """One cold run in a process of its own."""
    cached_bytes = drop_page_cache(checkpoint_files(work.folder))
    with memory_at_hand():
        print(f"running {side.name} ...", file=sys.stderr, flush=True)
        outcome = run_capped(side.command(work), work.cap_bytes, work.timeout_s, environment(side.threads))
    figures = json.loads(outcome.stdout.splitlines()[-1]) if outcome.returncode == 0 else None
    result = Result(side, outcome, figures, cached_bytes)
    if figures is None:
        print(f"{side.name}: {result.failure}", file=sys.stderr)
    return result


def environment(threads: int | None = None) -> dict[str, str]:
    """Threads must be known before torch starts; the package is found also when it is not installed."""
    paths = [str(BENCHMARKS.parent), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
    known = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return (
        os.environ
        | known
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
    )


def in_own_process(work: Callable[..., Found], *arguments: Any) -> Found:
    """Memory and crashes stay there: the latter are a BrokenProcessPool."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def rival_settings(
    cap_bytes: int, shares: Sequence[float], offload_folder: Path, threads: int, new_tokens: int
) -> Iterator[Side]:
    """Ways to run the full model under the cap with stock tools, plainest first; of each the largest share first."""
    folder = ("--offload-folder", str(offload_folder))
    yield Side("transformers, mapped", "mmap", threads, new_tokens)
    for share in sorted(shares, reverse=True):
        ram = ("--ram-share", str(int(share * cap_bytes)))
        for name, extra in (("", ()), (", share copied", ("--copy-share",))):
            title = f"accelerate, {share:.0%} of the cap in RAM{name}"
            yield Side(title, "accelerate", threads, new_tokens, ram + folder + extra)


def run_rival_trials(settings: Iterable[Side], work: Workload) -> tuple[list[Result], Side | None]:
    """Try each; a family's share goes down until one survives, and on while that makes it faster. The fastest per
    token wins."""
    results: list[Result] = []
    best_s: dict[tuple[str, bool], float] = {}
    done: set[tuple[str, bool]] = set()
    for side in settings:
        family = (side.worker, "--copy-share" in side.options)
        if family in done:
            continue
        results.append(run_side(side, work))
        if results[-1].figures:
            token_s, before_s = results[-1].token_s, best_s.get(family, float("inf"))
            best_s[family] = min(token_s, before_s)
            if token_s > before_s:
                done.add(family)
    best = min(results, key=lambda result: result.token_s)
    return results, best.side if best.figures else None
