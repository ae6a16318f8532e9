"""Cases in forked processes that are limited and watched: time, memory, and what they open, run and leave behind."""

import contextlib
import json
import os
import random
import resource
import selectors
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from griffin_offload.errors import GriffinError

# Of one case; far above what a machine that is busy with other things needs for it.
LIMIT_S = 20.0
# Native code does not see the alarm: then the process is killed.
GRACE_S = 10.0
# A case may add this much to the peak; the address space allows more, so that the peak is seen to pass it.
MEMORY_BYTES = 512 * 2**20
_ADDRESS_BYTES = 2 * 2**30
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
_NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pickle.find_class")
_NEVER += ("socket.connect", "socket.getaddrinfo")

OUTCOMES = ("accepted", "refused", "unnamed", "time", "memory", "watch", "died")
"""Read; a named error; any other exception or text; too long; too much; wrote, ran or connected; the process died."""
BAD = OUTCOMES[2:]
Case = Callable[[random.Random, "Place"], None]
"""Writes a damaged file and reads it; returns where the package accepts it."""


class Unnamed(Exception):
    """What a case found wrong by itself."""


class TooLong(BaseException):
    """The alarm; no `except Exception` stops it."""


@dataclass(frozen=True)
class Verdict:
    """How one case ended."""

    index: int
    outcome: str
    detail: str = ""
    seconds: float = 0.0


class Place:
    """A directory of valid files that a case damages; whole again before the next one."""

    def __init__(self, root: Path, files: dict[str, bytes]) -> None:
        self.root, self.directory, self.out = root, root / "model", root / "written"
        self.outside = root / "outside"
        self.watched = False
        """Whether what is opened now is the package's doing, and not ours."""
        self._files, self._touched = files, set(files)
        for directory in (self.directory, self.outside):
            directory.mkdir(parents=True)
        for name, content in files.items():
            (self.outside / name).write_bytes(content)  # a name that leads out of the directory finds something
        self.restore()
        self._left = self._listing()

    def valid(self, name: str) -> bytes:
        return self._files[name]

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
            if name in self._files:
                path.write_bytes(self._files[name])
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
            if not folder.startswith(str(self.out)) and not name.startswith("noise")
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


def run_cases(case: Case, indices: Sequence[int], seed: str, place: Place, report: Callable[[Verdict], None]) -> None:
    """In a process of its own: every case in turn. Case `index` is the same whatever ran before it."""
    _limit_memory()
    watch = Watch(place)
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGALRM, _alarm)
    for index in indices:
        report(Verdict(index, "started"))
        place.restore()
        peak, begin = _peak_bytes(), time.perf_counter()
        watch.found.clear()
        outcome, detail = _outcome(case, random.Random(f"{seed}/{index}"), place)
        grown = _peak_bytes() - peak
        if watch.found:
            outcome, detail = "watch", "; ".join(watch.found)[:500]
        elif strays := place.strays():
            outcome, detail = "watch", f"left {strays[:5]}"
        elif grown > MEMORY_BYTES and outcome != "time":
            outcome, detail = "memory", f"{grown / 1e6:.0f} MB more ({detail})"
        report(Verdict(index, outcome, detail, time.perf_counter() - begin))
        if outcome in ("time", "memory", "watch"):
            return  # what it holds or left would be counted to the next one


def _outcome(case: Case, generator: random.Random, place: Place) -> tuple[str, str]:
    try:
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        place.watched = True
        case(generator, place)
    except GriffinError as error:
        if any(isinstance(cause, MemoryError) for cause in _causes(error)):
            return "memory", str(error)[:300]
        return "refused", type(error).__name__
    except TooLong:
        return "time", _where()
    except BaseException as error:  # an unnamed one, panics of native libraries included, is what is looked for
        return "unnamed", f"{type(error).__name__}: {str(error)[:200]} {_where()}"
    else:
        return "accepted", ""
    finally:
        place.watched = False
        signal.setitimer(signal.ITIMER_REAL, 0)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _where() -> str:
    frames = traceback.extract_tb(sys.exc_info()[2])
    frames = [frame for frame in frames if frame.filename != __file__]
    ours = [frame for frame in frames if "griffin_offload/" in frame.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in [*ours[-1:], *frames[-1:]])


def _alarm(signum: int, frame: FrameType | None) -> None:
    raise TooLong


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Lane:
    """One forked process and the cases it has still to run."""

    def __init__(self, case: Case, indices: Sequence[int], seed: str, root: Path, files: dict[str, bytes]) -> None:
        self._case, self._seed, self._root, self._files = case, seed, root, files
        self._rest, self._forks = list(indices), 0
        self.verdicts: list[Verdict] = []
        self._start()

    def _start(self) -> None:
        self._forks += 1
        self._running: int | None = None
        read, write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(read)
            self._child(write)
        os.close(write)
        self._pipe = os.fdopen(read)
        self._heard = time.monotonic()

    def _child(self, descriptor: int) -> None:
        """Never returns."""
        code = 1
        try:
            pipe = os.fdopen(descriptor, "w", buffering=1)
            place = Place(self._root / str(self._forks), self._files)
            noise = os.open(place.root / "noise", os.O_RDWR | os.O_CREAT)
            os.dup2(noise, 1)
            os.dup2(noise, 2)
            warnings.simplefilter("ignore")
            run_cases(self._case, self._rest, self._seed, place, lambda v: print(json.dumps(asdict(v)), file=pipe))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def fileno(self) -> int:
        return self._pipe.fileno()

    def listen(self) -> bool:
        """Take one line; whether there is more to come."""
        line = self._pipe.readline()
        if not line:
            return self._ended("died")
        verdict = Verdict(**json.loads(line))
        self._heard, self._running = time.monotonic(), verdict.index
        if verdict.outcome != "started":
            self._finish(verdict)
        return True

    def hangs(self) -> bool:
        return time.monotonic() - self._heard > LIMIT_S + GRACE_S

    def stop(self) -> bool:
        """Kill a process in which native code hangs; whether there is more to come."""
        os.kill(self._pid, signal.SIGKILL)
        return self._ended("time")

    def _finish(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        self._rest.remove(verdict.index)
        self._running = None

    def _ended(self, outcome: str) -> bool:
        self._pipe.close()
        _, status = os.waitpid(self._pid, 0)
        if self._running is not None:
            said = (self._root / str(self._forks) / "noise").read_bytes()[-300:].decode(errors="replace")
            self._finish(Verdict(self._running, outcome, f"wait status {status}: {' '.join(said.split())}"))
        elif status and not os.WIFSIGNALED(status):
            raise SystemExit(f"error: a worker of {self._seed} failed outside of its cases")
        if self._rest:
            self._start()
            return True
        return False


def run_lanes(lanes: list[Lane]) -> list[Verdict]:
    """Until every case of every lane has ended."""
    open_lanes = list(lanes)
    while open_lanes:
        with selectors.DefaultSelector() as selector:
            for lane in open_lanes:
                selector.register(lane, selectors.EVENT_READ)
            ready = {key.fileobj for key, _ in selector.select(1.0)}
        for lane in list(open_lanes):
            goes_on = lane.listen() if lane in ready else lane.stop() if lane.hangs() else True
            if not goes_on:
                open_lanes.remove(lane)
    return sorted((v for lane in lanes for v in lane.verdicts), key=lambda verdict: verdict.index)
