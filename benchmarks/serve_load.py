"""A server under load: are good requests answered, is memory bounded, is everything gone afterwards?

    python benchmarks/serve_load.py --requests 200 --clients 8 --out OUT
    python benchmarks/serve_load.py --minutes 10 --out OUT

A real `griffin-offload serve` process of the demo in a budget of 6.35 MB, in which layers are streamed for every
prompt. The ceiling of memory is the server's budget, which on the CPU is kept on the runtime's ledger; what the process
took beside it (interpreter, allocator, HTTP) is shown, and bounded by the overhead that the runtime states. The last
line is JSON; the exit status is 1 if anything that is promised was not kept.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from load_clients import Client, Tally
from report import markdown_table, provenance, publish

from griffin_offload.devices.memory import HOST_OVERHEAD_BYTES

SAMPLE_S = 0.5
# Answers before the clients begin: threads are started and kernels chosen.
WARM_UP = 5
# The interpreter's heap settles while the first requests pass; what grows after this share of the run is growth.
SETTLED_SHARE = 0.3
# More than this is growth, in a run that is long enough to tell.
GROWTH_BYTES_PER_MINUTE = 1e6
LONG_S = 300


@dataclass(frozen=True)
class Sample:
    """One look at the server."""

    seconds: float
    anonymous_bytes: int
    device_bytes: int
    """Of the runtime's ledger, at its highest so far; no answer is missed, given up or not."""
    growth_bytes: int
    """Anonymous memory at its peak so far above what it was before the model was loaded."""
    threads: int
    descriptors: int


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="a checkpoint that clients call demo (default: the embedded demo)")
    parser.add_argument("--max-mem", default="6.35MB")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--minutes", type=float, help="so long in place of a number of requests")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--parallel", default="auto", help="requests that the server answers at once")
    parser.add_argument("--whole", action="store_true", help="all neurons: answers depend on no others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the record")
    return parser.parse_args(arguments)


