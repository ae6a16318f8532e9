"""The ledger's measure of the process's own memory, and what malloc keeps of it."""

import ctypes
import subprocess
import sys

import pytest
import torch

from griffin_offload.devices.memory import Ledger, anonymous_bytes, give_back_freed
from griffin_offload.devices.registry import CpuDevice

HELD_BYTES = 2**28


def test_growth_of_a_run_shorter_than_the_time_between_samples():
    ledger = Ledger(CpuDevice.current(), 0)
    held = torch.ones(HELD_BYTES, dtype=torch.uint8)
    with ledger.measuring():
        pass
    del held
    assert ledger.host_growth_bytes > HELD_BYTES // 2


@pytest.mark.slow
def test_what_a_run_gives_back_before_its_end_counts():
    ledger = Ledger(CpuDevice.current(), 0)
    with ledger.measuring():
        for _ in range(20):
            torch.ones(HELD_BYTES, dtype=torch.uint8)
    assert ledger.host_growth_bytes > HELD_BYTES // 2


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_freed_memory_between_what_is_used_is_given_back():
    blocks = [torch.ones(100_000, dtype=torch.uint8) for _ in range(2000)]  # smaller than what malloc maps apart
    used = blocks[::8]
    del blocks
    held = anonymous_bytes()
    give_back_freed()
    assert held - anonymous_bytes() > 100_000_000
    assert all(int(block.sum()) == 100_000 for block in used)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell the two apart")
def test_the_peak_of_a_process_is_its_own():
    """Not that of who started it, which getrusage hands down."""
    large = torch.ones(10**9, dtype=torch.uint8, device="cpu")
    script = "from griffin_offload.devices.memory import peak_host_bytes; print(peak_host_bytes())"
    assert 0 < int(subprocess.check_output([sys.executable, "-c", script])) < large.nbytes
