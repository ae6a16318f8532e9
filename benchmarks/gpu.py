"""Everything that needs CUDA, in one call: correctness, memory within budgets, ceilings, speed beside them.

    python benchmarks/gpu.py --out benchmarks/results            # one GPU, under 9 minutes
    python benchmarks/gpu.py --device cpu --scale tiny           # the same flow with toys: shows that it works

The tests marked `cuda`, then `griffin-offload bench` of 7B, 13B and 70B shapes in several budgets, then what only one
loaded model tells: replays of its graph, copies that a profiler sees, exact mode at a drawn acceptance. Each is a
process of its own with a share of the time; the record is written behind each, and `--sections` asks for those that a
call was cut off before. What fails, is missing or breaks a promise makes the exit status 1. Weights are random.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_model import measure_model
from make_checkpoint import make_checkpoint
from report import origin_lines, provenance, write
from shapes import MIXTURES
from sides import environment

Row = dict[str, Any]
ROOT = Path(__file__).parent.parent
SHARED_MEMORY = Path("/dev/shm")
NEEDED_BYTES = 52 * 10**9  # of checkpoints, at the full scale
LEAST_S = 30.0
TARGETS = {"prefill_share": 0.9, "replay_share_of_memory": 0.8}


@dataclass(frozen=True)
class Case:
    """A model's shape in a budget; `weight` is its part of the time, `layers` those of the checkpoint."""

    shape: str
    budget: str
    densities: str
    quantize: str = "auto"
    prompt_tokens: int = 2048
    new_tokens: str = "128"
    layers: int | None = None
    weight: int = 2
    missing: str = "fetch"
    """What is done with experts that are not on the device."""

    def folder(self, place: Path) -> Path:
        return place / (self.shape + (f"-{self.layers}layers" if self.layers else ""))


CASES = {
    "7b in 8 GB": Case("llama-2-7b", "8GB", "1,0.5,0.25"),
    "7b in 24 GB": Case("llama-2-7b", "24GB", "1,0.5,0.25", "none"),
    "13b in 12 GB": Case("llama-2-13b", "12GB", "1,0.5,0.25"),
    "13b in 24 GB": Case("llama-2-13b", "24GB", "0.5,0.25", "none"),
    # The paper's table 3, and what density gains against a model that is resident as a whole.
    "13b, whole card": Case("llama-2-13b", "80%", "1,0.5,0.25", "none", new_tokens="128,2048", weight=4),
    # A layer of 70B takes what it takes: four of eighty show the rates.
    "70b, four layers": Case("llama-2-70b", "80%", "0.5,0.25", "none", layers=4, weight=1),
    # Hidden states travel in the place of weights: tokens per second beside those of `fetch`.
    "experts, fetched": Case("gpt-oss-half", "6GB", "0.5,0.25", "none", 512, weight=1),
    "experts, by the CPU": Case("gpt-oss-half", "6GB", "0.5,0.25", "none", 512, weight=1, missing="host"),
}
TINY = Case("tiny", "200MB", "1,0.5", "none", 24, "20")
SECTIONS = ("tests", *CASES, "one model")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything")
    parser.add_argument("--sections", type=lambda text: text.split(";"), default=list(SECTIONS), metavar="NAME[;NAME]")
    parser.add_argument("--dir", type=Path, help="folder for checkpoints (default: shared memory, or a temporary one)")
    parser.add_argument("--out", type=Path, help="folder for the table and the record")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if unknown := sorted(set(args.sections) - set(SECTIONS)):
        parser.error(f"no section {unknown[0]}: choose from {'; '.join(SECTIONS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available here: --device cpu --scale tiny shows the flow")
    return args


def case_of(name: str, args: argparse.Namespace) -> Case:
    """`one model` takes 13B in 24 GB; the tiny scale has one shape for all."""
    return TINY if args.scale == "tiny" else CASES.get(name, CASES["13b in 24 GB"])


