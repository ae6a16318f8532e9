"""What the runtime costs beside stock transformers on a model too small to hide it, and how long the command starts.

    python benchmarks/overhead.py --out results
    python benchmarks/overhead.py --dir CHECKPOINT --budget 12GB --threads 2 --repeats 3 --out results

Greedy generation by `GriffinModel.generate` and by the stock model in turns, so that a busy moment falls on both; the
hooks of the prompt's pass are gone while decoding. Per token: from the first token to the last. A lower density
should be faster than density 1 by the ratio of what a token reads: weights without the embedding. Starting:
`griffin-offload run -n 1` as a process of its own, up to its first output, imports included.
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
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from griffin_offload import GriffinModel
from griffin_offload.demo import demo_directory


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=demo_directory(), help="checkpoint (default: the demo)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of both sides")
    parser.add_argument("--budget", default="1GB", help="of our side")
    parser.add_argument("--threads", type=int, default=1, help="of both sides")
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for the record")
    return parser.parse_args(arguments)


class Clock(BaseStreamer):
    """Notes the time of the prompt and of every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def timed(generate: Callable[..., object], ids: torch.Tensor, options: dict[str, object]) -> tuple[float, float]:
    """Seconds of the whole answer, and of a token behind the first."""
    clock, start = Clock(), time.perf_counter()
    generate(ids, streamer=clock, **options)
    whole_s = time.perf_counter() - start
    return whole_s, (clock.times[-1] - clock.times[1]) / (len(clock.times) - 2)


def read_bytes(ours: GriffinModel) -> int:
    """Of weights for one token: all residents, but of an embedding of its own one row."""
    embedding, head = ours.model.get_input_embeddings(), ours.model.get_output_embeddings()
    return ours.resident_bytes - (embedding.weight.nbytes if head.weight is not embedding.weight else 0)


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
        max_gpu_mem=args.budget,
        density=density,
        quantize="none",
        dtype=args.dtype,
        threads=args.threads,
        ctx_size=ctx,
        always_stream=True,
    ) as ours:
        for generate in (ours.generate, stock.generate):
            timed(generate, ids, options)
        pairs = [(timed(ours.generate, ids, options), timed(stock.generate, ids, options)) for _ in range(args.repeats)]
        token_bytes = read_bytes(ours)
    ratios = [own[1] / other[1] for own, other in pairs]
    return {
        "density": density,
        "token_bytes": token_bytes,
        "ours_token_s": statistics.median(own[1] for own, _ in pairs),
        "stock_token_s": statistics.median(other[1] for _, other in pairs),
        "ratio": statistics.median(ratios),
        "least_ratio": min(ratios),
        "most_ratio": max(ratios),
        "whole_ratio": statistics.median(own[0] / other[0] for own, other in pairs),
    }


def table(rows: Sequence[dict[str, float]]) -> str:
    lines = [
        ["density", "read per token", "ours", "stock generate", "ratio", "least - most", "whole answer", "by bytes"]
    ]
    for row in rows:
        faster, fewer = rows[0]["ours_token_s"] / row["ours_token_s"], rows[0]["token_bytes"] / row["token_bytes"]
        lines.append(
            [
                f"{row['density']:g}",
                f"{row['token_bytes'] / 1e9:.4g} GB",
                f"{1e3 * row['ours_token_s']:.4g} ms",
                f"{1e3 * row['stock_token_s']:.4g} ms",
                f"{row['ratio']:.2f}",
                f"{row['least_ratio']:.2f} - {row['most_ratio']:.2f}",
                f"{row['whole_ratio']:.2f}",
                f"{faster:.2f}x faster, {fewer:.2f}x fewer bytes",
            ]
        )
    return markdown_table(lines)


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
    torch.set_num_threads(args.threads)
    rows = [compare(args, density) for density in args.densities]
    starts = [start_s() for _ in range(args.starts)]
    body = "\n\n".join(
        [
            f"{args.prompt_tokens} + {args.new_tokens} tokens, {args.dtype}, {args.threads} threads, {args.repeats} "
            "pairs of runs; the prompt's streamed pass is in our whole answer.",
            table(rows),
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
