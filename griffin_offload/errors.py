"""Every error a user can cause, each with the exit code the command line gives it.

GriffinError                    1  anything that went wrong while running
+-- Busy                        1  other calls kept the model for longer than this one wanted to wait
+-- UsageError                  2  a flag, an argument or a prompt that cannot be used
+-- DoesNotFit                  3  the budget, the context or the memory of this machine is too small
|   +-- OutOfMemory             3  the machine or the device refused memory while loading or running
+-- LimitReached                1  a limit of the process or the machine on open files or threads
+-- NotFinite                   1  the model computed numbers that its precision cannot hold
+-- ModelError                  4  the model cannot be used
|   +-- ModelNotFound           4  no such directory, or not in the hub's cache
|   +-- CheckpointError         4  files missing, truncated or contradicting the config
|   |   +-- CheckpointChanged   4  files that were changed after the model was loaded from them
|   |   +-- TemplateError       4  its chat template fails, or refuses the messages
|   +-- UnsupportedModel        4  no known feed-forward layout
+-- SavedContextError           4  a saved prompt or conversation cannot be written or used

Messages are one line: what was found, the numbers, and the remedy after a colon or semicolon.
"""

import errno
import os
from pathlib import Path

# Of a line on a terminal: enough for the longest of ours with two paths in it.
_MOST_LETTERS = 1500


class GriffinError(Exception):
    """Base of all errors this package raises for its users."""

    exit_code = 1

    def __str__(self) -> str:
        """One line without letters that a terminal would obey: names in it may come from files of strangers."""
        return _printable(super().__str__())


class Busy(GriffinError):
    """Other calls kept the model for longer than this one wanted to wait; nothing was done."""


class UsageError(GriffinError):
    """A value that cannot be used: the caller has to change it."""

    exit_code = 2


class DoesNotFit(GriffinError):
    """The request needs more bytes than the budget allows; the message names the shortfall by part."""

    exit_code = 3


class OutOfMemory(DoesNotFit):
    """Memory was refused by the machine or the device. The model, if it is loaded, can be asked for less."""


class LimitReached(GriffinError):
    """The process or the machine may have no more open files or threads; there is memory enough."""


class NotFinite(GriffinError):
    """The model's logits are no numbers, so that no token can be chosen."""


class ModelError(GriffinError):
    """The model cannot be used."""

    exit_code = 4


class ModelNotFound(ModelError):
    """Neither a directory nor a model id that can be reached."""


class CheckpointError(ModelError):
    """The files of a checkpoint are missing, damaged or contradict its config."""


class TemplateError(CheckpointError):
    """A chat template, a program of the checkpoint's author, fails or refuses messages."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the model's chat template fails, --raw turns it off: {reason}")
        self.reason = reason


class CheckpointChanged(CheckpointError):
    """A file that weights are read from is not what it was when they were loaded: load the model again."""


class UnsupportedModel(ModelError):
    """The model has no feed-forward block of a known layout."""


class SavedContextError(GriffinError):
    """A saved prompt or conversation cannot be written, or not be used here: damaged, another model's, too new."""

    exit_code = 4


def one_line(error: BaseException) -> str:
    """What another library's `error` says, in one line of bounded length."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def as_line(error: BaseException) -> str:
    """Any error for a terminal: one printable line of bounded length."""
    return _printable(str(error))


def _printable(said: str) -> str:
    line = " ".join(said.split())
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line[:_MOST_LETTERS])
    return shown + "..." * (len(line) > _MOST_LETTERS)


# What torch, its kernels, the kernel's system calls and thread libraries say, for want of a class of their own.
_REFUSALS = ("allocate memory", "out of memory", "bad_alloc", "could not create a memory")
_FILES = (errno.EMFILE, errno.ENFILE)
_THREADS = ("start new thread", "thread creation failed", "failed to spawn thread")


def limit_reached(error: BaseException) -> str | None:
    """Which limit `error` tells of and how it is raised, or None: of open files or of threads, which Python, torch
    and the libraries in Rust each say in their own way."""
    if isinstance(error, GriffinError):
        return limit_reached(error.__cause__) if error.__cause__ is not None else None
    said = str(error)
    if (isinstance(error, OSError) and error.errno in _FILES) or "Too many open files" in said:
        return "the limit on open files is reached (ulimit -n): raise it, or close files"
    if any(words in said for words in _THREADS):
        return "no more threads can be started (ulimit -u, or the container's limit on processes): raise it"
    return None


# What to do about a file that cannot be used, by the number that the system gives.
_CHECK, _SHORTER, _ROOM, _ELSEWHERE = "check the name", "give a shorter one", "make room there", "name another place"
_REMEDIES = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ELOOP), _CHECK),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), f"{_ROOM}, or {_ELSEWHERE}"),
    **{errno.ENAMETOOLONG: _SHORTER, errno.EISDIR: "name a file", errno.EROFS: _ELSEWHERE},
}


def unreadable(path: Path, error: Exception) -> str:
    """Why the system does not let a file be read, and the remedy, in one line."""
    return f"{path} cannot be read: {why_unusable(path, error)}"


def unwritable(path: Path, error: Exception) -> str:
    """The same of one that is to be written."""
    return f"{path} cannot be written: {why_unusable(path, error, 'write to')}"


def why_unusable(path: Path, error: Exception, use: str = "read") -> str:
    """The reason and the remedy alone. Others than OSErrors are of names that cannot be one, or of what files hold."""
    if not isinstance(error, OSError):
        return one_line(error)
    reason = limit_reached(error) or error.strerror or one_line(error)
    if isinstance(error, PermissionError):
        return f"{reason} {_forbidden(path, use)} (chmod, or chown)"
    if error.errno == errno.ENOENT and path.is_symlink():  # as in a copy of the hub's cache
        return (
            f"it is a link to {os.readlink(path)}, which is not there: copy what it names (cp -L), or download it again"
        )
    remedy = _REMEDIES.get(error.errno or 0)
    return reason if remedy is None else f"{reason}: {remedy}"


def _forbidden(path: Path, use: str) -> str:
    """Whose mode keeps this user out: the file's, or that of a directory on the way to it, or to what it is a link
    to."""
    for place in (path, *Path(os.path.realpath(path)).parents, *path.absolute().parents):
        try:
            mode = place.stat().st_mode & 0o7777
        except PermissionError:
            use = "enter"
        except OSError:
            continue
        else:
            return f"{'' if place == path else f'in {place} '}(mode {mode:o}): let this user {use} it"
    return f"(mode unknown): let this user {use} it"


def memory_refused(error: BaseException) -> bool:
    """Whether `error` says that there is no memory: MemoryError, ENOMEM, or other libraries' words for it."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if isinstance(error, GriffinError):
        return error.__cause__ is not None and memory_refused(error.__cause__)
    return isinstance(error, Exception) and any(words in str(error) for words in _REFUSALS)


class BudgetExceeded(UserWarning):
    """Measured memory went past the budget: a bug of ours, never hidden from the user."""
