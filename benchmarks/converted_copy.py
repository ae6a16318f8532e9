"""The converted copy of a checkpoint that our side runs on, made with `griffin-offload convert`."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from capped_run import run_capped
from sides import environment

from griffin_offload.checkpoint.safetensors import UNFINISHED


@dataclass(frozen=True)
class Copy:
    """`seconds` and `rss_anon_peak_bytes` are None where the copy was there already."""

    folder: Path
    precision: str
    stored_bytes: int
    seconds: float | None
    rss_anon_peak_bytes: int | None


def converted_copy(original: Path, precision: str) -> Copy:
    """`<original>-<precision>` beside the original; made, or finished, when it is not whole."""
    folder = original.with_name(f"{original.name}-{precision}")
    seconds = anonymous_bytes = None
    if not folder.exists() or (folder / UNFINISHED).exists():
        command = [sys.executable, "-m", "griffin_offload", "convert", "-m", str(original)]
        print(f"converting to {precision} ...", file=sys.stderr, flush=True)
        start_s = time.perf_counter()
        outcome = run_capped([*command, str(folder), "--quantize", precision], None, None, environment())
        seconds = time.perf_counter() - start_s
        anonymous_bytes = outcome.rss_anon_peak_bytes
        if outcome.returncode:
            raise SystemExit(f"error: the conversion ended with status {outcome.returncode}")
    found = json.loads((folder / "config.json").read_text()).get("quantization_config", {}).get("precision")
    if found != precision:
        raise SystemExit(f"error: {folder.name} is there and its precision is {found}: remove it")
    stored_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Copy(folder, precision, stored_bytes, seconds, anonymous_bytes)