def command_of(name: str, args: argparse.Namespace, place: Path) -> list[str]:
    if name == "tests":
        return [sys.executable, "-m", "pytest", "tests", "-m", "cuda", "-rs", "-p", "no:cacheprovider"]
    case = case_of(name, args)
    if name == "one model":
        return [sys.executable, __file__, "--worker", str(case.folder(place)), "--device", args.device]
    command = [sys.executable, "-m", "griffin_offload", "bench", "-m", str(case.folder(place)), "-q"]
    of_experts = case.shape in MIXTURES  # which rest in the files
    command += ["--device", args.device, "--offload", "auto" if of_experts else "ram", "--max-gpu-mem", case.budget]
    command += ["--repeats", "1", "--missing-experts", case.missing]
    command += ["-d", case.densities, "--quantize", case.quantize]
    return [*command, "-p", str(case.prompt_tokens), "-n", case.new_tokens]


def run_limited(command: list[str], limit_s: float) -> tuple[int | None, str, str]:
    """(status, stdout, end of stderr); None: it was stopped, with its children, when its time was over."""
    pipes: Row = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, env=environment(), cwd=ROOT, **pipes) as process:
        try:
            out, err = process.communicate(timeout=limit_s)
        except BaseException as error:  # Ctrl-C, too
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return None, *process.communicate()
        return process.returncode, out, err[-2000:]


def run(name: str, args: argparse.Namespace, place: Path, limit_s: float) -> Row:
    """A section: its figures, or why there are none."""
    start, case = time.monotonic(), case_of(name, args)
    if name != "tests" and not case.folder(place).exists():
        make_checkpoint(case.folder(place), case.shape, layers=case.layers)
    made_s = time.monotonic() - start
    status, output, errors = run_limited(command_of(name, args, place), max(limit_s - made_s, 1.0))
    section: Row = {
        "seconds": time.monotonic() - start,
        "limit_s": limit_s,
        "case": asdict(case),
        "text": output.strip(),
    }
    if name == "tests":
        section["counts"] = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}
    elif status == 0:
        section["text"], _, last = output.strip().rpartition("\n")
        section["found"] = json.loads(last)
    if status is None:
        section["failure"] = f"stopped after {limit_s:.0f} s"
    elif status not in (0, 5):  # no test is for this device
        # Paths are this machine's own affair.
        section["failure"] = f"status {status}: " + re.sub(r"/\S+/", "", (errors or output)[-600:].strip())
    return section


def rows_of(record: Row) -> Iterator[tuple[str, Row]]:
    """What each is of, and its figures, with what is done about missing experts (None: there are none)."""
    for name, section in record["sections"].items():
        case = section["case"]
        missing = case["missing"] if case["shape"] in MIXTURES else None
        for row in section.get("found", {}).get("rows", []):
            what = f"{name}, density {row['density']:.2f}, {row['generate_tokens']} tokens"
            yield what, row | {"missing_experts": missing}


def broken(record: Row) -> list[str]:
    """What failed, and promises that were not kept."""
    sections = record["sections"]
    found = [f"{name}: {section['failure']}" for name, section in sections.items() if "failure" in section]
    found += [f"{name}: no figures" for name in sections if name != "tests" and not sections[name].get("found")]
    if record["cuda"] and not sections.get("tests", {"counts": {"passed": 1}})["counts"].get("passed"):
        found.append("tests: none passed on the device")
    for what, row in rows_of(record):
        if row["peak_bytes"] > row["budget_bytes"]:
            found.append(f"{what}: the peak is {row['peak_bytes']} bytes, the budget {row['budget_bytes']}")
        if row["decode_streamed_bytes"] and row["missing_experts"] != "fetch":
            found.append(f"{what}: {row['decode_streamed_bytes']} bytes of weights were fetched while decoding")
        if bool(row["decode_host_bytes"]) != (row["missing_experts"] == "host"):
            found.append(f"{what}: the CPU computed experts of {row['decode_host_bytes']} bytes")
    traffic = sections.get("one model", {}).get("found", {}).get("traffic")
    if traffic and traffic["host_to_device_bytes"] > traffic["allowed_bytes"]:
        found.append(f"{traffic['host_to_device_bytes']} bytes went to the device, {traffic['allowed_bytes']} may")
    if traffic and record["cuda"] and not traffic["kernels_seen"]:
        found.append("the profiler saw no kernel, so its count of copies says nothing")
    return found


