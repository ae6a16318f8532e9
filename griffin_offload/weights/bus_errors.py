"""Bus errors: the signal for touching mapped pages whose file was truncated, or whose disk fails.

It ends a process at that instruction, without a word. Here zeros take the place of the lost pages instead, the
computation goes on with them, and who watches the file is told, and raises an error before a number reaches anybody.
The signal comes in the thread that touched the page, inside a kernel that multiplies or copies; Python code runs in the
handler, by ctypes, which is not allowed while the thread is inside malloc or Python, and weights are not touched there.
"""

import ctypes
import struct
import sys
import threading
from collections.abc import Callable

from griffin_offload.weights.mappings import mapping_at

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
    found = mapping_at(address)
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
