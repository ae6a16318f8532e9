"""The forms of the checkpoint that sides read, made when a side needs them."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peers.environments import interpreter
from sides import environment

from griffin_offload.checkpoint.safetensors import UNFINISHED


@dataclass(frozen=True)
class Copy:
    """`seconds` is None where it was there already."""

    folder: Path
    stored_bytes: int
    seconds: float | None


def order(copy: str) -> tuple[int, str]:
    return ["16bit", "gguf", "split", "int8", "int4"].index(copy.split("-")[0]), copy


def folder_of(copy: str, checkpoint: Path) -> Path:
    if copy == "16bit":
        return checkpoint
    return checkpoint.with_name(f"{checkpoint.name}-{copy.split('-')[0]}")


def make(copy: str, checkpoint: Path, environments: Path, threads: int) -> Copy:
    """Raises CalledProcessError when the maker fails."""
    folder = folder_of(copy, checkpoint)
    if copy == "16bit":
        return Copy(folder, stored_bytes(folder), None)
    if copy in ("int8", "int4"):
        return convert(checkpoint, folder, copy)
    if copy == "split":
        words = ["-m", "peers.airllm_split", str(checkpoint), str(folder)]
        seconds = None if folder.exists() else timed(copy, [str(interpreter(environments, "airllm")), *words])
        return Copy(folder, stored_bytes(folder), seconds)
    file = folder / f"{copy.removeprefix('gguf-')}.gguf"
    words = ["-m", "peers.gguf_file", str(checkpoint), str(file), "--type", file.stem, "--threads", str(threads)]
    seconds = None if file.exists() else timed(copy, [str(interpreter(environments, "llama")), *words])
    return Copy(folder, file.stat().st_size, seconds)


def convert(checkpoint: Path, folder: Path, precision: str) -> Copy:
    """By `griffin-offload convert`, or finished by it when it is not whole."""
    seconds = None
    if not folder.exists() or (folder / UNFINISHED).exists():
        words = ["-m", "griffin_offload", "convert", "-m", str(checkpoint), str(folder), "--quantize", precision]
        seconds = timed(precision, [sys.executable, *words])
    found = json.loads((folder / "config.json").read_text()).get("quantization_config", {}).get("precision")
    if found != precision:
        raise SystemExit(f"error: {folder.name} is there and its precision is {found}: remove it")
    return Copy(folder, stored_bytes(folder), seconds)


def timed(copy: str, command: Sequence[str]) -> float:
    print(f"making {copy} ...", file=sys.stderr, flush=True)
    start_s = time.perf_counter()
    subprocess.run(command, check=True, env=environment(), stdout=sys.stderr)
    return time.perf_counter() - start_s


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
