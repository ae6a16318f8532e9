"""Memory: what is free of the host's and what this process takes of it, large tensors in it (huge pages, direct reads);
the budget that is asked for, the ledger that is held against it, and refused memory as one error.
"""

import contextlib
import ctypes
import math
import mmap
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil
import torch
from torch import Tensor

from griffin_offload.config import LoadConfig
from griffin_offload.devices.base import Device
from griffin_offload.devices.threads import BackgroundThread
from griffin_offload.errors import LimitReached, OutOfMemory, UsageError, limit_reached, memory_refused, one_line
from griffin_offload.units import format_bytes, parse_size

BLOCK_BYTES = 4096
"""What offsets, sizes and addresses of direct reads are multiples of; a page."""
_libc = ctypes.CDLL(None) if sys.platform != "win32" else ctypes.CDLL("msvcrt")  # called on Linux alone
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23
_HUGE_BYTES = 2 * 2**20
HOST_OVERHEAD_BYTES = 500_000_000
"""On the CPU: allocator caches, thread stacks and Python objects, beside the ledger, for any model over 1 GB."""
# From here on the process's growth is a figure of the model and no longer of the interpreter.
LARGE_MODEL_BYTES = 10**9
CGROUP, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None


def in_host_memory(where: Tensor | torch.device) -> bool:
    """Whether addresses there are the host's, where direct reads and system calls can use them."""
    return (where.device if isinstance(where, Tensor) else where).type == "cpu"


def in_huge_pages(tensor: Tensor) -> Tensor:
    """`tensor`, just allocated in host memory and not touched yet, in huge pages where the system gives them: one page
    fault instead of 512, and fewer address translations when its rows are multiplied."""
    if in_host_memory(tensor) and tensor.nbytes >= 2 * _HUGE_BYTES and sys.platform.startswith("linux"):
        begin = -(-tensor.data_ptr() // _HUGE_BYTES) * _HUGE_BYTES
        nbytes = (tensor.data_ptr() + tensor.nbytes - begin) // _HUGE_BYTES * _HUGE_BYTES
        _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(nbytes), _MADV_HUGEPAGE)
    return tensor


