"""Run a command under a memory cap and watch what it really uses."""

import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cgroup import MemoryCgroup, memory_cgroup


@dataclass(frozen=True)
class Outcome:
    """What the command did. `limit_bytes` and `cgroup_peak_bytes` are None where no cgroup was to be had."""

    returncode: int
    stdout: str
    wall_s: float
    limit_bytes: int | None
    cgroup_peak_bytes: int | None
    rss_anon_peak_bytes: int
    rss_peak_bytes: int
    oom_kills: int
    timed_out: bool


def process_status_bytes(pid: int | str, field: str) -> int:
    """A memory field of /proc/PID/status such as RssAnon or VmHWM; 0 when the process has gone."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.M)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


class _Sampler(threading.Thread):
    """Linux keeps no high-water mark of anonymous memory, so it is sampled."""

    def __init__(self, pid: int, interval_s: float):
        super().__init__(daemon=True)
        self.pid, self.interval_s = pid, interval_s
        self.stopped = threading.Event()
        self.rss_anon_bytes = self.rss_bytes = 0

    def run(self) -> None:
        while not self.stopped.wait(self.interval_s):
            self.rss_anon_bytes = max(self.rss_anon_bytes, process_status_bytes(self.pid, "RssAnon"))
            self.rss_bytes = max(self.rss_bytes, process_status_bytes(self.pid, "VmHWM"))


def _wait(process: subprocess.Popen[str], timeout_s: float | None) -> tuple[str, bool]:
    """Everything the process printed, and whether it had to be stopped for being late."""
    try:
        return process.communicate(timeout=timeout_s)[0], False
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0], True
    except BaseException:
        process.kill()
        process.wait()
        raise


def _watch(
    command: Sequence[str],
    group: MemoryCgroup | None,
    limit_bytes: int | None,
    timeout_s: float | None,
    environment: Mapping[str, str] | None,
) -> Outcome:
    start_s = time.perf_counter()
    wrapped = group.wrap(command) if group else command
    process = subprocess.Popen(wrapped, stdout=subprocess.PIPE, text=True, env=environment)
    sampler = _Sampler(process.pid, interval_s=0.2)
    sampler.start()
    try:
        stdout, timed_out = _wait(process, timeout_s)
    finally:
        sampler.stopped.set()
        sampler.join()
    return Outcome(
        returncode=process.returncode,
        stdout=stdout,
        wall_s=time.perf_counter() - start_s,
        limit_bytes=limit_bytes if group else None,
        cgroup_peak_bytes=group.peak_bytes() if group else None,
        rss_anon_peak_bytes=sampler.rss_anon_bytes,
        rss_peak_bytes=sampler.rss_bytes,
        oom_kills=group.oom_kills() if group else 0,
        timed_out=timed_out,
    )


def run_capped(
    command: Sequence[str],
    limit_bytes: int | None,
    timeout_s: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run to the end; stdout is returned, stderr passes through. None as the limit means no cap is wanted."""
    if limit_bytes is None:
        return _watch(command, None, None, timeout_s, environment)
    with memory_cgroup(limit_bytes) as group:
        return _watch(command, group, limit_bytes, timeout_s, environment)
