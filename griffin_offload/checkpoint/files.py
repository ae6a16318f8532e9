"""Files: by names that every library can open; either whole or absent (written under a temporary name, on the disk
before they get their own); and remembered as they were, so that a change is an error and no wrong answer.
"""

import bisect
import codecs
import contextlib
import ctypes
import os
import stat
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from griffin_offload.errors import CheckpointChanged, CheckpointError, UsageError, unreadable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def check_name(path: Path) -> None:
    """UsageError for a name that is no Unicode text: Python opens it, torch and safetensors do not."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{str(path)!a} is not UTF-8, and cannot be opened by all that has to: rename it") from None


# How a clone without git-lfs has every large file.
_POINTER = b"version https://git-lfs.github.com/spec/"


def check_content(path: Path) -> None:
    """CheckpointError for a file that cannot be read, with the reason that the system gives, or that is only a pointer
    to the real one."""
    try:
        with path.open("rb") as file:
            begins = file.read(len(_POINTER))
    except OSError as error:
        raise CheckpointError(unreadable(path, error)) from error
    if begins == _POINTER:
        raise CheckpointError(f"{path} is a pointer of git-lfs and not the file: run git lfs pull, or download it")


@contextlib.contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path` when the block ends well, on the disk and not only in the cache."""
    temporary = temporary_name(path)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # of the same reason
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):  # a full disk names none
            error.filename = str(path)
        raise


@contextlib.contextmanager
def one_writer(path: Path, what: str) -> Iterator[None]:
    """Keep others who call this out of `path`, a file or a directory; UsageError if one, a `what`, is there already."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another {what} is writing {path}: wait for it or stop it") from None
        yield
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write `text` and a newline."""
    with renamed(path) as temporary:
        temporary.write_text(text + "\n")


def temporary_name(path: Path) -> Path:
    """What `path` is called until it is whole."""
    return path.with_name(f".{path.name}.tmp")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


# Texts that users wrote with whatever editor they have: UTF-8, or what a byte order mark at the start says.


# The longest first: one of UTF-32 begins as one of UTF-16 does.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


_MOST_PIPED = 2**28


def read_text(path: Path) -> str:
    """The text in a file, line ends made "\\n" and without its byte order mark, which would become tokens. Raises
    OSError, and ValueError where it is no text, or a device that gives more and more."""
    with path.open("rb") as file:
        regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        content = file.read(-1 if regular else _MOST_PIPED + 1)
    if not regular and len(content) > _MOST_PIPED:
        raise ValueError(f"it is no file, and gives more than {_MOST_PIPED} bytes: name a file")
    return decoded(content)


def decoded(content: bytes, otherwise: str = "utf-8") -> str:
    """The same for the bytes of a file, in the encoding `otherwise` where no mark names another."""
    named = next((encoding for mark, encoding in _MARKS if content.startswith(mark)), otherwise)
    if named == "utf-8" and b"\0" in content[:2]:  # every second byte of a plain text, without a mark
        raise ValueError("it looks like UTF-16 without a byte order mark: save it as UTF-8")
    return content.decode(named).replace("\r\n", "\n").replace("\r", "\n")


# Files that weights are read from, remembered as they were, so that a change is an error and no wrong answer.


# Which files are mapped into this process, and where: /proc/self/maps.


_DELETED = " (deleted)"
_NO_FILES = ("/dev/", "/memfd:", "/SYSV", "/anon_hugepage")


@dataclass(frozen=True)
class FileMapping:
    """Addresses that belong to a file, from its byte `offset` on."""

    start: int
    end: int
    offset: int
    path: str
    """Where the file is, or was when it was mapped; empty for memory without a file."""
    deleted: bool = False
    """No name leads to the mapped file any more: it was deleted, or another one took its place."""


class Mappings:
    """What was mapped into this process when this was made; nothing if not Linux. Most are libraries: what a line says
    is read when it is asked for."""

    def __init__(self) -> None:
        self._lines = _lines()
        self._starts = [int(line[: line.index(b"-")], 16) for line in self._lines]  # the kernel sorts them
        self._read: dict[int, FileMapping] = {}

    def __bool__(self) -> bool:
        return bool(self._lines)

    def around(self, start: int, end: int) -> FileMapping | None:
        """The one that all of these addresses lie in, a file's or not."""
        at = bisect.bisect_right(self._starts, start) - 1
        if at >= 0 and at not in self._read:
            self._read[at] = _mapping(self._lines[at])
        found = self._read.get(at)
        return found if found is not None and end <= found.end else None


