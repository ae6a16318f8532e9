#!/usr/bin/env bash
# torch: a CPU tensor times a weight on the meta device gives a CPU tensor, without an error.
#
# Expected:  a weight on the meta device has no numbers, so a product with it cannot have any: an error that names the
#            two devices, as adding the two tensors gives, or a result on the meta device. Programs that offload weights
#            put modules there, and forget one now and then.
# Behaviour: linear, matmul and mm of a CPU tensor and a meta tensor return a tensor on the CPU, of the right shape,
#            whose numbers mean nothing. A model that has lost its weights answers; nothing says that it should not.
# Seen with: torch 2.13.0 (CPU), Python 3.11, x86-64, 2026-11-30
# Output:    linear: cpu (2, 32) | matmul: cpu (2, 32) | mm: cpu (2, 32) | add: RuntimeError
set -euo pipefail
sed -n 's/^# //p' "$0"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

x, weight = torch.ones(2, 64), torch.empty(32, 64, device="meta")
products = {
    "linear": lambda: torch.nn.functional.linear(x, weight),
    "matmul": lambda: x @ weight.t(),
    "mm": lambda: torch.mm(x, weight.t()),
    "add": lambda: x + weight[:2],
}


def outcome(product):
    try:
        found = product()
    except RuntimeError as error:
        return type(error).__name__
    return f"{found.device} {tuple(found.shape)}"


seen = " | ".join(f"{name}: {outcome(product)}" for name, product in products.items())
print(seen)
sys.exit(seen != "linear: cpu (2, 32) | matmul: cpu (2, 32) | mm: cpu (2, 32) | add: RuntimeError")
PYTHON
