"""Everything that needs CUDA, in one call: correctness, memory within budgets, ceilings, speed beside them.

    python benchmarks/gpu.py --out benchmarks/results            # one GPU, under 9 minutes
    python benchmarks/gpu.py --device cpu --scale tiny           # the same flow with toys: shows that it works

Sections run one after the other, each in a process of its own with a share of the time; what one does not use goes to
the others. The record is written after every section, and `--resume` goes on where a call was cut off. A section or
row that fails, a broken promise (a peak above its budget, a weight that moved while decoding) or missing rows make the
exit status 1; a target that was missed is only said. Weights are random: speed and traffic do not depend on them.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_sections import SECTIONS, Setting, cases_of, run_section
from gpu_table import broken, page
from report import provenance, write

# Of the time, as far as a section is among those that are left.
WEIGHTS = {"tests": 4, "ceilings": 2, "7b": 4, "13b": 7, "exact": 3, "70b": 4}
LARGEST_SHARED_MEMORY = Path("/dev/shm")
# Checkpoints of every shape at once, for the full scale.
NEEDED_BYTES = 52 * 10**9
KILL_GRACE_S = 5.0
# Starting a process with CUDA takes a part of it.
LEAST_SECTION_S = 30.0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything")
    parser.add_argument("--sections", type=lambda text: text.split(","), default=list(SECTIONS), metavar="NAME[,NAME]")
    parser.add_argument("--dir", type=Path, help="folder for checkpoints (default: shared memory, or a temporary one)")
    parser.add_argument("--out", type=Path, help="folder for the table and the record")
    parser.add_argument("--resume", action="store_true", help="keep the sections that an earlier record has whole")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--rates", type=json.loads, default={}, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"no section {unknown[0]}: choose from {', '.join(SECTIONS)}")
    if args.resume and args.out is None:
        parser.error("--resume goes on with a record: name its folder by --out")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available here: --device cpu --scale tiny shows the flow")
    return args


def work(args: argparse.Namespace) -> int:
    """One section, in this process."""
    folder, ends_at = args.dir, time.monotonic() + args.seconds
    run_section(args.worker, Setting(torch.device(args.device), args.scale, folder, ends_at, args.rates))
    return 0


def section_command(name: str, args: argparse.Namespace, folder: Path, seconds: float, rates: Any) -> list[str]:
    if name == "tests":
        tests = Path(__file__).parent.parent / "tests" / "runtime"
        return [
            sys.executable,
            "-m",
            "pytest",
            str(tests / "test_cuda.py"),
            "-m",
            "cuda",
            "-rs",
            "-p",
            "no:cacheprovider",
        ]
    command = [sys.executable, str(Path(__file__)), "--worker", name, "--seconds", str(seconds), "--dir", str(folder)]
    return [*command, "--device", args.device, "--scale", args.scale, "--rates", json.dumps(rates)]


def run_limited(command: list[str], seconds: float) -> tuple[int | None, str, str]:
    """(status, stdout, end of stderr); None: it was stopped, with its children, when its time was over."""
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        subprocess.Popen(
            command, stdout=out, stderr=err, env=environment, cwd=root, text=True, start_new_session=True
        ) as process,
    ):
        status: int | None
        try:
            status = process.wait(seconds)
        except BaseException as error:  # Ctrl-C, too
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(KILL_GRACE_S)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = None
        out.seek(0)
        err.seek(0)
        return status, out.read(), err.read()[-2000:]


def rows_of(output: str) -> list[dict[str, Any]]:
    """The JSON lines; the last one of a process that was stopped may be half of one."""
    rows = []
    for line in output.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def run(name: str, args: argparse.Namespace, folder: Path, seconds: float, rates: Any) -> dict[str, Any]:
    start = time.monotonic()
    status, output, errors = run_limited(section_command(name, args, folder, seconds, rates), seconds)
    section: dict[str, Any] = {"seconds": time.monotonic() - start, "limit_s": seconds, "rows": rows_of(output)}
    if name == "tests":
        counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}
        section |= {"counts": counts, "output": output[-2000:] if status else ""}
    if status is None:
        section["failure"] = f"stopped after {seconds:.0f} s, {len(section['rows'])} rows were done"
    elif status != 0:
        # Paths are this machine's own affair.
        section["failure"] = f"status {status}: " + re.sub(r"/\S+/", "", (errors or output)[-600:].strip())
    return section


def room_for(args: argparse.Namespace) -> Path:
    """Where checkpoints go when nobody says: memory is the faster disk, if there is enough."""
    shared = LARGEST_SHARED_MEMORY
    if args.scale == "full" and shared.is_dir() and shutil.disk_usage(shared).free > NEEDED_BYTES:
        return Path(tempfile.mkdtemp(prefix="griffin-offload-gpu-", dir=shared))
    return Path(tempfile.mkdtemp(prefix="griffin-offload-gpu-"))


def is_whole(section: Any) -> bool:
    return (
        bool(section)
        and "failure" not in section
        and not any("failure" in r or "left_out" in r for r in section["rows"])
    )


def record_name(args: argparse.Namespace) -> str:
    return f"gpu-{args.scale}-{args.device}"


def earlier(args: argparse.Namespace) -> dict[str, Any]:
    path = args.out / f"{record_name(args)}.json" if args.resume else None
    if path is None or not path.exists():
        return {}
    sections: dict[str, Any] = json.loads(path.read_text())["sections"]
    return {name: section for name, section in sections.items() if is_whole(section)}


def device_name(args: argparse.Namespace) -> dict[str, Any]:
    if args.device != "cuda":
        return {"device": "cpu, with toys: shows that everything runs, no figure here means anything"}
    # Nothing here may open the device: a context of this process would be counted against the sections' budgets.
    return {"device": "named by the section ceilings", "cuda": torch.version.cuda}


def found_device(sections: dict[str, Any]) -> dict[str, Any]:
    """What the section that looked says."""
    return next((row["is"] for section in sections.values() for row in section["rows"] if "is" in row), {})


def no_longer_needed(done: str, left: Sequence[str], args: argparse.Namespace, folder: Path) -> None:
    """Remove the checkpoints of the section `done` that none of those left reads."""
    setting = Setting(torch.device("cpu"), args.scale, folder, 0.0, {})
    needed = {setting.path(case) for name in left for case in cases_of(name, args.scale)}
    for path in {setting.path(case) for case in cases_of(done, args.scale)} - needed:
        shutil.rmtree(path, ignore_errors=True)


def main(arguments: Sequence[str]) -> int:
    args = parse_arguments(arguments)
    if args.worker:
        return work(args)
    ends_at, folder = time.monotonic() + args.minutes * 60, args.dir or room_for(args)
    record = provenance("gpu.py", arguments) | device_name(args) | {"scale": args.scale, "sections": earlier(args)}
    record |= found_device(record["sections"])
    left = [name for name in SECTIONS if name in args.sections and name not in record["sections"]]
    try:
        while left:
            name = left.pop(0)
            remaining = max(ends_at - time.monotonic(), 1.0)
            share = WEIGHTS[name] / sum(WEIGHTS[other] for other in (name, *left))
            seconds = max(remaining * share, min(remaining, LEAST_SECTION_S))
            rates = next(iter(record["sections"].get("ceilings", {}).get("rows", [])), {})
            record["sections"][name] = run(name, args, folder, seconds, rates)
            record |= found_device(record["sections"])
            no_longer_needed(name, left, args, folder)
            if args.out is not None:
                write(args.out, record_name(args), page(record), record)
    finally:
        if args.dir is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(page(record))
    print(json.dumps(record))
    return 1 if broken(record) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
