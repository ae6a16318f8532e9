"""Run a command under a memory cap, its files cold, and watch what it really uses."""

import os
import re
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from cgroup import memory_cgroup

DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True)
class Outcome:
    """What the command did. `limit_bytes` and `cgroup_peak_bytes` are None where no cgroup was to be had."""

    returncode: int
    stdout: str
    wall_s: float
    limit_bytes: int | None
    cgroup_peak_bytes: int | None
    rss_anon_peak_bytes: int
    oom_kills: int
    timed_out: bool


def drop_page_cache(paths: Iterable[Path], whole_machine: bool = True) -> None:
    """Drop the files' clean pages, as far as nobody has them mapped."""
    os.sync()  # dirty pages cannot be dropped
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if whole_machine and os.access(DROP_CACHES, os.W_OK):
        DROP_CACHES.write_text("1\n")


class _Sampler(threading.Thread):
    """Linux keeps no high-water mark of anonymous memory, so it is sampled."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{pid}/status")
        self.stopped = threading.Event()
        self.peak_bytes = 0

    def run(self) -> None:
        while not self.stopped.wait(0.2):
            try:
                found = re.search(r"^RssAnon:\s+(\d+) kB$", self._status.read_text(), re.M)
            except OSError:  # it has gone
                return
            self.peak_bytes = max(self.peak_bytes, int(found[1]) * 1024 if found else 0)


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


def run_capped(
    command: Sequence[str], limit_bytes: int | None, timeout_s: float | None, environment: Mapping[str, str]
) -> Outcome:
    """Run to the end; stdout is returned, stderr passes through. None as the limit means no cap is wanted."""
    with nullcontext() if limit_bytes is None else memory_cgroup(limit_bytes) as group:
        start_s = time.perf_counter()
        wrapped = group.wrap(command) if group else command
        process = subprocess.Popen(wrapped, stdout=subprocess.PIPE, text=True, env=environment)
        sampler = _Sampler(process.pid)
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
            rss_anon_peak_bytes=sampler.peak_bytes,
            oom_kills=group.oom_kills() if group else 0,
            timed_out=timed_out,
        )
