"""The environment of llama.cpp, made once of wheels, with versions that were seen to run on a CPU."""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

PACKAGES = ["gguf==0.19.0", "xllamacpp==2026.10.11549"]


def build(folder: Path) -> Path:
    """Its interpreter. Half an environment is made anew. Raises CalledProcessError when pip fails."""
    python, mark = folder / "bin" / "python", folder / "complete.json"
    if not mark.exists() or json.loads(mark.read_text()) != PACKAGES:
        print("making the environment of llama.cpp ...", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--only-binary=:all:", *PACKAGES], check=True)
        mark.write_text(json.dumps(PACKAGES))
    return python
