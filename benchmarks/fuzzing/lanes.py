"""Forked processes, each with its share of the cases: one that hangs or dies is replaced."""

import faulthandler
import json
import os
import selectors
import signal
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fuzzing import worker
from fuzzing.place import Place
from fuzzing.worker import Case, Verdict, run_cases


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
        self._pipe, self._partial = read, b""
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
            faulthandler.disable()
            run_cases(self._case, self._rest, self._seed, place, lambda v: print(json.dumps(asdict(v)), file=pipe))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def fileno(self) -> int:
        return self._pipe

    def listen(self) -> bool:
        """Take all lines that have come, as nobody tells of lines in a buffer; whether there is more to come."""
        return self._take_lines() or self._ended("died")

    def _take_lines(self) -> bool:
        """False: the process has ended."""
        data = os.read(self._pipe, 2**16)
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            verdict = Verdict(**json.loads(line))
            self._heard, self._running = time.monotonic(), verdict.index
            if verdict.outcome != "started":
                self._finish(verdict)
        return bool(data)

    def hangs(self) -> bool:
        return time.monotonic() - self._heard > worker.LIMIT_S + worker.GRACE_S

    def stop(self) -> bool:
        """Kill a process in which native code hangs; whether there is more to come."""
        os.kill(self._pid, signal.SIGKILL)
        while self._take_lines():
            pass
        return self._ended("time")

    def _finish(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        self._rest.remove(verdict.index)
        self._running = None

    def _ended(self, outcome: str) -> bool:
        os.close(self._pipe)
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
