"""Running one side of a comparison: cold, capped, in a process of its own."""

import json
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from capped_run import Outcome, drop_page_cache, run_capped
from host_memory import memory_at_hand

BENCHMARKS = Path(__file__).parent
Found = TypeVar("Found")


@dataclass(frozen=True)
class Workload:
    folder: Path
    prompt_ids: Path
    prompt_tokens: int
    cap_bytes: int
    timeout_s: float


@dataclass(frozen=True)
class Side:
    """What a worker is started with; `name` is how the report calls it, `program` takes the options of protocol.py."""

    name: str
    program: tuple[str, ...]
    threads: int
    new_tokens: int
    options: tuple[str, ...] = ()

    def command(self, work: Workload) -> list[str]:
        command = [*self.program, "--dir", str(work.folder), "--prompt-tokens", str(work.prompt_tokens)]
        command += ["--new-tokens", str(self.new_tokens), "--threads", str(self.threads), *self.options]
        return [*command, "--prompt-ids", str(work.prompt_ids)]


@dataclass
class Result:
    """`figures` is the worker's JSON line, None when it did not survive."""

    side: Side
    outcome: Outcome
    figures: dict[str, Any] | None

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
    drop_page_cache(checkpoint_files(work.folder))
    with memory_at_hand():
        print(f"running {side.name} ...", file=sys.stderr, flush=True)
        outcome = run_capped(side.command(work), work.cap_bytes, work.timeout_s, environment(side.threads))
    result = Result(side, outcome, json.loads(outcome.stdout.splitlines()[-1]) if outcome.returncode == 0 else None)
    if result.figures is None:
        print(f"{side.name}: {result.failure}", file=sys.stderr)
    return result


def checkpoint_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))


def environment(threads: int | None = None) -> dict[str, str]:
    """Threads must be known before torch starts; the package is found also when it is not installed."""
    paths = [str(BENCHMARKS.parent), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
    known = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    known |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return os.environ | known | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})


def in_own_process(work: Callable[..., Found], *arguments: Any) -> Found:
    """Memory and crashes stay there: the latter are a BrokenProcessPool."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()
