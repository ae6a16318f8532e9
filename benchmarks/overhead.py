"""What the runtime costs beside stock transformers on a model too small to hide it, and how long the command starts.

    python benchmarks/overhead.py --out results

Greedy generation of the demo by `GriffinModel.generate` and by the stock model in turns, so that a busy moment falls
on both; the hooks of the prompt's pass are gone while decoding. Starting: `griffin-offload run -n 1` as a process of
its own, up to its first output, imports included.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from report import markdown_table, origin_lines, provenance, write
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from griffin_offload import GriffinModel
from griffin_offload.demo import demo_directory


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=demo_directory(), help="checkpoint (default: the demo)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of both sides")
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for the record")
    return parser.parse_args(arguments)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(args: argparse.Namespace, density: float) -> dict[str, float]:
    """Medians of both, and of their ratio in each pair of runs."""
    ctx = args.prompt_tokens + args.new_tokens
    stock = AutoModelForCausalLM.from_pretrained(args.dir, dtype=getattr(torch, args.dtype))
    ids = torch.randint(stock.config.vocab_size, (1, args.prompt_tokens), generator=torch.Generator().manual_seed(0))
    length = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), **length}
    with GriffinModel.from_pretrained(
        args.dir,
        device="cpu",
        max_gpu_mem="1GB",
        density=density,
        quantize="none",
        dtype=args.dtype,
        threads=1,
        ctx_size=ctx,
        always_stream=True,
    ) as ours:
        pairs = []
        for _ in range(args.repeats + 1):
            pairs.append(
                (seconds(lambda: ours.generate(ids, **options)), seconds(lambda: stock.generate(ids, **options)))
            )
    pairs = pairs[1:]
    return {
        "density": density,
        "ours_s": statistics.median(pair[0] for pair in pairs),
        "stock_s": statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "least_ratio": min(a / b for a, b in pairs),
        "most_ratio": max(a / b for a, b in pairs),
    }


def start_s() -> float:
    command = [sys.executable, "-m", "griffin_offload", "run", "--device", "cpu", "-q", "-n", "1", "Once upon a time"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        return time.perf_counter() - start


def main(arguments: Sequence[str]) -> int:
    args = parse_arguments(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = [compare(args, density) for density in args.densities]
    starts = [start_s() for _ in range(args.starts)]
    lines = [["density", "ours", "stock generate", "ratio", "least - most"]]
    for row in rows:
        spread = f"{row['least_ratio']:.2f} - {row['most_ratio']:.2f}"
        own = [f"{row['ours_s']:.3f} s", f"{row['stock_s']:.3f} s", f"{row['ratio']:.2f}", spread]
        lines.append([f"{row['density']:g}", *own])
    body = "\n\n".join(
        [
            f"{args.prompt_tokens} + {args.new_tokens} tokens, {args.dtype}, one thread, {args.repeats} pairs of runs; "
            "the prompt's streamed pass is in ours.",
            markdown_table(lines),
            f"`griffin-offload run` to its first output, warm: median {statistics.median(starts):.1f} s "
            f"({min(starts):.1f} - {max(starts):.1f}) of {args.starts}.",
        ]
    )
    print(body, end="\n\n")
    record = provenance("overhead.py", arguments) | {"rows": rows, "starts_s": starts}
    if args.out:
        write(
            args.out,
            f"overhead-{'demo' if args.dir == demo_directory() else args.dir.name}",
            f"{origin_lines(record)}\n\n{body}",
            record,
        )
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
