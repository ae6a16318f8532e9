"""Several answers at once: tokens per second of all of them together, beside one answer after the other.

    python benchmarks/parallel.py --dir MODEL --quantize int4 --density 0.5 --together 4,8 --out OUT

Rounds go in turn, in one process: as many prompts by `generate`, one after the other, and by `generate_many`. Each has
as many tokens as the others, so that all leave at once; prompts are passed within the time. Beside the clock stands the
processor's time of all threads, which other processes disturb less. The ceiling is as many times faster as there are
sequences: that of a memory-bound device, whose weights are read once for all. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from report import markdown_table, origin_lines, provenance, write

from griffin_offload import GriffinModel


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--together", default="1,4,8", help="sequences at once, a round for each")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--quantize", default="auto")
    parser.add_argument("--max-mem", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="folder for the record")
    return parser.parse_args(arguments)


def rounds(model: GriffinModel, options: argparse.Namespace) -> dict[str, Callable[[], int]]:
    """What is measured, by name; each gives the tokens that it generated."""
    counts = [int(part) for part in options.together.split(",")]
    fixed: dict[str, Any] = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False}
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, model.vocab_size, (max(counts), 1, options.prompt_tokens), generator=random)

    def alone() -> int:
        return sum(model.generate(prompt, **fixed).shape[1] - options.prompt_tokens for prompt in prompts[:2])

    def together(count: int) -> Callable[[], int]:
        return lambda: sum(
            len(answer.tokens) for answer in model.generate_many(iter(prompts[:count]), most=count, **fixed)
        )

    return {"one after the other": alone, **{f"{count} together": together(count) for count in counts}}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    settings: dict[str, Any] = {"device": "cpu", "density": options.density, "quantize": options.quantize}
    settings |= {"ctx_size": options.prompt_tokens + options.tokens, "threads": options.threads}
    with GriffinModel.from_pretrained(options.dir, max_gpu_mem=options.max_mem, **settings) as model:
        kinds = rounds(model, options)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for repeat in range(options.repeats + 1):
            for name, run in kinds.items():
                clock, processor = time.perf_counter(), time.process_time()
                tokens = run()
                if repeat:  # the first round is a warm-up
                    taken = (time.perf_counter() - clock, time.process_time() - processor)
                    seconds[name].append((taken[0] / tokens, taken[1] / tokens))
        return {"model": str(options.dir.name), "precision": model.plan.precision, "rounds": figures(seconds)}


def figures(seconds: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Medians, and how many times as fast as the first kind: by the round, since the machine differs between them."""
    first = next(iter(seconds.values()))
    found = {}
    for name, taken in seconds.items():
        ratios = [[other[i] / own[i] for own, other in zip(taken, first, strict=True)] for i in (0, 1)]
        found[name] = {
            "tokens_per_s": 1 / statistics.median(wall for wall, _ in taken),
            "processor_ms_per_token": 1e3 * statistics.median(processor for _, processor in taken),
            "times_as_fast": statistics.median(ratios[0]),
            "spread": [min(ratios[0]), max(ratios[0])],
            "times_as_fast_by_processor_time": statistics.median(ratios[1]),
        }
    return found


def table(found: dict[str, Any]) -> str:
    head = ["", "tokens/s, all", "times as fast (least, most)", "processor time a token", "by processor time"]
    rows = [
        [
            name,
            f"{one['tokens_per_s']:.1f}",
            f"{one['times_as_fast']:.2f} ({one['spread'][0]:.2f}, {one['spread'][1]:.2f})",
            f"{one['processor_ms_per_token']:.1f} ms",
            f"{one['times_as_fast_by_processor_time']:.2f}",
        ]
        for name, one in found["rounds"].items()
    ]
    return markdown_table([head, *rows])


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    found = measure(options)
    record = provenance("parallel.py", arguments) | found
    print(table(found))
    if options.out is not None:
        name = f"parallel-{found['model']}-{found['precision']}-{options.density:g}"
        write(
            options.out,
            name,
            f"# Several answers at once: {name}\n\n{origin_lines(record)}\n\n{table(found)}\n",
            record,
        )
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
