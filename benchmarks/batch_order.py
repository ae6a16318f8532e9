"""`batch` in the order of tokens and in the file's: chats that share system prompts, one after another in turn.

    python benchmarks/batch_order.py                      # the demo
    python benchmarks/batch_order.py -m MODEL --lines 60

Both orders run --repeats times, in turn, on one loaded model each. Processor time of the whole process, as the machine
may do other things. The least possible share of computed prompt tokens is said, too. Ends in JSON.
"""

import argparse
import itertools
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from griffin_offload.checkpoint.registry import open_checkpoint
from griffin_offload.config import ServeConfig
from griffin_offload.demo import demo_directory
from griffin_offload.serving.api_errors import ApiError
from griffin_offload.serving.batch import Answers, Batch, Line, Work, longest, prepare
from griffin_offload.serving.queue import Figures
from griffin_offload.serving.requests import ENDPOINTS
from griffin_offload.serving.tokenization import Encoder

NAME = "measured"
WORDS = (
    "the",
    "small",
    "dog",
    "ran",
    "to",
    "a",
    "big",
    "tree",
    "found",
    "red",
    "ball",
    "near",
    "water",
    "birds",
    "sang",
)


class Kept(Answers):
    """Answers, thrown away but counted."""

    def __init__(self) -> None:
        self.answered: set[str] = set()

    def add(self, custom_id: str, status: int, body: dict[str, Any]) -> None:
        assert status == 200, body
        self.answered.add(custom_id)

    def refuse(self, line: Line, failure: ApiError) -> None:
        raise failure


def drawn(lines: int, systems: int, system_words: int) -> list[Line]:
    rng = random.Random(0)

    def text(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words))

    fronts = [text(system_words) for _ in range(systems)]
    found = []
    for number in range(lines):
        prompt = f"{fronts[number % systems]}\n{text(rng.randint(5, 15))}"
        body = {"model": NAME, "prompt": prompt, "max_tokens": 16, "temperature": 0}
        found.append(Line(f"r{number}", ENDPOINTS["/v1/completions"], body))
    return found


def measured(works: list[Work], lines: int, directory: Path, options: dict[str, Any]) -> dict[str, float]:
    took: list[Figures] = []
    with Batch(directory, options, NAME, ServeConfig()) as batch:
        kept, wall, processor = Kept(), time.monotonic(), time.process_time()
        batch.run(works, kept, took.append)
        wall, processor = time.monotonic() - wall, time.process_time() - processor
    assert len(kept.answered) == lines
    prompt = sum(figures.prompt_tokens for figures in took)
    reused = sum(figures.cached_tokens for figures in took)
    return {"processor_s": processor, "wall_s": wall, "computed_prompt_share": 1 - reused / prompt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, default=demo_directory())
    parser.add_argument("--lines", type=int, default=64)
    parser.add_argument("--systems", type=int, default=8)
    parser.add_argument("--system-words", type=int, default=200)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    encoder = Encoder(checkpoint.tokenizer(), checkpoint.config.get_text_config().vocab_size)
    lines = drawn(args.lines, args.systems, args.system_words)
    ordered, _ = prepare(lines, encoder, NAME, ServeConfig())
    encoder.close()
    in_file = sorted(ordered, key=lambda work: lines.index(work.line))
    prompt, context = longest(ordered)
    options = {"device": "cpu", "density": args.density, "max_gpu_mem": "2GB"}
    options |= {"ctx_size": context, "prompt_tokens": prompt}
    runs: dict[str, list[dict[str, float]]] = {"by tokens": [], "as in the file": []}
    for _ in range(args.repeats):
        for name, works in (("by tokens", ordered), ("as in the file", in_file)):
            runs[name].append(measured(works, args.lines, args.model, options))
            print(name, json.dumps(runs[name][-1]), flush=True)
    every = [work.prompts[0] for work in ordered]
    shared = sum(common(one, other) for one, other in itertools.pairwise(every))
    found: dict[str, Any] = {
        name: {key: statistics.median(run[key] for run in made) for key in made[0]} for name, made in runs.items()
    }
    found["least_computed_prompt_share"] = 1 - shared / sum(map(len, every))
    found["processor_time_ratio"] = found["as in the file"]["processor_s"] / found["by tokens"]["processor_s"]
    print(json.dumps(found, indent=2))


def common(one: list[int], other: list[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


if __name__ == "__main__":
    main()
