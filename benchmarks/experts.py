"""A mixture of experts in less memory than it has weights: does it stay inside, and how fast is it.

A random checkpoint of gpt-oss' shape, its routers skewed by their biases (make_checkpoint.py), is run in a process of
its own inside a memory cgroup of `--share` of its bytes, page cache counted and cold. The ceilings beside each figure
are the bytes that were read over the disk's own rate, measured in the same minute.

    python benchmarks/experts.py DIR [--shape gpt-oss-half] [--share 0.45] [--quantize int4] [--tokens 64]

With `--gguf` the model is a file of peers/gguf_random.py, a mixture or a dense one, in place of the checkpoint, and
`--beside ENV/bin/python` runs llama.cpp (peers/worker_llama.py) on that file first, in a cgroup of the same size.
Embeddings and head are in 8 bits in a mixture's file, and in a converted copy of it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from capped_run import drop_page_cache, run_capped
from make_checkpoint import make_checkpoint
from report import gigabytes, markdown_table, provenance, publish
from shapes import MIXTURES, ROUTER_SKEW

from griffin_offload import GriffinModel
from griffin_offload.evaluation.ceilings import read_bytes_per_s

# What a process takes beside its budget: docs/memory.md.
BESIDE_BYTES = 500_000_000
REPORTED = (
    *("prefill_s", "decode_s", "prefill_streamed_bytes", "decode_streamed_bytes", "peak_device_bytes", "experts"),
)


def worker(arguments: argparse.Namespace) -> int:
    """Load, answer two prompts, say what it took."""
    begin = time.perf_counter()
    options: dict[str, Any] = {"ctx_size": arguments.prompt_tokens + arguments.tokens, "quantize": arguments.quantize}
    with GriffinModel.from_pretrained(arguments.dir, device="cpu", max_gpu_mem=arguments.budget, **options) as model:
        loaded_s, rows, tokens = time.perf_counter() - begin, [], arguments.tokens
        for ids in prompts(arguments):
            model.generate(torch.tensor([ids]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            report = model.last_report.to_json()
            rows.append({name: report[name] for name in report if name in REPORTED or name.endswith("tokens_per_s")})
        plan = {name: getattr(model.plan, name) for name in ("experts", "expert_slots", "precision", "budget_bytes")}
        print(json.dumps({"loaded_s": loaded_s, "planned_peak_bytes": model.plan.peak_bytes, **plan, "prompts": rows}))
    return 0


def model_of(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """The original and what is run, its converted copy or itself; what is missing is made."""
    source = arguments.gguf or arguments.dir / arguments.shape
    if arguments.gguf and not source.exists():
        raise SystemExit(f"error: {source.name} is not there: peers/gguf_random.py makes one")
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
    drop_page_cache(files_of(model), whole_machine=False)
    outcome = asdict(run_capped(command, limit, timeout, os.environ | {"PYTHONPATH": str(Path(__file__).parent)}))
    found = json.loads(outcome.pop("stdout").splitlines()[-1]) if outcome["returncode"] == 0 else None
    return outcome | {"model_bytes": sum(path.stat().st_size for path in files_of(model)), "worker": found}


def prompts(arguments: argparse.Namespace) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, 400, (2, arguments.prompt_tokens), generator=generator).tolist()


def measure(arguments: argparse.Namespace) -> int:
    """Run the workers inside cgroups, and print one JSON object."""
    source, model = model_of(arguments)
    limit = int(arguments.share * sum(path.stat().st_size for path in files_of(source)))
    found: dict[str, Any] = {"shape": arguments.shape, "skew": ROUTER_SKEW}
    if arguments.beside:
        command = [arguments.beside, "-m", "peers.worker_llama", "alone", str(source)]
        command += ["--prompts", json.dumps(prompts(arguments)), "--tokens", str(arguments.tokens)]
        found["llama.cpp"] = run_cold(source, command, limit, arguments.timeout)
    command = [sys.executable, __file__, str(model), "--worker", "--budget", str(limit - BESIDE_BYTES)]
    command += ["--tokens", str(arguments.tokens), "--quantize", arguments.quantize]
    command += ["--prompt-tokens", str(arguments.prompt_tokens)]
    ours = found["ours"] = run_cold(model, command, limit, arguments.timeout)
    rate = found["disk_bytes_per_s"] = read_bytes_per_s(files_of(model))
    for said in ours["worker"]["prompts"] if ours["worker"] and rate else ():
        guessed = said["experts"]["wrong_bytes"] if said["experts"] else 0  # no part of a ceiling
        needed = said["decode_streamed_bytes"] - guessed
        said["decode_ceiling_tokens_per_s"] = arguments.tokens * rate / needed if needed else None
        said["prefill_ceiling_s"] = said["prefill_streamed_bytes"] / rate
    record = provenance("experts.py", sys.argv[1:]) | found
    mixture = bool(ours["worker"] and ours["worker"]["experts"])
    name = f"{'experts' if mixture else 'gguf'}-{model.stem}"
    kind = "mixture" if mixture else "dense model"
    publish(arguments.out, name, f"A {kind} in {arguments.share:g} of its bytes: {name}", tables(found), record)
    return 0 if ours["worker"] and not ours["oom_kills"] else 1


HEADS = (
    *("", "prompt", "first token", "tokens/s", "ceiling by the disk", "read while decoding", "by wrong guesses"),
    "experts there",
)


def tables(found: dict[str, Any]) -> str:
    """A row for each engine and prompt; what each engine took of memory."""
    rows, memory = [HEADS], [["", "model", "limit", "peak of the cgroup", "of it anonymous", "kills"]]
    for name in ("llama.cpp", "ours"):
        if name in found:
            sizes = ("model_bytes", "limit_bytes", "cgroup_peak_bytes", "rss_anon_peak_bytes")
            memory.append([name, *(gigabytes(found[name][key]) for key in sizes), str(found[name]["oom_kills"])])
            worker = found[name]["worker"]
            rows += [row(name, worker, number) for number in range(len(worker["prompts"]) if worker else 0)]
    return f"{markdown_table(rows)}\n\n{markdown_table(memory)}"


def row(name: str, worker: dict[str, Any], number: int) -> tuple[str, ...]:
    """What a process does before it can be asked counts for its first prompt."""
    found = worker["prompts"][number]
    first_s = found["prefill_s"] + (0 if number else worker["loaded_s"])
    ceiling, experts = found.get("decode_ceiling_tokens_per_s"), found.get("experts") or {}
    return (
        *(name, str(number + 1), f"{first_s:.1f} s", f"{found['decode_tokens_per_s']:.2f}"),
        "-" if ceiling is None else f"{ceiling:.2f}",
        gigabytes(found["decode_streamed_bytes"]) if experts else "-",
        gigabytes(experts["wrong_bytes"]) if experts else "-",
        f"{experts['hit_rate']:.1%}" if experts else "-",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path, help="where checkpoints are, or are made")
    parser.add_argument("--shape", choices=MIXTURES, default="gpt-oss-half")
    parser.add_argument("--share", type=float, default=0.45, help="of the model's bytes, the cgroup's limit")
    parser.add_argument("--gguf", type=Path, help="a file of peers/, in place of a made checkpoint")
    parser.add_argument("--beside", help="the interpreter of an environment with xllamacpp: run llama.cpp, too")
    parser.add_argument("--convert", choices=("none", "int8", "int4"), help="run a converted copy")
    parser.add_argument("--quantize", default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, help="folder for the record")
    parser.add_argument("--timeout", type=float, default=1800)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    return worker(arguments) if arguments.worker else measure(arguments)


if __name__ == "__main__":
    sys.exit(main())
