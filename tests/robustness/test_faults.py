"""Faults and kills in real processes (`faults/`): a sample, and `GRIFFIN_ROBUSTNESS=50` times as many on demand."""

import json
import os
import sys

import pytest

TIMES, SEED = int(os.environ.get("GRIFFIN_ROBUSTNESS", "1")), int(os.environ.get("GRIFFIN_ROBUSTNESS_SEED", "1"))
FAULTS, KILLS = 6 * TIMES, 1 * TIMES
PROGRAM = """
import json, sys
from robustness.faults.sample import run_sample
print(json.dumps(run_sample(*map(int, sys.argv[1:]))))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="faults are made by Linux's means")
def test_a_sample_of_faults(forks):
    done = forks.start("-c", PROGRAM, FAULTS, KILLS, SEED)
    assert done.wait(600 * TIMES) == 0, done.err
    found = json.loads(done.out)
    assert [(kind, outcome, problem) for _, kind, outcome, problem in found if problem] == []
    assert sum(kind.startswith("kill") for _, kind, _, _ in found) == KILLS
    assert len(found) == FAULTS + KILLS
