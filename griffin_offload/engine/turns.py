"""Turns: what one thread at a time may use, and others wait for in the order in which they came."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator

from griffin_offload.errors import Busy, GriffinError, UsageError

# Waiting is looked at anew after so long: a turn whose end was interrupted twice cannot be told of.
_LOOK_S = 1.0


def check_wait(wait_s: object) -> None:
    """UsageError unless this is a time to wait: seconds from 0 on, or None."""
    if wait_s is not None and (not isinstance(wait_s, int | float) or not wait_s >= 0):
        raise UsageError(f"wait_s is {wait_s!r}: give seconds, 0 or more, or None to wait as long as it takes")


class _Ticket:
    """A caller's place in the row."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.called = threading.Event()


class FifoLock:
    """A row of callers, of whom the first has its turn.

    No lock: a Ctrl-C between taking one and `try` would leave it taken. Every step is one atomic call of a deque.
    """

    def __init__(self) -> None:
        self._row: deque[_Ticket] = deque()

    @property
    def mine(self) -> bool:
        """Whether this thread has its turn."""
        with contextlib.suppress(IndexError):  # an empty row
            return self._row[0].thread == threading.get_ident()
        return False

    @contextlib.contextmanager
    def turn(self, nested: str, wait_s: float | None) -> Iterator[None]:
        """Wait for a turn, at most `wait_s` seconds (None: as long as it takes), and have it inside. Busy when the time
        is up, GriffinError with the message `nested` where this thread has its turn already: it would wait forever."""
        if self.mine:
            raise GriffinError(nested)
        ticket = _Ticket()
        try:
            self._row.append(ticket)
            self._wait(ticket, wait_s)
            yield
        finally:
            try:
                self._leave(ticket)
            except KeyboardInterrupt:  # a second Ctrl-C must not leave everybody waiting
                self._leave(ticket)
                raise

    def _wait(self, ticket: _Ticket, wait_s: float | None) -> None:
        end = None if wait_s is None else time.monotonic() + wait_s
        while self._row[0] is not ticket:
            left = _LOOK_S if end is None else min(end - time.monotonic(), _LOOK_S)
            if left <= 0:
                before = max(list(self._row).index(ticket), 1)
                calls = "1 call is" if before == 1 else f"{before} calls are"
                raise Busy(
                    f"waited {wait_s:g} s for this model and {calls} still before this one: wait longer (wait_s), or "
                    "load the model once more"
                )
            ticket.called.wait(left)

    def _leave(self, ticket: _Ticket) -> None:
        with contextlib.suppress(ValueError):  # it never came into the row, or left it already
            self._row.remove(ticket)
        with contextlib.suppress(IndexError):
            self._row[0].called.set()
