"""What memory cgroups leave free: the kernel's files in both versions, made by hand."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from griffin_offload.config import LoadConfig
from griffin_offload.devices import memory
from griffin_offload.devices.registry import CpuDevice

LIMIT = 1_000_000_000
GROUP = "box/inner"


@pytest.fixture(params=["v1", "v2"])
def cgroup(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes the files of a group with `used` bytes charged, of which `file` are pages of files on a disk."""
    v1 = request.param == "v1"
    root = tmp_path / "memory" if v1 else tmp_path
    own = tmp_path / "own"
    own.write_text(f"5:devices:/\n4:memory:/{GROUP}\n0::/\n" if v1 else f"0::/{GROUP}\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUP", own)
    monkeypatch.setattr(
        memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * LIMIT, available=64 * LIMIT)
    )

    def write(used: int, file: int, limit: int | str = LIMIT, group: str = GROUP, **files: int) -> None:
        place = root / group
        place.mkdir(parents=True, exist_ok=True)
        prefix = "total_" if v1 else ""
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
        for name, value in zip(names, (limit, used), strict=True):
            (place / name).write_text(f"{value}\n")
        lines = {f"{prefix}active_file": file - file // 3, f"{prefix}inactive_file": file // 3}
        # What is left is anonymous, shared or locked: nothing of it may count as free, whatever it is called.
        lines |= {f"{prefix}rss": 1, "anon": 1, f"{prefix}shmem": used - file - 1}
        (place / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in lines.items()))
        for name, value in files.items():
            (place / name.replace("_", ".")).write_text(f"{value}\n")

    write.v1, write.root = v1, root
    return write


def free() -> int:
    return memory.host_bytes()[0]


def test_pages_of_files_on_a_disk_are_free(cgroup):
    cgroup(700_000_000, file=600_000_000)
    assert memory.host_bytes() == (900_000_000, LIMIT)


def test_files_in_memory_are_not(cgroup):
    cgroup(700_000_000, file=0)
    assert free() == 300_000_000


def test_more_than_the_limit_is_nothing(cgroup):
    cgroup(LIMIT + 5_000_000, file=1_000_000)
    assert free() == 0


def test_the_tightest_group_above_counts(cgroup):
    cgroup(100_000_000, file=0)
    cgroup(850_000_000, file=0, group="box")
    assert free() == 150_000_000


def test_a_group_without_a_limit(cgroup):
    cgroup(100_000_000, file=0, limit=2**63 - 4096 if cgroup.v1 else "max")
    assert memory.host_bytes() == (64 * LIMIT, 64 * LIMIT)


def test_a_group_whose_own_path_is_not_there(cgroup):
    """As a container sees it that has no name space of its own: the limit lies at the root."""
    cgroup(400_000_000, file=0, group=".")
    assert free() == LIMIT - 400_000_000


def test_where_a_process_is_slowed_down_is_a_limit(cgroup):
    cgroup(100_000_000, file=0, memory_high=400_000_000)
    assert free() == (900_000_000 if cgroup.v1 else 300_000_000)


@pytest.mark.parametrize(
    ("charged", "free_bytes"),
    [
        ({"active_file": 100, "inactive_file": 200, "shmem": 300}, 700),  # a model copied to /dev/shm
        ({"inactive_file": 300, "unevictable": 250, "anon": 50}, 700),  # pages that are locked
        ({"inactive_file": 50, "mapped_file": 500, "shmem": 500}, 450),  # memory that processes share is mapped, too
        ({"anon": 100, "inactive_anon": 100, "hugetlb": 0, "kernel_stack": 20, "pagetables": 30}, 400),
        ({"inactive_file": 600, "dirty": 600}, 1000),  # it is written back before it is dropped, which the kernel does
        ({}, 400),  # a kernel that tells nothing: all of it counts as used
    ],
    ids=["tmpfs", "locked", "shared", "kernel", "not written yet", "no word"],
)
def test_what_is_charged_and_can_be_dropped(cgroup, charged: dict[str, int], free_bytes: int):
    """600 of 1000 MB are charged, by the lines of memory.stat; only pages of files on a disk come back."""
    million = 1_000_000
    cgroup(600 * million, file=0)
    names = {name: f"total_{name}" if cgroup.v1 else name for name in charged}
    lines = [f"{names[name]} {size * million}" for name, size in charged.items()]
    (cgroup.root / GROUP / "memory.stat").write_text("\n".join(lines))
    assert free() == free_bytes * million


@pytest.mark.parametrize(("free_bytes", "budget"), [(900, 600), (450, 300), (5100, 4590), (4000, 3500), (1500, 1000)])
def test_auto_leaves_room_for_the_program(cgroup, free_bytes: int, budget: int):
    """A tenth of little is less than what lies beside budgets: then the 500 MB that are stated, or a third."""
    million = 1_000_000
    cgroup((10_000 - free_bytes) * million, file=0, limit=10_000 * million)
    assert memory.budget_bytes(LoadConfig(), CpuDevice.current()) == budget * million
