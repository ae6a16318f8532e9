"""The side environments of the peers: one each, made once, with versions that were seen to run on a CPU."""

import json
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

MARK = "complete.json"
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """Wheels of the package index; `alone` are installed without what they depend on, after `packages`."""

    packages: tuple[str, ...]
    alone: tuple[str, ...] = ()

    @property
    def content(self) -> list[str]:
        return sorted([*self.packages, *self.alone])


ENVIRONMENTS = {
    "llama": Environment(packages=("xllamacpp==2026.10.11549", "gguf==0.19.0")),
    "airllm": Environment(packages=("airllm==4.0.0", "transformers==5.24.0", TORCH)),
    "ollm": Environment(
        # It depends on flash-attn, which needs nvcc and which its CPU path does not need; its Llama calls decoder
        # layers by an argument that transformers 4.58 and later do not have.
        packages=(TORCH, "transformers==4.57.*", "accelerate", "peft", "requests"),
        alone=("ollm==1.0.3",),
    ),
}


def interpreter(root: Path, name: str) -> Path:
    return root / name / "bin" / "python"


def build(root: Path, name: str) -> None:
    """Does nothing when it is there; half a one is made anew. Raises CalledProcessError when pip fails."""
    wanted, folder = ENVIRONMENTS[name], root / name
    mark = folder / MARK
    if mark.exists() and json.loads(mark.read_text()) == wanted.content:
        return
    print(f"making the environment {name} ...", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    install = [str(interpreter(root, name)), "-m", "pip", "install", "-q", "--only-binary=:all:"]
    subprocess.run([*install, *wanted.packages], check=True)
    if wanted.alone:
        subprocess.run([*install, "--no-deps", *wanted.alone], check=True)
    mark.write_text(json.dumps(wanted.content))