def _lines() -> list[bytes]:
    maps = Path("/proc/self/maps")
    if not sys.platform.startswith("linux") or not maps.is_file():
        return []
    # Bytes: a name need not be UTF-8, and may hold what str.splitlines takes for the end of a line.
    return [line for line in maps.read_bytes().split(b"\n") if line]


def _mapping(line: bytes) -> FileMapping:
    fields = line.split(maxsplit=5)
    start, end = fields[0].split(b"-")
    path, deleted = _path(os.fsdecode(fields[5])) if len(fields) == 6 else ("", False)
    return FileMapping(int(start, 16), int(end, 16), int(fields[2], 16), path, deleted)


def _path(name: str) -> tuple[str, bool]:
    """The file that `name` means, and whether it has no name any more; ("", False) for memory that is no file's."""
    if not name.startswith("/") or name.startswith(_NO_FILES):
        return "", False
    # The kernel writes a newline as \012, and a backslash as it is: what exists decides.
    plain = name.replace("\\012", "\n")
    for path in (name, plain):
        # Not by its end: in the hub's cache a shard is a link to a file that is called by its hash.
        if os.path.isfile(path):
            return path, False
    return (plain.removesuffix(_DELETED), True) if plain.endswith(_DELETED) else ("", False)


# Bus errors: the signal for touching mapped pages whose file was truncated, or whose disk fails.


Lost = Callable[[str], None]
"""Called with the path of a file that has lost pages, in whichever thread missed them."""

_SIGBUS = 7
_SA_SIGINFO, _SA_NODEFER = 4, 0x40000000
_CODE_OFFSET, _ADDRESS_OFFSET = 8, 16  # of si_code and si_addr in siginfo_t, where pointers have 64 bits
_BUS_ADRERR = 2  # others are of the machine's memory
_PROT_READ_WRITE = 3
_MAP_PRIVATE_FIXED_ANONYMOUS_NORESERVE = 0x2 | 0x10 | 0x20 | 0x4000
_SUPPORTED = sys.platform == "linux" and struct.calcsize("P") == 8
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """struct sigaction of glibc and musl."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_lock = threading.Lock()
_watchers: dict[str, tuple[Lost, ...]] = {}  # entries are replaced, never changed: the handler takes no lock
_before = _Action()


def watch(path: str, lost: Lost) -> None:
    """From now on until `unwatch`, a bus error in a mapping of `path` calls `lost`. Does nothing if not Linux."""
    with _lock:
        if not _watchers and _SUPPORTED:
            _sigaction(_action, _before)
        _watchers[path] = (*_watchers.get(path, ()), lost)


def unwatch(path: str, lost: Lost) -> None:
    """The end of `watch` with the same arguments; with the last one the signal is again what it was."""
    with _lock:
        left = tuple(other for other in _watchers[path] if other != lost)
        if left:
            _watchers[path] = left
        else:
            del _watchers[path]
        if not _watchers and _SUPPORTED:
            _restore()


def _restore() -> None:
    """Unless somebody has taken the signal after us."""
    current = _Action()
    _sigaction(None, current)
    if current.handler == _action.handler:
        _sigaction(_before, None)


def _sigaction(new: _Action | None, old: _Action | None) -> None:
    pointers = [ctypes.byref(action) if action is not None else None for action in (new, old)]
    ctypes.CDLL(None).sigaction(_SIGBUS, *pointers)


def _on_bus_error(_: int, info: int, __: int) -> None:
    try:
        code = ctypes.c_int.from_address(info + _CODE_OFFSET).value
        handled = code == _BUS_ADRERR and _replace(ctypes.c_uint64.from_address(info + _ADDRESS_OFFSET).value)
    except BaseException:  # none may leave a handler
        handled = False
    if not handled:
        _sigaction(_before, None)  # the same instruction fails again, and now it is somebody else's


def _replace(address: int) -> bool:
    """Put zeros in place of the mapping around `address`, if it is a watched file's, and tell its watchers."""
    found = Mappings().around(address, address + 1)
    if found is None or found.path not in _watchers:
        return found is not None and not found.path  # zeros are there already: several threads missed the same pages
    for lost in _watchers[found.path]:  # before zeros are there: nothing else tells
        lost(found.path)
    mmap = ctypes.CDLL(None).mmap
    mmap.restype = ctypes.c_void_p
    mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    flags = _MAP_PRIVATE_FIXED_ANONYMOUS_NORESERVE
    return bool(mmap(found.start, found.end - found.start, _PROT_READ_WRITE, flags, -1, 0) == found.start)


