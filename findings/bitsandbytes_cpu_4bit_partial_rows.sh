#!/usr/bin/env bash
# bitsandbytes, 4 bits on a CPU with AVX-512: rows that are no whole number of blocks get other blocks' scales.
#
# Expected:  dequantize_4bit undoes quantize_4bit. Blocks of 64 numbers run on through the flattened matrix, so number i
#            is code[nibble i] * absmax[i // 64], whatever the row length; quantize_4bit stores just that.
# Behaviour: for rows of 64 or 128 numbers the two agree to the bit. For rows of 32 or 96 (the matrix still a whole
#            number of blocks) the values are far off, with no error or warning: row r starts at scale
#            r * (row length // 64), rounded down, so that all rows of 32 take the very first scale.
# Seen with: bitsandbytes 0.50.2, torch 2.13.0, Python 3.11, x86-64 with AVX-512 (other CPUs: exit status 2), 2026-11-29
# Output:    largest error in 32 rows of 32: 29.999, 64: 0.000, 96: 10.011, 128: 0.000
#            | equal to scales counted per row, rounded down: True
set -euo pipefail
sed -n 's/^# //p' "$0"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 bitsandbytes==0.50.2
cd "$folder"
"$folder/venv/bin/python" - 2> "$folder/errors" <<'PYTHON' || { status=$?; tail -n 5 "$folder/errors"; exit "$status"; }
import sys

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

BLOCK = 64
if torch.backends.cpu.get_cpu_capability() != "AVX512":
    print("not tried: this CPU has no AVX-512, and only that path is meant")
    sys.exit(2)


def by_the_layout(packed, state, shape, first_scale_of_row=None):
    """High nibble first; scales by position in the flattened matrix, or counted per row from a given start."""
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().long()
    scale_of = torch.arange(nibbles.numel()) // BLOCK
    if first_scale_of_row is not None:
        rows, width = shape
        scale_of = (torch.arange(rows)[:, None] * first_scale_of_row + torch.arange(width) // BLOCK).flatten()
    return (state.code[nibbles] * state.absmax[scale_of]).reshape(shape)


error, told = {}, {}
for width in (32, 64, 96, 128):
    # Rows of growing size, so that a wrong block's scale shows.
    matrix = torch.cos(torch.arange(32 * width).float() * 1.7).reshape(32, width) * torch.arange(1, 33)[:, None]
    packed, state = quantize_4bit(matrix, blocksize=BLOCK, quant_type="nf4")
    library = dequantize_4bit(packed, state)
    error[width] = (library - by_the_layout(packed, state, matrix.shape)).abs().max().item()
    told[width] = torch.equal(library, by_the_layout(packed, state, matrix.shape, width // BLOCK))
print("largest error in 32 rows of", ", ".join(f"{width}: {value:.3f}" for width, value in error.items()),
      "| equal to scales counted per row, rounded down:", all(told.values()))
sys.exit(0 if error[64] == error[128] == 0 and min(error[32], error[96]) > 1 and all(told.values()) else 1)
PYTHON
