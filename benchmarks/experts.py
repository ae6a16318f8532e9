"""A mixture of experts in less memory than it has weights: does it stay inside, and how fast is it.

A random checkpoint of gpt-oss' shape, its routers skewed by their biases (make_checkpoint.py), is run in a process of
its own inside a memory cgroup of `--share` of its bytes, page cache counted and cold. The ceilings beside each figure
are the bytes that were read over the disk's own rate, measured in the same minute.

    python benchmarks/experts.py DIR [--shape gpt-oss-half] [--share 0.45] [--quantize int4] [--tokens 64]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from capped_run import run_capped
from make_checkpoint import MIXTURES, ROUTER_SKEW, make_checkpoint

# What a process takes beside its budget: docs/memory.md.
BESIDE_BYTES = 500_000_000
PROMPT_TOKENS = 64
READ_BYTES = 2**30


def worker(arguments: argparse.Namespace) -> int:
    """Load, answer two prompts, say what it took."""
    import torch

    from griffin_offload import GriffinModel

    begin = time.perf_counter()
    options: dict[str, Any] = {"ctx_size": PROMPT_TOKENS + arguments.tokens, "quantize": arguments.quantize}
    prompts = torch.randint(5, 400, (2, 1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    with GriffinModel.from_pretrained(arguments.dir, device="cpu", max_gpu_mem=arguments.budget, **options) as model:
        loaded_s, rows = time.perf_counter() - begin, []
        for prompt in prompts:
            model.generate(prompt, max_new_tokens=arguments.tokens, min_new_tokens=arguments.tokens, do_sample=False)
            rows.append(_row(model.last_report.to_json()))
        plan = model.plan
        print(
            json.dumps(
                {
                    "loaded_s": loaded_s,
                    "experts": plan.experts,
                    "expert_slots": plan.expert_slots,
                    "precision": plan.precision,
                    "budget_bytes": plan.budget_bytes,
                    "planned_peak_bytes": plan.peak_bytes,
                    "prompts": rows,
                }
            )
        )
    return 0


def _row(report: dict[str, Any]) -> dict[str, Any]:
    wanted = (
        "prefill_s",
        "decode_s",
        "prefill_streamed_bytes",
        "decode_streamed_bytes",
        "peak_device_bytes",
        "experts",
    )
    return {name: report[name] for name in wanted if name in report} | {
        name: report[name] for name in report if name.endswith("tokens_per_s")
    }


def read_rate(path: Path) -> float:
    """Bytes/s of the disk, past the page cache, by four readers, of 2 MiB each."""
    from concurrent.futures import ThreadPoolExecutor

    size, piece = min(path.stat().st_size // 2**21 * 2**21, READ_BYTES), 2**21
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:

        def read(offset: int) -> int:
            import mmap

            with mmap.mmap(-1, piece) as buffer:
                return os.preadv(descriptor, [buffer], offset)

        begin = time.perf_counter()
        with ThreadPoolExecutor(4) as pool:
            done = sum(pool.map(read, range(0, size, piece)))
        return done / (time.perf_counter() - begin)
    finally:
        os.close(descriptor)


def measure(arguments: argparse.Namespace) -> int:
    """Make what is missing, run the worker inside the cgroup, and print one JSON object."""
    source = arguments.dir / arguments.shape
    if not source.exists():
        make_checkpoint(source, arguments.shape)
    model = source
    if arguments.convert:
        model = arguments.dir / f"{arguments.shape}-{arguments.convert}"
        if not model.exists():
            command = [
                "griffin-offload",
                "convert",
                str(model),
                "-m",
                str(source),
                "--quantize",
                arguments.convert,
                "-q",
            ]
            subprocess.run([sys.executable, "-m", "griffin_offload", *command[1:]], check=True)
    files = sorted(model.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    limit = int(size * arguments.share)
    budget = limit - BESIDE_BYTES
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, str(model), "--worker", "--budget", str(budget)]
    command += ["--tokens", str(arguments.tokens), "--quantize", arguments.quantize]
    outcome = run_capped(command, limit, arguments.timeout)
    found = json.loads(outcome.stdout.splitlines()[-1]) if outcome.returncode == 0 else None
    rate = read_rate(files[0])
    for row in found["prompts"] if found else ():
        row["decode_ceiling_tokens_per_s"] = arguments.tokens * rate / max(row["decode_streamed_bytes"], 1)
        row["prefill_ceiling_s"] = row["prefill_streamed_bytes"] / rate
    print(
        json.dumps(
            {
                "shape": arguments.shape,
                "skew": ROUTER_SKEW,
                "model_bytes": size,
                "limit_bytes": outcome.limit_bytes,
                "cgroup_peak_bytes": outcome.cgroup_peak_bytes,
                "rss_anon_peak_bytes": outcome.rss_anon_peak_bytes,
                "oom_kills": outcome.oom_kills,
                "returncode": outcome.returncode,
                "disk_bytes_per_s": rate,
                "worker": found,
            },
            indent=2,
        )
    )
    return 0 if found and not outcome.oom_kills else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path, help="where checkpoints are, or are made")
    parser.add_argument("--shape", choices=MIXTURES, default="gpt-oss-half")
    parser.add_argument("--share", type=float, default=0.45, help="of the model's bytes, the cgroup's limit")
    parser.add_argument("--convert", choices=("none", "int8", "int4"), help="run a converted copy")
    parser.add_argument("--quantize", default="auto")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=1800)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    return worker(arguments) if arguments.worker else measure(arguments)


if __name__ == "__main__":
    sys.exit(main())