_handler = _Handler(_on_bus_error)  # lives as long as the process: the kernel knows its address
_action = _Action(ctypes.cast(_handler, ctypes.c_void_p).value, flags=_SA_SIGINFO | _SA_NODEFER)


@dataclass(frozen=True)
class FileState:
    """What tells whether a file is another one, or has other contents."""

    device: int
    inode: int
    nbytes: int
    modified_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> "FileState":
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


class WatchedFiles:
    """Open descriptors of some files, and their state when they were opened.

    Two questions: `check`, before weights are used again, whether names and contents are what they were; and
    `check_contents`, after some were used, whether these were the right ones: a deleted file's are. Both cost
    microseconds per file. Lost pages (`bus_errors`) are told by both.
    """

    def __init__(self, paths: Iterable[str], known: Mapping[str, FileState] | None = None) -> None:
        """`paths` are resolved ones, as the kernel names mapped files; `known` are states from before, to hold them
        against. Raises OSError for a file that cannot be opened, CheckpointChanged for such a known one."""
        self._known = known or {}
        self.descriptors: dict[str, int] = {}
        self._states: dict[str, FileState] = {}
        self._lost: set[str] = set()
        self._on_lost = self._lost.add
        try:
            for path in paths:
                self._open(path)
        except BaseException:
            self.close()
            raise

    def _open(self, path: str) -> None:
        try:
            self.descriptors[path] = os.open(path, os.O_RDONLY)
        except OSError as error:
            if path not in self._known:
                raise
            raise _changed(path, f"it cannot be opened any more: {error.strerror}") from error
        self._states[path] = self._known.get(path) or FileState.of(os.fstat(self.descriptors[path]))
        watch(path, self._on_lost)

    def check(self) -> None:
        """CheckpointChanged if a file is not what it was, or its name leads elsewhere."""
        self.check_contents()
        for path, state in self._states.items():
            try:
                now = FileState.of(os.stat(path))
            except OSError as error:
                raise _changed(path, f"it cannot be found any more: {error.strerror}") from error
            if (now.device, now.inode) != (state.device, state.inode):
                raise _changed(path, "another file took its place")

    def check_contents(self, paths: Iterable[str] | None = None) -> None:
        """CheckpointChanged if one of `paths` (None: of all), under whatever name, was written to or cut since."""
        for path in self._states if paths is None else paths:
            if path in self._lost:
                raise _changed(path, "parts of it are gone: it was cut, or its disk fails")
            before, now = self._states[path], FileState.of(os.fstat(self.descriptors[path]))
            if (now.device, now.inode) != (before.device, before.inode):
                raise _changed(path, "another file took its place")
            if now.nbytes != before.nbytes:
                raise _changed(path, f"from {before.nbytes} to {now.nbytes} bytes")
            if now != before:
                raise _changed(path, "it was written to")

    def close(self) -> None:
        """Close the descriptors; nothing is watched any more."""
        for path in self._states:
            unwatch(path, self._on_lost)
        self._states = {}
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])


def states_of(paths: Iterable[str]) -> dict[str, FileState]:
    """The states of files at the moment, to give to `WatchedFiles` later. Raises OSError."""
    return {path: FileState.of(os.stat(path)) for path in paths}


def _changed(path: str, what: str) -> CheckpointChanged:
    return CheckpointChanged(f"{path} has changed since it was loaded ({what}): load the model again")
