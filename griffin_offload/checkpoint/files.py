"""Files by names that every library can open; files that are either whole or absent: written under a temporary name, on
the disk before they get their own.
"""

import codecs
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from griffin_offload.errors import CheckpointError, UsageError, limit_reached


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


def unreadable(path: Path, error: OSError) -> str:
    """Why the system does not let a file be read, in one line."""
    reason = limit_reached(error) or error.strerror or str(error)
    if isinstance(error, PermissionError):
        reason += f" (mode {_mode(path)}): let this user read it (chmod, or chown)"
    return f"{path} cannot be read: {reason}"


def _mode(path: Path) -> str:
    try:
        return f"{path.stat().st_mode & 0o7777:o}"
    except OSError:
        return "unknown"


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
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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


def read_text(path: Path) -> str:
    """The text in a file, line ends made "\\n" and without its byte order mark, which would become tokens. Raises
    OSError, and ValueError where it is no text."""
    return decoded(path.read_bytes())


def decoded(content: bytes, otherwise: str = "utf-8") -> str:
    """The same for the bytes of a file, in the encoding `otherwise` where no mark names another."""
    named = next((encoding for mark, encoding in _MARKS if content.startswith(mark)), otherwise)
    if named == "utf-8" and b"\0" in content[:2]:  # every second byte of a plain text, without a mark
        raise ValueError("it looks like UTF-16 without a byte order mark: save it as UTF-8")
    return content.decode(named).replace("\r\n", "\n").replace("\r", "\n")