def block_buffer(nbytes: int) -> Tensor:
    """uint8 zeros [nbytes, rounded up to blocks] at an address that direct reads can write to. Not touched: its pages
    come with the first use."""
    size = max(-(-nbytes // BLOCK_BYTES), 1) * BLOCK_BYTES
    # Private: Python's default is shared memory, which has no huge pages.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return in_huge_pages(torch.frombuffer(mmap.mmap(-1, size, **private), dtype=torch.uint8))


def untouched_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.zeros, but in host memory no page is touched before its first use."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < _HUGE_BYTES:
        return torch.zeros(shape, dtype=dtype, device=device)
    return block_buffer(nbytes)[:nbytes].view(dtype).view(shape)


def touch(tensor: Tensor) -> None:
    """Make the pages of `untouched_zeros` real now, and not one by one when they are first written to."""
    if in_host_memory(tensor) and tensor.nbytes >= _HUGE_BYTES and sys.platform.startswith("linux"):
        nbytes = tensor.nbytes // BLOCK_BYTES * BLOCK_BYTES
        _libc.madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(nbytes), _MADV_POPULATE_WRITE)


def host_bytes() -> tuple[int, int]:
    """(free, total) bytes of the host: what the process may still take, cgroup limits included."""
    memory = psutil.virtual_memory()
    limit, used = _cgroup_limit(int(memory.total))
    if limit is None:
        return int(memory.available), int(memory.total)
    return min(int(memory.available), max(limit - used, 0)), min(int(memory.total), limit)


def _cgroup_limit(total: int) -> tuple[int | None, int]:
    """(limit, used) of the tightest memory cgroup we are in, v2 or v1, limits of `total` and more being none; (None, 0)
    without one."""
    try:
        groups = dict(line.split(":", 2)[1:] for line in OWN_CGROUP.read_text().splitlines())
        version = _V1 if "memory" in groups else _V2
        root = CGROUP / version.root
        group = root / groups[version.controller].lstrip("/")
    except (OSError, KeyError, ValueError):
        return None, 0
    places = (group, *group.parents)
    limits = [found for place in places if (found := _read_cgroup(place, version, total)) is not None]
    return min(limits, key=lambda found: found[0] - found[1], default=(None, 0))


@dataclass(frozen=True)
class _CgroupVersion:
    """Where a version of cgroups says what; `droppable` are the lines of memory.stat that the kernel can free at once.

    What is charged and not droppable is used: anonymous memory, and files that no disk backs (tmpfs, shared memory) or
    that are locked, which no page cache gives back; page tables and stacks as well.
    """

    root: str
    controller: str
    limits: tuple[str, ...]
    usage: str
    droppable: tuple[str, ...]


_V1 = _CgroupVersion(
    "memory",
    "memory",
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)
# Above memory.high a process is slowed down until it stands.
_V2 = _CgroupVersion(
    "", "", ("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file", "slab_reclaimable")
)


def _read_cgroup(group: Path, version: _CgroupVersion, total: int) -> tuple[int, int] | None:
    limits = [int(text) for name in version.limits if (text := _text(group / name)).isdigit() and int(text) < total]
    usage = _text(group / version.usage)
    if not limits or not usage.isdigit():
        return None  # the root has no limit, and above it is no group
    stat = dict(line.split(" ", 1) for line in _text(group / "memory.stat").splitlines() if " " in line)
    droppable = sum(int(stat.get(name, 0)) for name in version.droppable)
    return min(limits), max(int(usage) - droppable, 0)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def anonymous_bytes() -> int:
    """Memory of this process that no file backs: what it adds to the machine's load."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:  # read a hundred times a second while tokens are made
            resident, shared = file.read().split()[1:3]
        return (int(resident) - int(shared)) * mmap.PAGESIZE
    except OSError:
        return int(psutil.Process().memory_info().rss)


def peak_host_bytes() -> int:
    """The largest resident set this process ever had, mapped file pages included."""
    with contextlib.suppress(OSError, StopIteration):  # getrusage's is at least that of whoever forked this process
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back_freed() -> None:
    """Give the system what malloc keeps of freed memory, glibc's, which keeps much.

    It finds an aligned block no place in a hole of just its size. So a pass over 512 tokens came to hold 0.6 GB more
    than it ever used at once (13B), and no budget knew of it.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


# The ledger that a budget is held against, and refused memory as one error.


_SAMPLE_S = 0.01


class Ledger:
    """Bytes the runtime holds on the device, by part, and the largest sum they ever had.

    On the CPU this is the measure a budget is held against: pages in flight count as slots, activations as the
    plan counts them for the shapes that really passed. A device with an allocator of its own is asked instead.
    """

    def __init__(self, device: Device, overhead_bytes: int) -> None:
        self._device = device
        self._overhead_bytes = overhead_bytes
        self._parts: dict[str, int] = {}
        self._peak = 0
        self._anonymous_start = anonymous_bytes()
        self._anonymous_peak = self._anonymous_start

    def hold(self, **parts: int) -> None:
        """Set the bytes of the named parts."""
        self._parts.update(parts)
        self._peak = max(self._peak, sum(self._parts.values()))

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure peaks inside: of the parts, and of the process's anonymous memory, sampled by a thread."""
        self.hold(kv_cache=0, states=0, workspace=0, logits=0, slots=0)
        self._peak = sum(self._parts.values())
        self._device.reset_peak()
        stop = threading.Event()
        sampler = BackgroundThread(lambda: self._sample(stop), "griffin-offload-sampler")

        def finish() -> None:
            stop.set()
            sampler.join()
            self.hold(kv_cache=0, states=0, workspace=0, logits=0, slots=0)

        try:
            sampler.start()
            yield
        finally:
            try:
                finish()
            except KeyboardInterrupt:  # a second Ctrl-C must not leave the sampler running
                finish()
                raise

    def _sample(self, stop: threading.Event) -> None:
        ended = False
        while not ended:  # at the start and at the end too: a short run is over before the first wait is
            self._anonymous_peak = max(self._anonymous_peak, anonymous_bytes())
            ended = stop.wait(_SAMPLE_S)
        self._anonymous_peak = max(self._anonymous_peak, anonymous_bytes())

    @property
    def peak_bytes(self) -> int:
        """Peak of the run: asked from the device's allocator, with the runtime's overhead, or as it was counted."""
        asked = self._device.peak_bytes()
        return self._peak if asked is None else asked + self._overhead_bytes

    @property
    def host_growth_bytes(self) -> int:
        """Growth of anonymous memory since loading began, at its sampled peak."""
        return max(self._anonymous_peak - self._anonymous_start, 0)


# Memory that the machine or the device refuses: one error with the numbers, and nothing of the attempt kept alive.


_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_ASKED = re.compile(r"(?:allocate|mmap) ([\d.]+) (bytes|KiB|MiB|GiB)")


class OutOfMemoryAsError:
    """A context manager: OutOfMemory for every way in which Python, torch and the kernel say that there is no memory,
    LimitReached for those in which they say that there are no more files or threads.

    No generator: contextlib's frames would keep the failed ones, and with them their tensors, for as long as somebody
    keeps the error.
    """

    def __init__(
        self,
        doing: str,
        remedy: str,
        device: Device | None = None,
        budget_bytes: int | None = None,
        give_back: Callable[[], object] = lambda: None,
    ) -> None:
        """`device`: that of the computation, None for work of the host alone. `budget_bytes` is told, where there is
        one; `give_back` is called when memory was refused."""
        self._doing, self._remedy, self._device, self._budget_bytes = doing, remedy, device, budget_bytes
        self._give_back = give_back

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, LimitReached):
            return
        limit = limit_reached(error)
        if limit is None and not memory_refused(error):
            return
        message = self._message(error) if limit is None else f"while {self._doing}: {limit}"
        traceback.clear_frames(trace)
        error.__traceback__ = None
        del kind, error, trace
        self._give_back()
        raise OutOfMemory(message) if limit is None else LimitReached(message)

    def _message(self, error: BaseException) -> str:
        budget = f"; the budget is {format_bytes(self._budget_bytes)}" if self._budget_bytes is not None else ""
        return f"out of memory while {self._doing}: {_described(error, self._device)}{budget}: {self._remedy}"


