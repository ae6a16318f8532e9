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

PROC = Path("/proc")
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


def _mount(kind: str, option: str | None) -> tuple[Path, str] | None:
    """Mount point and root of a cgroup hierarchy, from mountinfo."""
    for line in (PROC / "self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ", 1)
        fields, (found_kind, _, options) = before.split(), after.split(maxsplit=2)
        if found_kind == kind and (option is None or option in options.split(",")):
            return Path(fields[4]), fields[3]
    return None


def _own_group(version: int) -> tuple[Path, Path] | None:
    """Mount point and the caller's own group, or None where the version has no memory controller."""
    for line in (PROC / "self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        wanted = "memory" in controllers.split(",") if version == 1 else controllers == ""
        mount = _mount("cgroup", "memory") if version == 1 else _mount("cgroup2", None)
        if wanted and mount:
            point, root = mount
            own = point / os.path.relpath(group, root)
            return point, own if own.is_dir() else point
    return None


def _parents(version: int) -> Iterator[Path]:
    """Groups that may take a capped child, nearest first."""
    found = _own_group(version)
    if found is None:
        return
    mount, group = found
    if version == 1:
        yield group
        return
    for candidate in (group, *group.parents):  # v2: only a group that hands the controller down
        control = candidate / "cgroup.subtree_control"
        if control.is_file() and "memory" in control.read_text().split():
            yield candidate
        if candidate == mount:
            return


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
