"""A directory that cases damage, and what is watched while they do."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
_NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pickle.find_class")
_NEVER += ("socket.connect", "socket.getaddrinfo")


class Place:
    """A directory of valid files that a case damages; whole again before the next one."""

    def __init__(self, root: Path, files: dict[str, bytes]) -> None:
        self.root, self.directory, self.out = root, root / "model", root / "written"
        self.outside = root / "outside"
        self.watched = False
        """Whether what is opened now is the package's doing, and not ours."""
        self.files, self._touched = files, set(files)
        for directory in (self.directory, self.outside):
            directory.mkdir(parents=True)
        for name, content in files.items():
            (self.outside / name).write_bytes(content)  # a name that leads out of the directory finds something
        self.restore()
        self._left = self._listing()

    def valid(self, name: str) -> bytes:
        return self.files[name]

    def write(self, name: str, content: bytes) -> Path:
        with self._unwatched(name) as path:
            path.write_bytes(content)
        return path

    def link(self, name: str, target: str) -> None:
        with self._unwatched(name) as path:
            path.symlink_to(target)

    def remove(self, name: str) -> None:
        with self._unwatched(name):
            pass

    @contextlib.contextmanager
    def _unwatched(self, name: str) -> Iterator[Path]:
        """The path of a file of ours that is not there any more."""
        watched, self.watched = self.watched, False
        self._touched.add(name)
        path = self.directory / name
        path.unlink(missing_ok=True)
        yield path
        self.watched = watched

    def restore(self) -> None:
        for name in self._touched:
            path = self.directory / name
            path.unlink(missing_ok=True)
            if name in self.files:
                path.write_bytes(self.files[name])
        self._touched.clear()
        shutil.rmtree(self.out, ignore_errors=True)

    def strays(self) -> list[str]:
        """Files that a case left behind, the output directory aside."""
        ours = {str(self.directory / name) for name in self._touched}
        return sorted((self._listing() ^ self._left) - ours)

    def _listing(self) -> set[str]:
        return {
            os.path.join(folder, name)
            for folder, _, names in os.walk(self.root)
            for name in names
            if not folder.startswith(str(self.out))
        }


class Watch:
    """An audit hook: opening for writing, changing names, running code of the checkpoint, processes, connections."""

    def __init__(self, place: Place) -> None:
        self._place, self._root, self._out = place, str(place.root), str(place.out)
        self._outside = str(place.outside)
        self.found: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._place.watched:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int):
                return
            name = os.path.abspath(os.fsdecode(path))
            if (flags & _WRITES and not self._may_write(name)) or name.startswith(self._outside):
                self.found.append(f"opened {name}")
        elif event in _CHANGES:
            names = [
                os.path.abspath(os.fsdecode(name)) for name in arguments if isinstance(name, str | bytes | os.PathLike)
            ]
            if not all(self._may_write(name) for name in names):
                self.found.append(f"{event} {names}")
        elif event in _NEVER or (event == "exec" and str(arguments[0].co_filename).startswith(self._root)):
            self.found.append(f"{event} {arguments[:2]!r}")
            raise PermissionError(f"{event} in a fuzz case")

    def _may_write(self, name: str) -> bool:
        return name == os.devnull or name.startswith(self._out)
