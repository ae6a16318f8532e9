"""The ceilings of this machine for one model, by the trials of `griffin-offload bench`, in a process of their own.

    python benchmarks/measured.py --dir MODEL --tokens 128 --threads 2 --precision int8

One JSON line: cold disk, one row times matrices of the model's FF shape in a precision, many rows. The matrices are
gone from memory before anything else runs.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from disk import checkpoint_files, drop_page_cache
from sides import environment

PRECISIONS = ("none", "int8", "int4")


@dataclass(frozen=True)
class Rates:
    """Of the best kernels; a prompt is multiplied in 16 bit or more whatever the precision is."""

    read_bytes_per_s: float
    gemv_bytes_per_s: float
    gemm_flops_per_s: float


def measure_rates(folder: Path, prompt_tokens: int, threads: int, precision: str = "none") -> Rates:
    """Of the checkpoint in `folder`."""
    command = [sys.executable, __file__, "--dir", str(folder), "--tokens", str(prompt_tokens)]
    command += ["--threads", str(threads), "--precision", precision]
    drop_page_cache(checkpoint_files(folder))
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment(threads))
    found = json.loads(output.stdout.splitlines()[-1])
    [gemm] = found["gemm_flops_per_s"].values()
    return Rates(found["read_bytes_per_s"], found["gemv_bytes_per_s"], gemm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=128, help="rows of the GEMM")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--precision", choices=PRECISIONS, default="none", help="of the one-row products")
    args = parser.parse_args()
    from griffin_offload.config import LoadConfig
    from griffin_offload.engine.spec import examine
    from griffin_offload.evaluation.ceilings import measure_ceilings

    prospect = examine(args.dir, LoadConfig(device="cpu"))
    print(json.dumps(asdict(measure_ceilings(prospect, args.precision, [args.tokens], args.threads))))


if __name__ == "__main__":
    main()
