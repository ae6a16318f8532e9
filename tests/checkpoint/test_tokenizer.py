"""What tokenizers and templates compute takes place in a process of its own, which may wait in vain."""

import os
import threading
import time

import pytest

from griffin_offload.checkpoint import tokenizer
from griffin_offload.errors import CheckpointError

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc says whether a process waits")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer, "PATIENCE_S", 0.1)


def test_what_waits_for_a_lock_that_nobody_gives_back_is_asked_again():
    """Another thread of the parent had it when the process was made: in there it is held for good."""
    lock, asked = threading.Lock(), os.pipe()
    lock.acquire()

    def give_back() -> None:
        os.read(asked[0], 1)
        lock.release()

    def work() -> list[int]:
        os.write(asked[1], b"x")
        with lock:
            return [7, 8]

    thread = threading.Thread(target=give_back)
    thread.start()
    assert tokenizer.bounded(work, 0) == [7, 8]
    thread.join()


def test_what_waits_every_time_is_named_long_before_the_limit():
    with pytest.raises(CheckpointError, match="waited for something 5 times"):
        tokenizer.bounded(lambda: threading.Event().wait() and [], 0)


def test_what_computes_is_not_disturbed():
    def work() -> list[int]:
        end = time.thread_time() + 0.5
        while time.thread_time() < end:
            pass
        return [1]

    assert tokenizer.bounded(work, 0) == [1]
