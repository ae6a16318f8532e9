"""Ctrl-C on the command line: exit code 130, one line, no traceback."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from griffin_offload.offload.weight_store import HostStore, MmapStore


def interrupting(fetch: Callable[..., Any]) -> Callable[..., Any]:
    """A fetch in whose middle the user presses Ctrl-C: the signal comes while the computation waits."""

    def slow(source: object, layer: int) -> Any:
        if layer == 1:
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        return fetch(source, layer)

    return slow


@pytest.mark.parametrize(
    ("source", "tier", "flags"), [(MmapStore, "disk", []), (HostStore, "ram", ["-q"]), (MmapStore, "disk", ["--json"])]
)
def test_ctrl_c_on_the_command_line(cli, llama: Path, monkeypatch: pytest.MonkeyPatch, source, tier, flags):
    monkeypatch.setattr(source, "fetch", interrupting(source.fetch))
    outcome = cli("run", "the cat sat", "-m", llama, "--density", 0.5, "--offload", tier, *flags)
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.err == "\ngriffin-offload: interrupted\n"
    assert "griffin-offload-reader" not in [thread.name for thread in threading.enumerate()]


def test_ctrl_c_in_a_process(forks, llama: Path):
    """The whole way: the signal, the exit code, one line, no traceback at the interpreter's end."""
    program = (
        "import os, signal, sys, time\n"
        "from griffin_offload.cli.main import main\n"
        "from griffin_offload.offload.weight_store import MmapStore\n"
        "fetch = MmapStore.fetch\n"
        "def slow(self, layer):\n"
        "    if layer == 1: time.sleep(0.1), os.kill(os.getpid(), signal.SIGINT), time.sleep(0.2)\n"
        "    return fetch(self, layer)\n"
        "MmapStore.fetch = slow\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    outcome = forks.run("-c", program, "run", "the cat sat", "-m", llama, "--density", 0.5)
    assert (outcome.returncode, outcome.out, outcome.err) == (130, "", "\ngriffin-offload: interrupted\n")
