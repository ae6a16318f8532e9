"""The peers' environments: one each, made once of wheels, with versions that were seen to run on a CPU."""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
PACKAGES = {
    "llama": ["gguf==0.19.0", "xllamacpp==2026.10.11549"],
    "airllm": ["airllm==4.0.0", "transformers==5.24.0", TORCH],
    # Its Llama calls decoder layers by an argument that transformers 4.58 and later do not have.
    "ollm": [TORCH, "transformers==4.57.*", "accelerate", "peft", "requests"],
}
ALONE = {"ollm": ["ollm==1.0.3"]}
"""Installed without what they depend on: oLLM's flash-attn is for CUDA, which its CPU path does not need."""


def interpreter(root: Path, name: str) -> Path:
    return root / name / "bin" / "python"


def build(root: Path, name: str) -> None:
    """Nothing where it is there; half an environment is made anew. Raises CalledProcessError when pip fails."""
    python, mark = interpreter(root, name), root / name / "complete.json"
    wanted = [*PACKAGES[name], *ALONE.get(name, [])]
    if mark.exists() and json.loads(mark.read_text()) == wanted:
        return
    print(f"making the environment {name} ...", file=sys.stderr, flush=True)
    shutil.rmtree(root / name, ignore_errors=True)
    venv.create(root / name, with_pip=True)
    install = [python, "-m", "pip", "install", "-q", "--only-binary=:all:"]
    subprocess.run([*install, *PACKAGES[name]], check=True)
    if name in ALONE:
        subprocess.run([*install, "--no-deps", *ALONE[name]], check=True)
    mark.write_text(json.dumps(wanted))