def start_server(arguments: argparse.Namespace, files: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    command = [sys.executable, "-m", "griffin_offload", "serve", "--port", "0", "--json", "-q", "--served-name", "demo"]
    command += ["--device", "cpu", "--max-mem", arguments.max_mem, "--quantize", "none"]
    command += ["--parallel", arguments.parallel, *(["--density", "1"] if arguments.whole else [])]
    command += ["-m", str(arguments.dir)] if arguments.dir is not None else []
    environment = os.environ | {"TMPDIR": files}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise SystemExit("the server did not start")
    return process, json.loads(line)


class Watch:
    """Samples of a process, until stopped."""

    def __init__(self, pid: int, url: str) -> None:
        self._process, self._http = psutil.Process(pid), httpx.Client(base_url=url, timeout=60)
        self.samples: list[Sample] = []
        self._start, self._over = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        self._http.close()

    def look(self) -> Sample:
        metrics = self.metrics()
        memory = self._process.memory_info()
        return Sample(
            time.monotonic() - self._start,
            memory.rss - memory.shared,
            int(metrics["griffin_offload_device_peak_bytes"]),
            int(metrics["griffin_offload_host_growth_bytes"]),
            self._process.num_threads(),
            self._process.num_fds(),
        )

    def metrics(self) -> dict[str, float]:
        lines = self._http.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self.samples.append(self.look())


def run_clients(url: str, arguments: argparse.Namespace) -> tuple[Tally, float]:
    tally, start = Tally(), time.monotonic()
    left = iter(range(arguments.requests))
    turn = threading.Lock()

    def more() -> bool:
        if arguments.minutes is not None:
            return time.monotonic() - start < arguments.minutes * 60
        with turn:
            return next(left, None) is not None

    def work(number: int) -> None:
        client = Client(url, tally, arguments.seed * 1000 + number)
        while more():
            client.ask_one()
        client.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(arguments.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally, time.monotonic() - start


def growth_bytes_per_minute(samples: Sequence[Sample]) -> float:
    """Slope of anonymous memory after the start."""
    settled = samples[int(len(samples) * SETTLED_SHARE) :]
    if len(settled) < 2:
        return 0.0
    fit = statistics.linear_regression([s.seconds for s in settled], [s.anonymous_bytes for s in settled])
    return fit.slope * 60


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] if values else 0.0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run; the server writes its temporary files, if any, into a folder of this run."""
    with tempfile.TemporaryDirectory() as files:
        found = measure_server(*start_server(arguments, files), arguments)
        left = sorted(path.name for path in Path(files).rglob("*") if path.is_file())  # torch leaves an empty folder
        return found | {"files_left": left}


def measure_server(
    process: subprocess.Popen[str], ready: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    watch = Watch(process.pid, ready["url"])
    try:
        first = Client(ready["url"], Tally(), 10**6)
        for _ in range(WARM_UP):
            first.good()
        first.close()
        idle = watch.look()
        tally, wall_s = run_clients(ready["url"], arguments)
        time.sleep(3)  # for those that were cut off last
        after, metrics = watch.look(), watch.metrics()
    finally:
        watch.stop()
        process.send_signal(signal.SIGTERM)
    code = process.wait(60)
    return {
        "wall_s": wall_s,
        # Neurons are chosen by all that are answered at once: nobody promises the same ones twice.
        "comparable": arguments.whole or arguments.parallel in ("1", "auto"),
        "asked": tally.asked,
        "failures": tally.failures,
        "disagreements": tally.disagreements,
        "answers_compared": len(tally.answers),
        "outcomes": {k: v for k, v in metrics.items() if k.startswith("griffin_offload_requests_total")},
        "tokens": tally.tokens,
        "tokens_per_s": tally.tokens / wall_s,
        "prompt_tokens": tally.prompt_tokens,
        "cached_tokens": tally.cached_tokens,
        "first_token_s": {"median": quantile(tally.first_token_s, 0.5), "p95": quantile(tally.first_token_s, 0.95)},
        "slowest_over_median_first_token": max(tally.first_token_s) / quantile(tally.first_token_s, 0.5),
        "answer_s": {"median": quantile(tally.seconds, 0.5), "p95": quantile(tally.seconds, 0.95)},
        "budget_bytes": int(metrics["griffin_offload_device_budget_bytes"]),
        "peak_device_bytes": after.device_bytes,
        "peak_growth_bytes": max(s.growth_bytes for s in [*watch.samples, after]),
        "anonymous_bytes": {
            "idle": idle.anonymous_bytes,
            "peak": max(s.anonymous_bytes for s in [*watch.samples, idle, after]),
            "after": after.anonymous_bytes,
        },
        "growth_bytes_per_minute": growth_bytes_per_minute(watch.samples),
        "threads": {"idle": idle.threads, "after": after.threads},
        "descriptors": {"idle": idle.descriptors, "after": after.descriptors},
        "exit_code": code,
        "process_gone": not psutil.pid_exists(process.pid),
    }


def broken_promises(found: dict[str, Any]) -> list[str]:
    promises = {
        "every good request is answered": not found["failures"],
        "the same question has the same answer": not (found["comparable"] and found["disagreements"]),
        "the peak is within the budget": found["peak_device_bytes"] <= found["budget_bytes"],
        "the process keeps to budget and overhead": found["peak_growth_bytes"]
        <= found["budget_bytes"] + HOST_OVERHEAD_BYTES,
        "memory does not grow": found["wall_s"] < LONG_S or found["growth_bytes_per_minute"] < GROWTH_BYTES_PER_MINUTE,
        "threads are gone": found["threads"]["after"] <= found["threads"]["idle"],
        "descriptors are gone": found["descriptors"]["after"] <= found["descriptors"]["idle"],
        "files are gone": not found["files_left"],
        "the process ends well": found["exit_code"] == 0 and found["process_gone"],
    }
    return [promise for promise, kept in promises.items() if not kept]


def table(found: dict[str, Any]) -> str:
    asked, memory, budget = found["asked"], found["anonymous_bytes"], found["budget_bytes"] / 1e6
    first, answer = ("{median:.2f} s, {p95:.2f} s".format(**found[name]) for name in ("first_token_s", "answer_s"))
    anonymous = ", ".join(f"{memory[name] / 1e6:.1f} MB" for name in ("idle", "peak", "after"))
    rows = [
        ["requests", ", ".join(f"{count} {kind}" for kind, count in asked.items())],
        ["failures of good ones, wrong refusals of bad ones", str(len(found["failures"]))],
        ["greedy answers that disagree", f"{found['disagreements']} (of {found['answers_compared']} questions)"],
        ["tokens/s, all clients", f"{found['tokens_per_s']:.0f}"],
        ["first token, median and p95", first],
        ["first token, slowest over median", f"{found['slowest_over_median_first_token']:.1f}"],
        ["answer, median and p95", answer],
        ["prompt tokens that were kept", f"{found['cached_tokens']} of {found['prompt_tokens']}"],
        ["peak of the ledger", f"{found['peak_device_bytes']} of {found['budget_bytes']} bytes"],
        ["anonymous memory: idle, peak, after", anonymous],
        [
            "anonymous memory above that before loading, at its peak",
            f"{found['peak_growth_bytes'] / 1e6:.1f} MB ({budget:.2f} MB + {HOST_OVERHEAD_BYTES / 1e6:.0f} MB stated)",
        ],
        ["slope of anonymous memory", f"{found['growth_bytes_per_minute'] / 1e6:+.3f} MB per minute"],
        ["threads: idle, after", f"{found['threads']['idle']}, {found['threads']['after']}"],
        ["descriptors: idle, after", f"{found['descriptors']['idle']}, {found['descriptors']['after']}"],
        ["temporary files left", str(len(found["files_left"]))],
        ["exit code after SIGTERM, process", f"{found['exit_code']}, {'gone' if found['process_gone'] else 'there'}"],
    ]
    return markdown_table([["", f"in {found['wall_s']:.0f} s"], *rows])


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = measure(options)
    record = provenance("serve_load.py", arguments) | found | {"broken_promises": broken_promises(found)}
    for failure in found["failures"][:10]:
        print(f"failure: {failure}")
    name = f"serve_load-{'demo' if options.dir is None else options.dir.name}"
    name += f"-{options.minutes:g}min" if options.minutes is not None else f"-{options.requests}"
    publish(options.out, name, f"A server under load: {name}", table(found), record)
    return 1 if record["broken_promises"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
