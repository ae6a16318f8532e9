"""Files that weights are read from, remembered as they were, so that a change is an error and no wrong answer."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from griffin_offload.errors import CheckpointChanged
from griffin_offload.weights import bus_errors


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
        bus_errors.watch(path, self._on_lost)

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
            bus_errors.unwatch(path, self._on_lost)
        self._states = {}
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])


def states_of(paths: Iterable[str]) -> dict[str, FileState]:
    """The states of files at the moment, to give to `WatchedFiles` later. Raises OSError."""
    return {path: FileState.of(os.stat(path)) for path in paths}


def _changed(path: str, what: str) -> CheckpointChanged:
    return CheckpointChanged(f"{path} has changed since it was loaded ({what}): load the model again")
