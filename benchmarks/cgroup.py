"""A memory cgroup, v1 or v2, for the length of one command.

The page cache a process fills is charged to its cgroup, so a cap makes a large machine behave like a small
one. The group is made below the caller's own where the kernel allows it, so it escapes no outer limit.
"""

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

REMOVE_TIMEOUT_S = 10.0
FILES = {  # version -> limit, limit with swap, peak, out-of-memory counter
    1: (
        "memory.limit_in_bytes",
        "memory.memsw.limit_in_bytes",
        "memory.max_usage_in_bytes",
        "memory.oom_control",
    ),
    2: ("memory.max", "memory.swap.max", "memory.peak", "memory.events"),
}


@dataclass(frozen=True)
class MemoryCgroup:
    path: Path
    version: int

    def set_limit(self, limit_bytes: int) -> None:
        limit, with_swap, _, _ = FILES[self.version]
        (self.path / limit).write_text(str(limit_bytes))
        with suppress(OSError):  # swap would hide an overrun; kernels without swap accounting lack the file
            (self.path / with_swap).write_text(str(limit_bytes if self.version == 1 else 0))

    def peak_bytes(self) -> int | None:
        try:
            return int((self.path / FILES[self.version][2]).read_text())
        except (OSError, ValueError):
            return None  # memory.peak needs Linux 5.19

    def oom_kills(self) -> int:
        try:
            found = re.search(r"^oom_kill (\d+)$", (self.path / FILES[self.version][3]).read_text(), re.M)
        except OSError:
            return 0
        return int(found[1]) if found else 0

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The shell joins the group and becomes the command: same PID, nothing allocated outside."""
        join = f'echo $$ > "{self.path / "cgroup.procs"}" && exec "$@"'
        return ["/bin/sh", "-c", join, "sh", *command]

    def remove(self) -> None:
        """A group stays busy for a moment after its last process has gone."""
        deadline = time.monotonic() + REMOVE_TIMEOUT_S
        while self.path.exists():
            try:
                self.path.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def _parents(version: int) -> Iterator[Path]:
    """Groups that may take a capped child, nearest first."""
    kind, controller = {1: ("cgroup", "memory"), 2: ("cgroup2", "")}[version]
    own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ", 1)
        fields, (found_kind, _, options) = before.split(), after.split(maxsplit=2)
        if found_kind != kind or (controller and controller not in options.split(",")):
            continue
        mount = Path(fields[4])
        for group in (group for _, controllers, group in own if controller in controllers.split(",")):
            path = mount / os.path.relpath(group, fields[3])
            path = path if path.is_dir() else mount
            if version == 1:
                yield path
            else:  # only a group that hands the controller down
                found = [place for place in (path, *path.parents) if place.is_relative_to(mount)]
                yield from (place for place in found if "memory" in _text(place / "cgroup.subtree_control").split())


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def _create(limit_bytes: int) -> MemoryCgroup | None:
    for version in (1, 2):
        for parent in _parents(version):
            path = parent / f"griffin-bench-{os.getpid()}"
            try:
                path.mkdir()
                group = MemoryCgroup(path, version)
                group.set_limit(limit_bytes)
            except OSError:  # no permission, or mounted read only as in most containers
                if path.exists():
                    path.rmdir()
            else:
                return group
    return None


@contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[MemoryCgroup | None]:
    """A capped group for the duration of the block, or None where there is none to be had."""
    group = _create(limit_bytes)
    try:
        yield group
    finally:
        if group:
            group.remove()
