"""The ledger's measure of the process's own memory."""

import torch

from griffin_offload.runtime.memory import Ledger

HELD_BYTES = 2**28


def test_growth_of_a_run_shorter_than_the_time_between_samples():
    ledger = Ledger(torch.device("cpu"), 0)
    held = torch.ones(HELD_BYTES, dtype=torch.uint8)
    with ledger.measuring():
        pass
    del held
    assert ledger.host_growth_bytes > HELD_BYTES // 2


def test_what_a_run_gives_back_before_its_end_counts():
    ledger = Ledger(torch.device("cpu"), 0)
    with ledger.measuring():
        for _ in range(20):
            torch.ones(HELD_BYTES, dtype=torch.uint8)
    assert ledger.host_growth_bytes > HELD_BYTES // 2
