"""A mixture of experts in less memory than it has weights: does it stay inside, and how fast is it.

A random checkpoint of gpt-oss' shape, its routers skewed by their biases (make_checkpoint.py), is run in a process of
its own inside a memory cgroup of `--share` of its bytes, page cache counted and cold. The ceilings beside each figure
are the bytes that were read over the disk's own rate, measured in the same minute.

    python benchmarks/experts.py DIR [--shape gpt-oss-half] [--share 0.45] [--quantize int4] [--tokens 64]

With `--gguf` the model is a file of peers/gguf_mixture.py in place of the checkpoint, and `--beside ENV/bin/python`
runs llama.cpp (peers/worker_llama_mixture.py) on that file first, in a cgroup of the same size. Embeddings and head are
in 8 bits in that file, and in a converted copy of it.
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
from make_checkpoint import make_checkpoint
from mixtures import MIXTURES, ROUTER_SKEW
from report import gigabytes, markdown_table, origin_lines, provenance, write

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
    with GriffinModel.from_pretrained(arguments.dir, device="cpu", max_gpu_mem=arguments.budget, **options) as model:
        loaded_s, rows = time.perf_counter() - begin, []
        for ids in prompts():
            prompt = torch.tensor([ids])
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


def model_of(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """The original and what is run, its converted copy or itself; what is missing is made."""
    source = arguments.gguf or arguments.dir / arguments.shape
    if not source.exists():
        make_checkpoint(source, arguments.shape)
    if not arguments.convert:
        return source, source
    copy = arguments.dir / f"{source.stem}-{arguments.convert}"
    if not copy.exists():
        options = ["-m", str(source), "--quantize", arguments.convert, "-q"]
        options += ["--embeddings", "int8"] if arguments.gguf else []
        subprocess.run([sys.executable, "-m", "griffin_offload", "convert", str(copy), *options], check=True)
    return source, copy


def files_of(model: Path) -> list[Path]:
    return [model] if model.is_file() else sorted(model.glob("*.safetensors"))


def run_cold(model: Path, command: list[str], limit: int, timeout: float) -> dict[str, Any]:
    """Nothing of the model's files is in the page cache when it starts."""
    for path in files_of(model):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    outcome = run_capped(command, limit, timeout, os.environ | {"PYTHONPATH": str(Path(__file__).parent)})
    return {
        "model_bytes": sum(path.stat().st_size for path in files_of(model)),
        "limit_bytes": outcome.limit_bytes,
        "cgroup_peak_bytes": outcome.cgroup_peak_bytes,
        "rss_anon_peak_bytes": outcome.rss_anon_peak_bytes,
        "oom_kills": outcome.oom_kills,
        "returncode": outcome.returncode,
        "worker": json.loads(outcome.stdout.splitlines()[-1]) if outcome.returncode == 0 else None,
    }


def prompts() -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, 400, (2, PROMPT_TOKENS), generator=generator).tolist()


def measure(arguments: argparse.Namespace) -> int:
    """Run the workers inside cgroups, and print one JSON object."""
    source, model = model_of(arguments)
    limit = int(arguments.share * sum(path.stat().st_size for path in files_of(source)))
    found: dict[str, Any] = {"shape": arguments.shape, "skew": ROUTER_SKEW}
    if arguments.beside:
        command = [
            arguments.beside,
            "-m",
            "peers.worker_llama_mixture",
            str(source),
            "--prompts",
            json.dumps(prompts()),
        ]
        command += ["--tokens", str(arguments.tokens)]
        found["llama.cpp"] = run_cold(source, command, limit, arguments.timeout)
    command = [sys.executable, __file__, str(model), "--worker", "--budget", str(limit - BESIDE_BYTES)]
    command += ["--tokens", str(arguments.tokens), "--quantize", arguments.quantize]
    ours = found["ours"] = run_cold(model, command, limit, arguments.timeout)
    rate = found["disk_bytes_per_s"] = read_rate(files_of(model)[0])
    for row in ours["worker"]["prompts"] if ours["worker"] and rate else ():  # a tiny file has no rate
        needed = row["decode_streamed_bytes"] - row["experts"]["wrong_bytes"]  # guesses are no part of a ceiling
        row["decode_ceiling_tokens_per_s"] = arguments.tokens * rate / max(needed, 1)
        row["prefill_ceiling_s"] = row["prefill_streamed_bytes"] / rate
    record = provenance("experts.py", sys.argv[1:]) | found
    print(f"{table(found)}\n{json.dumps(record)}")
    if arguments.out is not None:
        name = f"experts-{model.name}"
        write(arguments.out, name, f"# A mixture in {arguments.share:g} of its bytes: {name}\n\n{page(record)}", record)
    return 0 if ours["worker"] and not ours["oom_kills"] else 1


def table(found: dict[str, Any]) -> str:
    """A row for each engine and prompt."""
    rows = [
        [
            "",
            "prompt",
            "first token",
            "tokens/s",
            "ceiling by the disk",
            "read while decoding",
            "by wrong guesses",
            "experts there",
        ]
    ]
    for name in ("llama.cpp", "ours"):
        worker = found[name]["worker"] if name in found else None
        for number, row in enumerate(worker["prompts"] if worker else (), start=1):
            # What a process does before it can be asked counts for its first prompt.
            first = row["prefill_s"] + (worker["loaded_s"] if number == 1 else 0)
            ceiling, experts = row.get("decode_ceiling_tokens_per_s"), row.get("experts") or {}
            hits = experts.get("hit_rate")
            rows.append(
                [
                    name,
                    str(number),
                    f"{first:.1f} s",
                    f"{row['decode_tokens_per_s']:.2f}",
                    "-" if ceiling is None else f"{ceiling:.2f}",
                    gigabytes(row["decode_streamed_bytes"]) if "decode_streamed_bytes" in row else "-",
                    gigabytes(experts["wrong_bytes"]) if experts else "-",
                    "-" if hits is None else f"{hits:.1%}",
                ]
            )
    return markdown_table(rows)


def page(record: dict[str, Any]) -> str:
    engines = [name for name in ("llama.cpp", "ours") if name in record]
    memory = [["", "model", "limit", "peak of the cgroup", "of it anonymous", "kills"]]
    memory += [
        [
            name,
            *(gigabytes(record[name][key]) for key in ("model_bytes", "limit_bytes")),
            *(gigabytes(record[name][key]) for key in ("cgroup_peak_bytes", "rss_anon_peak_bytes")),
            str(record[name]["oom_kills"]),
        ]
        for name in engines
    ]
    return f"{origin_lines(record)}\n\n{table(record)}\n\n{markdown_table(memory)}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path, help="where checkpoints are, or are made")
    parser.add_argument("--shape", choices=MIXTURES, default="gpt-oss-half")
    parser.add_argument("--share", type=float, default=0.45, help="of the model's bytes, the cgroup's limit")
    parser.add_argument("--gguf", type=Path, help="a file of peers/gguf_mixture.py, in place of a made checkpoint")
    parser.add_argument("--beside", help="the interpreter of an environment with xllamacpp: run llama.cpp, too")
    parser.add_argument("--convert", choices=("none", "int8", "int4"), help="run a converted copy")
    parser.add_argument("--quantize", default="auto")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, help="folder for the record")
    parser.add_argument("--timeout", type=float, default=1800)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    return worker(arguments) if arguments.worker else measure(arguments)


if __name__ == "__main__":
    sys.exit(main())
