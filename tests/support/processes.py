"""Processes forked from one that has imported everything: a tenth of a second each, not five.

The parent should have one thread: forked children then own all locks.
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


class Child:
    """`work` in a forked process whose stdin, stdout and stderr are `descriptors`; what it returns is the exit code."""

    def __init__(self, work: Callable[[], int], descriptors: Sequence[int]) -> None:
        self.code: int | None = None
        """Once it is over: the exit code, negative for a signal."""
        self.pid = os.fork()
        if self.pid == 0:
            _be_child(work, descriptors)

    def over(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self) -> int:
        """Without a limit; the exit code."""
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def signal(self, number: int) -> None:
        if not self.over():
            os.kill(self.pid, number)

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

    def ends_within(self, timeout_s: float) -> bool:
        """A process that does not is killed."""
        self.sleep(timeout_s)
        ended = self.over()
        self.signal(signal.SIGKILL)
        self.wait()
        return ended


class Process(Child):
    """`griffin-offload arguments`, with files in `folder`. `prepare` runs in it first: limits, faults to come."""

    def __init__(
        self,
        arguments: Sequence[object],
        folder: Path,
        *,
        prepare: Callable[[], None] = lambda: None,
        stdin: str = "",
        stdout: str | None = None,
    ) -> None:
        names = [folder / name for name in ("stdin", "stdout", "stderr")]
        names[0].write_text(stdin)
        self._out, self._err, self._start = names[1], names[2], time.monotonic()

        def work() -> int:
            prepare()
            return command([str(argument) for argument in arguments])

        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(path.open(mode)) for path, mode in zip(names, "rww", strict=True)]
            if stdout is not None:
                files[1] = stack.enter_context(open(stdout, "w"))
            super().__init__(work, [file.fileno() for file in files])

    @property
    def printed(self) -> str:
        """On stdout, so far."""
        return self._out.read_text(errors="replace")

    def outcome(self, timeout_s: float = TIMEOUT_S) -> Outcome:
        """Wait for the end; a process that does not come to one is killed."""
        code = self.code if self.ends_within(timeout_s) else None
        out, err = (path.read_text(errors="replace") for path in (self._out, self._err))
        return Outcome(code, out, err, time.monotonic() - self._start)


def _be_child(work: Callable[[], int], descriptors: Sequence[int]) -> None:
    """Never returns."""
    code = 1
    try:
        _redirect(descriptors)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = work()
        threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter's end waits for threads
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # told by the command
            stream.flush()
    os._exit(code)


def _redirect(descriptors: Sequence[int]) -> None:
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    # The objects before these go, and would take the descriptors along if they owned them.
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115


def command(arguments: Sequence[str]) -> int:
    """`griffin-offload arguments` in this process; its exit code."""
    from griffin_offload.cli.main import main

    try:
        return main(arguments)
    except SystemExit as leaving:  # argparse
        return leaving.code if isinstance(leaving.code, int) else 1
