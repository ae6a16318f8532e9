"""What the process of each side takes and prints: token ids in, one JSON line out, timed the same for all.

The clock and the process's own disk reads (/proc/self/io, threads included) are noted at each token. The standard
library alone, as every peer has an environment of its own. A failure is reported in its own words.
"""

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

Mark = tuple[float, int]
"""Seconds, and bytes read so far."""
Generate = Callable[[list[int], int, Callable[[], None]], list[int]]
"""Prompt ids, how many new tokens, what to call at each of them -> the new ids. Greedy, and no end of sequence."""
Loaded = tuple[Generate, dict[str, Any]]
"""How to generate, and what else there is to tell."""


def new_parser(**options: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(**options)
    parser.add_argument("--dir", type=Path, required=True, help="checkpoint, or the folder of a GGUF file")
    parser.add_argument("--prompt-ids", type=Path, required=True, help="JSON list of token ids")
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--file", help="GGUF file in --dir")
    parser.add_argument("--mapped", action="store_true", help="weights stay in the page cache, in the file's layout")
    parser.add_argument("--ram-share", type=int, default=0, help="bytes of weights that may stay in memory")
    parser.add_argument("--scratch", type=Path, help="where a side may write weights")
    return parser


def mark() -> Mark:
    """Bytes that this process made the disk deliver, threads included; hits of the page cache do not count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return time.perf_counter(), int(dict(line.split(": ") for line in lines)["read_bytes"])


def since_start_s() -> float:
    """Since this process began, with all that it imported."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def phase(start: Mark, end: Mark) -> dict[str, float]:
    return {"s": end[0] - start[0], "read_bytes": end[1] - start[1]}


def measure(args: argparse.Namespace, load: Callable[[argparse.Namespace], Loaded]) -> dict[str, Any]:
    ids = json.loads(args.prompt_ids.read_text())[: args.prompt_tokens]
    imports_s, before = since_start_s(), mark()
    generate, told = load(args)
    loaded, marks = mark(), list[Mark]()
    tokens = generate(ids, args.new_tokens, lambda: marks.append(mark()))
    if not len(tokens) == len(marks) == args.new_tokens:
        raise RuntimeError(f"asked for {args.new_tokens} tokens, got {len(tokens)} and {len(marks)} marks")
    return told | {
        "imports_s": imports_s,
        "load": phase(before, loaded),
        "prefill": phase(loaded, marks[0]),
        "decode": phase(marks[0], marks[-1]),
        "token_s": [later[0] - earlier[0] for earlier, later in pairwise(marks)],
        "tokens": tokens,
    }


def run(package: str, load: Callable[[argparse.Namespace], Loaded], args: argparse.Namespace | None = None) -> int:
    """Exit status; peers print what they like, so stdout is theirs on stderr until the figures are there."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = measure(args or new_parser().parse_args(), load) | {"package": f"{package} {version(package)}"}
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found))
    return 1 if "error" in found else 0
