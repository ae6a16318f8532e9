"""A cold `griffin-offload run` up to its first token, imports included, beside the disk and the processor.

    python benchmarks/cold_start.py --dir checkpoints/13b-int8 --cap 12GiB --prompt-tokens 128 512

Each run is a process of its own in a memory cgroup, with the page cache dropped and free memory at hand. At best, the
file is read once while the prompt is computed: the larger of the two times is the bound, both ceilings measured just
before each run. The prompt is real text; its tokenizer is the demo's, which is laid beside a checkpoint without one.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cgroup import memory_cgroup
from disk import checkpoint_files, drop_page_cache
from host_memory import memory_at_hand
from measured import measure_rates
from model_bytes import ModelBytes
from report import markdown_table, origin_lines, provenance, seconds, write
from sides import environment
from transformers import AutoTokenizer

from griffin_offload.demo import demo_directory
from griffin_offload.units import parse_size

TEXT = Path(__file__).parent.parent / "README.md"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="checkpoint, converted or not")
    parser.add_argument("--cap", required=True, help="memory of the cgroup")
    parser.add_argument("--overhead", default="0.5GB", help="of the cap, for the interpreter and its libraries")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--quantize", default="auto")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--as-found", action="store_true", help="a host may have to find memory first: let it")
    parser.add_argument("--out", type=Path, help="folder for the record")
    args = parser.parse_args(arguments)
    args.cap_bytes, args.overhead_bytes = parse_size(args.cap), parse_size(args.overhead)
    return args


@contextlib.contextmanager
def with_tokenizer(folder: Path) -> Iterator[Path]:
    """The checkpoint, its files linked, beside the demo's tokenizer where it has none."""
    if any(folder.glob("*token*")):
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        for path in (*folder.iterdir(), *demo_directory().glob("*token*")):
            (Path(scratch) / path.name).symlink_to(path.resolve())
        yield Path(scratch)


def prompt_of(folder: Path, tokens: int) -> str:
    """Text of about so many tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = TEXT.read_text()
    ids = tokenizer(text * (1 + tokens // len(text)))["input_ids"][:tokens]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def first_token(folder: Path, prompt: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds from the start of the process to its report behind the first token, and the report."""
    command = [sys.executable, "-m", "griffin_offload", "run", "--model", str(folder), "--device", "cpu"]
    command += ["--prompt-file", str(prompt), "--raw", "-n", "1", "--json", "--quantize", args.quantize]
    command += ["--max-gpu-mem", str(args.cap_bytes - args.overhead_bytes), "--density", str(args.density)]
    memory = contextlib.nullcontext() if args.as_found else memory_at_hand()
    with memory_cgroup(args.cap_bytes) as group, memory:
        if group is None:
            raise SystemExit("error: no memory cgroup can be made here")
        start = time.perf_counter()
        with subprocess.Popen(group.wrap(command), stdout=subprocess.PIPE, text=True, env=environment()) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            first_s = time.perf_counter() - start
        peak_bytes = group.peak_bytes()
    if process.returncode or not line:
        raise SystemExit(f"error: `run` ended with exit status {process.returncode}")
    return {"first_s": first_s, "peak_bytes": peak_bytes, "report": json.loads(line)}


def measure(args: argparse.Namespace, folder: Path, prompt: Path, tokens: int) -> dict[str, Any]:
    model, files = ModelBytes.of(args.dir), checkpoint_files(args.dir)
    stored_bytes = sum(path.stat().st_size for path in files)
    rates = measure_rates(args.dir, tokens, len(os.sched_getaffinity(0)))
    drop_page_cache(files)
    run = first_token(folder, prompt, args)
    read_s = stored_bytes / rates.read_bytes_per_s
    gemm_s = model.prefill_flops(run["report"]["prompt_tokens"]) / rates.gemm_flops_per_s
    ratio = run["first_s"] / max(read_s, gemm_s)
    return run | {"stored_bytes": stored_bytes, "read_s": read_s, "gemm_s": gemm_s, "ratio": ratio}


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [["prompt", "first token", "of that load, prompt", "read once", "products", "of the larger"]]
    for row in rows:
        report = row["report"]
        lines.append(
            [
                str(report["prompt_tokens"]),
                seconds(row["first_s"]),
                f"{seconds(report['load_s'])}, {seconds(report['prefill_s'])}",
                seconds(row["read_s"]),
                seconds(row["gemm_s"]),
                f"{row['ratio']:.2f}x",
            ]
        )
    return markdown_table(lines)


def main(arguments: Sequence[str]) -> int:
    args = parse_arguments(arguments)
    rows = []
    with with_tokenizer(args.dir) as folder, tempfile.TemporaryDirectory() as scratch:
        prompt = Path(scratch) / "prompt.txt"
        for tokens in args.prompt_tokens:
            prompt.write_text(prompt_of(folder, tokens))
            for _ in range(args.repeats):
                rows.append(measure(args, folder, prompt, tokens))
                print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    body = table(rows)
    record = provenance("cold_start.py", arguments) | {"rows": rows}
    print(body, end="\n\n")
    if args.out:
        write(args.out, f"cold_start-{args.dir.name}-{args.cap}", f"{origin_lines(record)}\n\n{body}", record)
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
