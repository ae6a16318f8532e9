"""What a peer's process takes and prints, the same as `worker.py`'s: token ids in, one JSON line out.

The standard library alone, as every peer has an environment of its own. A failure is reported in its own words.
"""

import argparse
import contextlib
import json
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from instrument import figures, mark

Generate = Callable[[list[int], int, Callable[[], None]], list[int]]
"""Prompt ids, how many new tokens, what to call at each of them -> the new ids. Greedy, and no end of sequence."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True, help="checkpoint, or the folder of a GGUF file")
    parser.add_argument("--prompt-ids", type=Path, required=True, help="JSON list of token ids")
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--file", help="GGUF file in --dir")
    parser.add_argument("--mapped", action="store_true", help="weights stay in the page cache, in the file's layout")
    parser.add_argument("--ram-share", type=int, default=0, help="bytes of weights that may stay in memory")
    parser.add_argument("--scratch", type=Path, help="where a peer may write its own copy of the weights")
    return parser.parse_args()


def measure(args: argparse.Namespace, load: Callable[[argparse.Namespace], Generate]) -> dict[str, Any]:
    ids = json.loads(args.prompt_ids.read_text())[: args.prompt_tokens]
    marks = []
    before = mark()
    generate = load(args)
    loaded = mark()
    tokens = generate(ids, args.new_tokens, lambda: marks.append(mark()))
    return figures(before, loaded, marks, tokens)


def run(package: str, load: Callable[[argparse.Namespace], Generate]) -> int:
    """Exit status; peers print what they like, so stdout is theirs on stderr until the figures are there."""
    args = parse_arguments()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = measure(args, load) | {"package": f"{package} {version(package)}"}
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found))
    return 1 if "error" in found else 0