def _described(error: BaseException, device: Device | None) -> str:
    refused = device if device is not None and device.refused(error) else None
    kind = "machine" if refused is None else "device"
    asked = _ASKED.search(str(error))
    wanted = f"({one_line(error)[:120]})" if asked is None else format_bytes(int(float(asked[1]) * _UNITS[asked[2]]))
    limit = _address_limit() if refused is None else None
    if limit is not None:
        return f"the machine refused {wanted}: this process may have {format_bytes(limit)} of addresses (ulimit -v)"
    if asked is None:
        return f"the {kind} refused {wanted}"
    free, _ = host_bytes() if refused is None else refused.memory_bytes()
    return f"the {kind} refused {wanted}, {format_bytes(free)} are free"


def _address_limit() -> int | None:
    """Bytes that the process may map, where a shell or a scheduler has limited them: there is free memory beside."""
    if sys.platform == "win32":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def budget_bytes(config: LoadConfig, device: Device, *, absent: bool = False) -> int:
    """The device budget in bytes. In host memory there is one budget, so only one of the two limits may be given; of a
    device that is `absent` it has to be named."""
    if absent:
        return _size_of_absent(config.max_gpu_mem, device)
    limit = config.max_gpu_mem
    if device.shares_host_memory and config.max_cpu_mem is not None:
        if limit != "auto":
            raise UsageError(
                "on the CPU device there is one budget: give --max-gpu-mem (or its alias --max-mem) alone, "
                "without --max-cpu-mem"
            )
        limit = config.max_cpu_mem
    free, total = device.memory_bytes()
    budget = parse_size(limit, total_bytes=total, free_bytes=free)
    if device.shares_host_memory and isinstance(limit, str) and limit.strip().lower() == "auto":
        return min(budget, free - min(HOST_OVERHEAD_BYTES, free // 3))  # a tenth of little holds no program
    return budget


def beside_bytes(device: Device, model_bytes: int) -> int | None:
    """What a process may come to hold beside its budget, of a model of `model_bytes`; None where nothing is stated."""
    return HOST_OVERHEAD_BYTES if device.shares_host_memory and model_bytes > LARGE_MODEL_BYTES else None


def _size_of_absent(size: str | int, device: Device) -> int:
    """Bytes of a device whose memory cannot be asked; UsageError where that would be needed."""
    if isinstance(size, str) and (size.strip().lower() == "auto" or size.strip().endswith("%")):
        raise UsageError(
            f"no {device.name} device is here whose memory could be asked: give --max-gpu-mem as a size, such as 12GB"
        )
    return parse_size(size)


def session_bytes(config: LoadConfig, device: Device, *, absent: bool) -> int:
    """Set aside for contexts that are kept beside the one in use."""
    if config.session_mem is None:
        return 0
    if absent:
        return _size_of_absent(config.session_mem, device)
    return parse_size(config.session_mem, total_bytes=device.memory_bytes()[1])
