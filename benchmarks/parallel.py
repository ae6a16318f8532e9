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
from typing import Any, NamedTuple

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


class Taken(NamedTuple):
    """By a round."""

    tokens: int
    seconds: float
    processor_s: float
    rates: list[float]
    """Of each answer, tokens a second behind its first one; none where that is not known."""


Answers = tuple[int, list[float]]
"""Tokens of all, and the rate of each."""


def timed(generate: Callable[[], Answers]) -> Callable[[], Taken]:
    def run() -> Taken:
        clock, processor = time.perf_counter(), time.process_time()
        tokens, rates = generate()
        return Taken(tokens, time.perf_counter() - clock, time.process_time() - processor, rates)

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
                return Taken(found["tokens"], found["seconds"], found["processor_s"], found.get("rates", []))

            return run

        yield {f"the peer, {count} together": round_of(count) for count in map(int, options.together.split(","))}
        asking.close()


def rounds(model: GriffinModel, options: argparse.Namespace) -> dict[str, Callable[[], Taken]]:
    """What is measured, by name."""
    counts = [int(part) for part in options.together.split(",")]
    # Without an end of answers all have their tokens; asking for a least number would cost 2.4 ms a step of four.
    model.generation_config.eos_token_id = None
    fixed: dict[str, Any] = {"max_new_tokens": options.tokens, "do_sample": False}
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, model.vocab_size, (max(counts), 1, options.prompt_tokens), generator=random)

    def alone() -> Answers:
        tokens, rates = 0, []
        for prompt in prompts[:2]:
            tokens += model.generate(prompt, **fixed).shape[1] - options.prompt_tokens
            rates.append(model.last_report.decode_tokens_per_s)
        return tokens, rates

    def together(count: int) -> Callable[[], Answers]:
        def answer() -> Answers:
            found = list(model.generate_many(iter(prompts[:count]), most=count, **fixed))
            return sum(len(one.tokens) for one in found), [one.report.decode_tokens_per_s for one in found]

        return answer

    found = {"one after the other": alone, **{f"{count} together": together(count) for count in counts}}
    if options.stock:
        stock = AutoModelForCausalLM.from_pretrained(options.dir, dtype=options.dtype)
        stock.generation_config.eos_token_id = None
        masked = fixed | {"attention_mask": torch.ones_like(prompts[0])}
        found["stock transformers"] = lambda: (
            sum(stock.generate(prompt, **masked).shape[1] - options.prompt_tokens for prompt in prompts[:2]),
            [],
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
        taken: dict[str, list[Taken]] = {name: [] for name in kinds}
        for repeat in range(options.repeats + 1):
            for name, run in kinds.items():
                found = run()
                if repeat:  # the first round is a warm-up
                    taken[name].append(found)
        return {"model": str(options.dir.name), "precision": model.plan.precision, "rounds": figures(taken)}


def figures(taken: dict[str, list[Taken]]) -> dict[str, Any]:
    """Medians, and how many times as fast as the first kind: by the round, since the machine differs between them."""
    first, found = next(iter(taken.values())), {}
    for name, own in taken.items():
        seconds = [one.seconds / one.tokens for one in own]
        processor_s = [one.processor_s / one.tokens for one in own]
        by_clock = [other.seconds / other.tokens / mine for mine, other in zip(seconds, first, strict=True)]
        by_processor = [other.processor_s / other.tokens / mine for mine, other in zip(processor_s, first, strict=True)]
        rates = [rate for one in own for rate in one.rates]
        found[name] = {
            "tokens_per_s": 1 / statistics.median(seconds),
            "ms_per_further_token": 1e3 / statistics.median(rates) if rates else None,
            "processor_ms_per_token": 1e3 * statistics.median(processor_s),
            "times_as_fast": statistics.median(by_clock),
            "spread": [min(by_clock), max(by_clock)],
            "times_as_fast_by_processor_time": statistics.median(by_processor),
        }
    return found


def table(found: dict[str, Any]) -> str:
    head = ["", "tokens/s, all", "times as fast (least, most)", "a further token of an answer"]
    head += ["processor time a token", "by processor time"]
    rows = [
        [
            name,
            f"{one['tokens_per_s']:.1f}",
            f"{one['times_as_fast']:.2f} ({one['spread'][0]:.2f}, {one['spread'][1]:.2f})",
            f"{one['ms_per_further_token']:.1f} ms" if one["ms_per_further_token"] else "",
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
