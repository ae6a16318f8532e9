"""A sample of benchmarks/faults.py: faults and kills in real processes, of every kind that takes no root."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="faults are made by Linux's means")
def test_a_sample_of_faults(tmp_path: Path):
    command = [sys.executable, str(SCRIPT), "--faults", "9", "--kills", "2", "--seed", "1", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    found = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, found["problems"]) == (0, []), done.stderr
    assert (found["faults"], found["kills"]) == (9, 2)
    assert found["wall_s"] > 0
    assert sum(kind["count"] for kind in json.loads((tmp_path / "faults.json").read_text())["outcomes"]) == 11
    assert "| all | 11 |" in (tmp_path / "faults.md").read_text()
