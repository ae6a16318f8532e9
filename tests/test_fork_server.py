"""What the fork server runs ends as it does under the interpreter: code, output and what a signal does."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from fork_server import ForkServer

PROGRAMS = {
    "an end": "print('out'); import sys; print('err', file=sys.stderr)",
    "a code": "import sys; sys.exit(3)",
    "a text": "import sys; sys.exit('no')",
    "nothing": "import sys; sys.exit()",
    "an error": "1 / 0",
    "stdin": "import sys; print(sys.stdin.read(), sys.argv[1:])",
    "a variable": "import os; print(os.environ['GIVEN'])",
    "a thread": "import threading, time; threading.Timer(0.1, print, ['later']).start()",
    "a signal": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "a full pipe": "print('x' * 200_000)",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_is_the_interpreter(forks, name: str):
    arguments = ("-c", PROGRAMS[name], "one", "two")
    ours = forks.run(*arguments, stdin=b"said", GIVEN="so")
    environment = os.environ | {"GIVEN": "so"}
    theirs = subprocess.run([sys.executable, *arguments], input=b"said", capture_output=True, env=environment)
    assert (ours.returncode, ours.out) == (theirs.returncode, theirs.stdout.decode())
    assert ours.err.splitlines()[-1:] == theirs.stderr.decode().splitlines()[-1:]


def test_one_that_hangs_is_killed_at_the_end(forks):
    hanging = forks.start("-c", "import time; print('here', flush=True); time.sleep(1000)")
    while "here" not in hanging.out:
        assert hanging.wait(0.01) is None
    forks.end_all()
    assert hanging.returncode == -signal.SIGKILL


def test_all_that_run_tests_share_one(forks):
    """Whoever comes second finds it, and leaves it to the others."""
    program = ("-c", "import os; print(open(f'/proc/{os.getppid()}/stat').read().rpartition(')')[2].split()[1])")
    servers = {forks.run(*program).out}
    with contextlib.closing(ForkServer()) as second:
        servers.add(second.run(*program).out)
    servers.add(forks.run(*program).out)
    assert len(servers) == 1
