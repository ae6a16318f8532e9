"""The quick tests with other releases of transformers and torch, laid over the environment that runs this.

    python benchmarks/versions.py --out FOLDER "transformers==5.20.0" "transformers==5.24.0" \\
        "transformers==5.24.0 torch==2.8.0+cpu"

Each argument is one environment: requirements that are installed, without what they depend on, into a folder that comes
before everything else on Python's path. Builds of torch for the CPU have to be at hand: those for CUDA are gigabytes
and need libraries that are not brought along. Ends in a table and JSON, and in 1 if a test fails.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import markdown_table, provenance, publish

ROOT = Path(__file__).parents[1]
QUICK = (
    *("tests/test_transformers_api.py", "tests/examples", "tests/kv_cache", "tests/engine/test_generate.py"),
    *("tests/engine/test_past.py", "tests/engine/test_decode_graph.py", "tests/cli/test_run.py"),
)
_VERSIONS = "import torch, transformers, json; print(json.dumps([torch.__version__, transformers.__version__]))"


def with_releases(requirements: str, folder: Path) -> dict[str, str]:
    """Environment variables with which Python imports these releases; nothing else is changed."""
    if requirements.split():
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        subprocess.run([*install, *requirements.split()], check=True)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def measure(requirements: str, tests: list[str]) -> dict[str, Any]:
    """Counts of the tests with `requirements`, and the names of those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        environment = with_releases(requirements, Path(folder))
        said = subprocess.run([sys.executable, "-c", _VERSIONS], env=environment, text=True, stdout=subprocess.PIPE)
        torch_release, transformers_release = json.loads(said.stdout.splitlines()[-1])
        start = time.perf_counter()
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfE", "--tb=no", *tests]
        run = subprocess.run(command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE)
        counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", run.stdout)}
        failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", run.stdout, flags=re.MULTILINE)
        found = {"passed": counts.get("passed", 0), "skipped": counts.get("skipped", 0), "failed": len(failures)}
        found |= {"failures": failures, "seconds": round(time.perf_counter() - start)}
        return {"torch": torch_release, "transformers": transformers_release, **found}


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line an environment."""
    names = ("transformers", "torch", "passed", "skipped", "failed")
    return markdown_table([names, *([str(row[name]) for name in names] for row in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="+", help="requirements of one environment; '' for the one that is there")
    parser.add_argument("--out", type=Path, help="a folder for versions.md and versions.json")
    parser.add_argument("--tests", nargs="+", default=list(QUICK), help="files to run (default: the quick ones)")
    arguments = parser.parse_args()
    rows = [measure(requirements, arguments.tests) for requirements in arguments.environments]
    record = provenance("versions.py", sys.argv[1:]) | {"environments": rows}
    publish(arguments.out, "versions", "Oldest and newest releases", markdown(rows), record)
    return int(any(row["failed"] or not row["passed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
