"""Every script of benchmarks/ and examples/ starts: what it imports of the package is there."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = {
    "conftest.py",
    "test_real_models.py",
    "gguf_file.py",
    "ggml.py",
    "griffin_by_hand.py",
    "airllm_split.py",
    "openai_client.py",
    "quickstart.py",
    "train_demo.py",
}
FOUND = [path for name in ("benchmarks", "benchmarks/peers", "examples") for path in (ROOT / name).glob("*.py")]
# What runs in a peer's environment needs it to start.
SCRIPTS = sorted(path for path in FOUND if path.name not in PARTS and not path.name.startswith("worker_"))
PROGRAM = """
import runpy, sys
sys.path[:0] = sys.argv[1:3]
sys.argv[:] = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: "/".join(path.parts[-2:]))
def test_scripts_start(forks, script: Path):
    found = forks.run("-c", PROGRAM, script.parent, ROOT / "benchmarks", script, "--help")
    assert found.returncode == 0, found.err
    if "__main__" in script.read_text() or script.name == "__main__.py":
        assert "usage: " in found.out