def missed(record: Row) -> list[str]:
    """Targets; a model that is resident as a whole streams nothing."""
    values = [(what, "prefill_share", row["prefill_share"]) for what, row in rows_of(record) if row["streamed_bytes"]]
    one = record["sections"].get("one model", {}).get("found", {})
    values.append(("one model", "replay_share_of_memory", one.get("replay_share_of_memory")))
    return [
        f"{what}: {key} {value:.0%}, {TARGETS[key]:.0%} is the target"
        for what, key, value in values
        if value is not None and value < TARGETS[key]
    ]


def page(record: Row) -> str:
    parts = [f"# GPU: {record['device']}", origin_lines(record)]
    for name, section in record["sections"].items():
        parts += [f"## {name}", f"```\n{section['text']}\n```"]
    for title, lines in (("Broken", broken(record)), ("Targets missed", missed(record))):
        parts.append(f"## {title}\n\n" + ("\n".join(f"- {line}" for line in lines) if lines else "None."))
    return "\n\n".join(parts)


def place_for(args: argparse.Namespace) -> Path:
    """Where checkpoints go when nobody says: memory is the faster disk, if there is enough."""
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > NEEDED_BYTES
    return Path(tempfile.mkdtemp(prefix="griffin-gpu-", dir=SHARED_MEMORY if roomy and args.scale == "full" else None))


def device_name(device: str) -> str:
    """Asked of the driver's tool: a context of this process would be counted against the sections' budgets."""
    if device == "cpu":
        return "cpu, with toys: shows that everything runs, no figure here means anything"
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run_all(args: argparse.Namespace, record: Row, place: Path, name: str) -> None:
    """What is left, each with its share of the time; a checkpoint goes when nobody needs it any more."""
    ends_at = time.monotonic() + args.minutes * 60
    left = [section for section in SECTIONS if section in args.sections]
    while left:
        section = left.pop(0)
        remaining = max(ends_at - time.monotonic(), 1.0)
        share = case_of(section, args).weight / sum(case_of(other, args).weight for other in (section, *left))
        limit_s = max(remaining * share, min(remaining, LEAST_S))
        record["sections"][section] = run(section, args, place, limit_s)
        done, needed = ({case_of(n, args).folder(place) for n in names} for names in ([section], left))
        for folder in done - needed:
            shutil.rmtree(folder, ignore_errors=True)
        if args.out is not None:
            write(args.out, name, page(record), record)


def main(arguments: Sequence[str]) -> int:
    args = parse_arguments(arguments)
    if args.worker:
        case = TINY if args.worker.name == TINY.shape else CASES["13b in 24 GB"]
        found = measure_model(args.worker, args.device, case.budget, case.prompt_tokens)
        print(f"{json.dumps(found, indent=1)}\n{json.dumps(found)}")
        return 0
    name = f"gpu-{args.scale}-{args.device}"
    record = provenance("gpu.py", arguments) | {
        "device": device_name(args.device),
        "cuda": torch.version.cuda if args.device == "cuda" else None,
        "sections": {},
    }
    place = args.dir or place_for(args)
    try:
        run_all(args, record, place, name)
    finally:
        if args.dir is None:
            shutil.rmtree(place, ignore_errors=True)
    print(page(record))
    print(json.dumps(record))
    return 1 if broken(record) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
