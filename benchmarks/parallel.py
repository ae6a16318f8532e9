"""Several answers at once: tokens per second of all of them together, beside one answer after the other.

    python benchmarks/parallel.py --dir MODEL --quantize int4 --density 0.5 --together 4,8 --out OUT
    python benchmarks/parallel.py --dtype float32 --quantize none --density 1 --together 1 --stock     # the demo

Rounds go in turn, in one process: as many prompts by `generate`, one after the other, and by `generate_many`. Each has
as many tokens as the others, so that all leave at once; prompts are passed within the time. Beside the clock stands the
processor's time of all threads, which other processes disturb less. The ceiling is as many times faster as there are
sequences: that of a memory-bound device, whose weights are read once for all. `--stock` adds transformers' own
`generate` of the same checkpoint, which is what the runtime costs or saves on a model that fits in memory.

`--beside` is the command of peers/worker_llama.py, which answers as many prompts at once in a round of its own:

    --threads 2 --beside "ENV/bin/python -m peers.worker_llama together FILE.gguf --slots 4"

FILE.gguf is MODEL by peers/gguf_file.py. Or it is that of peers/worker_build.py: another build of ours.
"""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from report import markdown_table, provenance, publish
from transformers import AutoModelForCausalLM

from griffin_offload import GriffinModel
from griffin_offload.demo import demo_directory


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=demo_directory(), help="checkpoint (default: the demo)")
    parser.add_argument("--together", default="1,4,8", help="sequences at once, a round for each")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--quantize", default="auto")
    parser.add_argument("--dtype", default="auto", help="of plain tensors, and of the stock model")
    parser.add_argument("--max-mem", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--beside", help="command of a peer that answers in turn with ours")
    parser.add_argument("--stock", action="store_true", help="the same checkpoint by stock transformers, in turns, too")
    parser.add_argument("--out", type=Path, help="folder for the record")
    return parser.parse_args(arguments)


Taken = tuple[int, float, float]
"""Tokens, seconds of the clock, and of the processors."""


def timed(generate: Callable[[], int]) -> Callable[[], Taken]:
    def run() -> Taken:
        clock, processor = time.perf_counter(), time.process_time()
        tokens = generate()
        return tokens, time.perf_counter() - clock, time.process_time() - processor

    return run


@contextlib.contextmanager
def peer(options: argparse.Namespace) -> Iterator[dict[str, Callable[[], Taken]]]:
    """Rounds of the peer, if there is one."""
    if options.beside is None:
        yield {}
        return
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(shlex.split(options.beside), **pipes) as process:
        asking, answers = process.stdin, process.stdout
        assert asking is not None and answers is not None  # noqa: PT018
        print(answers.readline().strip(), file=sys.stderr, flush=True)

        def round_of(count: int) -> Callable[[], Taken]:
            def run() -> Taken:
                asking.write(f"{count} {options.prompt_tokens} {options.tokens}\n")
                asking.flush()
                found = json.loads(answers.readline())
                return found["tokens"], found["seconds"], found["processor_s"]

            return run

        yield {f"the peer, {count} together": round_of(count) for count in map(int, options.together.split(","))}
        asking.close()


def rounds(model: GriffinModel, options: argparse.Namespace) -> dict[str, Callable[[], Taken]]:
    """What is measured, by name."""
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

    found = {"one after the other": alone, **{f"{count} together": together(count) for count in counts}}
    if options.stock:
        stock = AutoModelForCausalLM.from_pretrained(options.dir, dtype=options.dtype)
        masked = fixed | {"attention_mask": torch.ones_like(prompts[0])}
        found["stock transformers"] = lambda: sum(
            stock.generate(prompt, **masked).shape[1] - options.prompt_tokens for prompt in prompts[:2]
        )
    return {name: timed(generate) for name, generate in found.items()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    settings: dict[str, Any] = {"device": "cpu", "density": options.density, "quantize": options.quantize}
    # Prompts that wait together pass together, where layers stream as far as one prompt may be long.
    together = options.prompt_tokens * max(map(int, options.together.split(",")))
    settings |= {"ctx_size": together + options.tokens, "threads": options.threads, "dtype": options.dtype}
    loading = GriffinModel.from_pretrained(options.dir, max_gpu_mem=options.max_mem, **settings)
    with loading as model, peer(options) as theirs:
        kinds = rounds(model, options) | theirs
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for repeat in range(options.repeats + 1):
            for name, run in kinds.items():
                tokens, wall, processor = run()
                if repeat:  # the first round is a warm-up
                    seconds[name].append((wall / tokens, processor / tokens))
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
    name = f"parallel-{found['model']}-{found['precision']}-{options.density:g}"
    publish(options.out, name, f"Several answers at once: {name}", table(found), record)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
