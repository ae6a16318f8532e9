"""Commands as real processes, forked from one that has imported everything: a tenth of a second each, not five.

The parent has one thread and stays that way: forked children then own all locks.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 60.0
_POLL_S = 0.002
_ERROR = "griffin-offload: error: "


@dataclass(frozen=True)
class Outcome:
    """What became of one process."""

    code: int | None
    """Exit code, negative for a signal, None for one that had to be killed because it never ended."""
    out: str
    err: str
    seconds: float

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith(_ERROR)]

    def problem(self, codes: Sequence[int], answers: Sequence[str] = ()) -> str | None:
        """What is wrong with it: a hang, a traceback, an exit code not among `codes`, more or less than one line of
        error, an output that is none of `answers`, or on failure the beginning of none. None: nothing."""
        if self.code is None:
            return "it never ended"
        if "Traceback" in self.err or "Fatal Python error" in self.err or "Exception ignored" in self.err:
            return f"a traceback: {self.err[-2000:]}"
        if self.code not in codes:
            return f"exit code {self.code}: {self.err[-500:]}"
        if self.code == 0:
            wrong = bool(answers) and self.out not in answers
            return f"another output: {self.out[:300]!r}" if wrong else None
        others = [line for line in self.err.splitlines() if line and not line.startswith("griffin-offload: ")]
        if self.code > 0 and (len(self.error_lines) != 1 or others):
            return f"not one line of error: {self.err[-500:]!r}"
        begun = not answers or any(answer.startswith(self.out) for answer in answers)
        return None if begun else f"a wrong output before the error: {self.out[:300]!r}"


class Process:
    """`griffin-offload arguments` in a child. `prepare` runs in it first: limits, faults to come."""

    def __init__(
        self,
        arguments: Sequence[object],
        folder: Path,
        *,
        prepare: Callable[[], None] = lambda: None,
        stdin: str = "",
        stdout: str | None = None,
    ) -> None:
        self._files = [folder / name for name in ("stdin", "stdout", "stderr")]
        self._files[0].write_text(stdin)
        for path in self._files[1:]:
            path.write_bytes(b"")
        self._start, self._code, self._ended = time.monotonic(), 0, False
        self.pid = os.fork()
        if self.pid == 0:
            _be_child([str(argument) for argument in arguments], self._files, prepare, stdout)

    def signal(self, number: int) -> None:
        if not self.over():
            os.kill(self.pid, number)

    def over(self) -> bool:
        if not self._ended:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._ended, self._code = True, os.waitstatus_to_exitcode(status)
        return self._ended

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> bool:
        """Until `condition`, the end of the process or of the time; whether the first."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if condition():
                return True
            if self.over():
                return False
            time.sleep(_POLL_S)
        return False

    def sleep(self, seconds: float) -> None:
        self.wait_until(lambda: False, seconds)

    @property
    def printed(self) -> str:
        """On stdout, so far."""
        return self._files[1].read_text(errors="replace")

    def outcome(self, timeout_s: float = TIMEOUT_S) -> Outcome:
        """Wait for the end; a process that does not come to one is killed."""
        self.wait_until(lambda: False, timeout_s)
        code: int | None = None
        if self.over():
            code = self._code
        else:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._ended = True
        out, err = (path.read_text(errors="replace") for path in self._files[1:])
        return Outcome(code, out, err, time.monotonic() - self._start)


def _be_child(arguments: Sequence[str], files: Sequence[Path], prepare: Callable[[], None], stdout: str | None) -> None:
    """Never returns."""
    code = 1
    try:
        _redirect(files, stdout)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        prepare()
        code = _command(arguments)
        threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter's end waits for threads
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # told by the command
            stream.flush()
    os._exit(code)


def _redirect(files: Sequence[Path], stdout: str | None) -> None:
    names = [str(files[0]), stdout or str(files[1]), str(files[2])]
    for target, (name, flags) in enumerate(zip(names, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        descriptor = os.open(name, flags)
        os.dup2(descriptor, target)
        os.close(descriptor)
    sys.stdin = os.fdopen(0, encoding="utf-8")
    sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)


def _command(arguments: Sequence[str]) -> int:
    from griffin_offload.cli.main import main

    try:
        return main(arguments)
    except SystemExit as leaving:  # argparse
        return leaving.code if isinstance(leaving.code, int) else 1
