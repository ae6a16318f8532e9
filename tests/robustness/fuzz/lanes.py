"""Forked processes, each with its share of the cases: one that hangs or dies is replaced."""

import faulthandler
import json
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from processes import Child
from robustness.fuzz import worker
from robustness.fuzz.place import Place
from robustness.fuzz.worker import Case, Verdict, run_cases

_POLL_S = 0.005


class Lane:
    """One forked process and the cases it has still to run."""

    def __init__(self, case: Case, indices: Sequence[int], seed: str, root: Path, files: dict[str, bytes]) -> None:
        self._case, self._seed, self._root, self._files = case, seed, root, files
        self._rest, self._forks = list(indices), 0
        self.verdicts: list[Verdict] = []
        self._start()

    def _start(self) -> None:
        """A new process with what is left; it tells in one file and makes its noise in another."""
        self._forks += 1
        self._running: int | None = None
        folder = self._root / str(self._forks)
        folder.mkdir(parents=True)
        self._told, self._noise, self._partial = (folder / "told").open("w+b", 0), folder / "noise", b""
        self._taken = 0
        with self._noise.open("wb") as noise:
            self._child = Child(self._work, [noise.fileno()] * 3)
        self._heard = time.monotonic()

    def _work(self) -> int:
        place = Place(self._root / str(self._forks) / "place", self._files)
        warnings.simplefilter("ignore")
        faulthandler.disable()
        told = os.fdopen(os.dup(self._told.fileno()), "w", buffering=1)
        run_cases(self._case, self._rest, self._seed, place, lambda v: print(json.dumps(asdict(v)), file=told))
        return 0

    def goes_on(self) -> bool:
        """Whether there is more to come."""
        over = self._child.over()  # asked first: what it told is complete then
        self._take_lines()
        if over:
            return self._ended("died")
        if time.monotonic() - self._heard > worker.LIMIT_S + worker.GRACE_S:  # native code hangs
            self._child.ends_within(0)
            self._take_lines()
            return self._ended("time")
        return True

    def _take_lines(self) -> None:
        data = os.pread(self._told.fileno(), 2**24, self._taken)
        self._taken += len(data)
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            verdict = Verdict(**json.loads(line))
            self._heard, self._running = time.monotonic(), verdict.index
            if verdict.outcome != "started":
                self._finish(verdict)

    def _finish(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        self._rest.remove(verdict.index)
        self._running = None

    def _ended(self, outcome: str) -> bool:
        self._told.close()
        if self._running is not None:
            said = " ".join(self._noise.read_bytes()[-300:].decode(errors="replace").split())
            self._finish(Verdict(self._running, outcome, f"exit code {self._child.code}: {said}"))
        elif self._child.code and self._child.code > 0:
            raise SystemExit(f"error: a worker of {self._seed} failed outside of its cases")
        if self._rest:
            self._start()
            return True
        return False


def run_lanes(lanes: list[Lane]) -> list[Verdict]:
    """Until every case of every lane has ended."""
    going = list(lanes)
    while going:
        time.sleep(_POLL_S)
        going = [lane for lane in going if lane.goes_on()]
    return sorted((v for lane in lanes for v in lane.verdicts), key=lambda verdict: verdict.index)
