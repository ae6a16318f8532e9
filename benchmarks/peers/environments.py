"""The side environments of the peers: one each, made once, with versions that were seen to run on a CPU."""

import json
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path

MARK = "complete.json"
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """`alone` are installed without what they depend on, after `packages`."""

    packages: tuple[str, ...]
    alone: tuple[str, ...] = ()
    from_source: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def content(self) -> list[str]:
        return sorted([*self.packages, *self.alone])


ENVIRONMENTS = {
    "llama": Environment(
        packages=("llama-cpp-python==0.3.36", "gguf==0.19.0"),
        from_source=("llama-cpp-python",),  # compiled for this processor
        variables={
            # The part for images is not needed. Its AMX path ends by an illegal instruction (a tile is cleared by a
            # thread that has not said which shape it has), seen on an Intel processor under KVM.
            "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DCMAKE_C_FLAGS=-mno-amx-int8 "
            "-DCMAKE_CXX_FLAGS=-mno-amx-int8",
            "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()),
        },
    ),
    "airllm": Environment(packages=("airllm==4.0.0", "transformers==5.24.0", TORCH)),
    "ollm": Environment(
        # It depends on flash-attn, which cannot be built without nvcc and which its CPU path does not need; its Llama
        # calls decoder layers by an argument that transformers 4.58 and later do not have.
        packages=(TORCH, "transformers==4.57.*", "accelerate", "peft", "requests"),
        alone=("ollm==1.0.3",),
    ),
}


def interpreter(root: Path, name: str) -> Path:
    return root / name / "bin" / "python"


def is_complete(root: Path, name: str) -> bool:
    mark = root / name / MARK
    return mark.exists() and json.loads(mark.read_text()) == ENVIRONMENTS[name].content


def build(root: Path, name: str) -> None:
    """Does nothing when it is there; half a one is made anew. Raises CalledProcessError when pip fails."""
    if is_complete(root, name):
        return
    wanted, folder = ENVIRONMENTS[name], root / name
    print(f"building the environment {name} ...", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    install = [str(interpreter(root, name)), "-m", "pip", "install", "-q"]
    source = [word for package in wanted.from_source for word in ("--no-binary", package)]
    if source:
        source.append("--no-cache-dir")  # what pip compiled once was for other variables
    variables = os.environ | wanted.variables
    subprocess.run([*install, *source, *wanted.packages], check=True, env=variables)
    if wanted.alone:
        subprocess.run([*install, "--no-deps", *wanted.alone], check=True, env=variables)
    (folder / MARK).write_text(json.dumps(wanted.content))
