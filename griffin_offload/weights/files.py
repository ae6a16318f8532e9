"""Files by names that every library can open; files that are either whole or absent: written under a temporary name, on
the disk before they get their own.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from griffin_offload.errors import UsageError


def check_name(path: Path) -> None:
    """UsageError for a name that is no Unicode text: Python opens it, torch and safetensors do not."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{str(path)!a} is not UTF-8, and cannot be opened by all that has to: rename it") from None


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
