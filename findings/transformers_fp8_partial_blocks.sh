#!/usr/bin/env bash
# transformers, block-scaled FP8 on a CPU: the block size is guessed from two shapes, not read from the config.
#
# Expected:  quantization_config says "weight_block_size": [128, 128]. A weight of 448 rows has 4 rows of scales, the
#            last for the 64 rows left over; row r is scaled by scale r // 128.
# Behaviour: without a GPU from_pretrained turns FP8 to floats as it reads (Fp8Dequantize._dequantize_one in
#            integrations/finegrained_fp8.py) and takes 448 / 4 = 112 rows per block: rows 112-127, 224-255 and 336-383
#            get the next block's scale, with no error or warning about it. 576 rows (5 scales, as in DeepSeek-V3's
#            kv_a_proj_with_mqa) do not divide and raise; 384 rows, whole blocks, are right.
# Seen with: transformers 5.24.0 (5.23.0 alike), torch 2.13.0, safetensors 0.8.0, accelerate 1.15.0, no GPU, 2026-11-29
# Output:    rows with a wrong scale, of 384: 0, of 448: 96, of 576: raises
set -euo pipefail
sed -n 's/^# //p' "$0"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 safetensors==0.8.0 accelerate==1.15.0
cd "$folder"
export TQDM_DISABLE=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
"$folder/venv/bin/python" - 2> "$folder/errors" <<'PYTHON' || { status=$?; tail -n 5 "$folder/errors"; exit "$status"; }
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

NAME = "model.layers.0.mlp.gate_proj.weight"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def write_checkpoint(folder, rows):
    """A one-layer Llama, each projection FP8 ones with scales 1, 2, 3 ... down the rows; returns gate_proj."""
    config = LlamaConfig(hidden_size=128, intermediate_size=rows, num_hidden_layers=1, num_attention_heads=2,
                         vocab_size=32)
    tensors = LlamaForCausalLM(config).state_dict()
    for name in [name for name in tensors if "_proj" in name]:
        blocks = [-(-size // 128) for size in tensors[name].shape]
        tensors[name] = torch.ones(tensors[name].shape).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.arange(1.0, blocks[0] + 1)[:, None].repeat(1, blocks[1])
    config.quantization_config = FP8
    config.save_pretrained(folder)
    save_file(tensors, folder + "/model.safetensors", {"format": "pt"})
    return (torch.arange(rows) // 128 + 1.0)[:, None].expand(rows, 128)


def wrong_rows(rows):
    expected = write_checkpoint(str(rows), rows)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(str(rows), dtype=torch.float32).state_dict()[NAME]
    except RuntimeError:
        return "raises"
    return int((loaded != expected).any(dim=1).sum())


found = {rows: wrong_rows(rows) for rows in (384, 448, 576)}
print("rows with a wrong scale, of", ", of ".join(f"{rows}: {count}" for rows, count in found.items()))
sys.exit(0 if found == {384: 0, 448: 96, 576: "raises"} else 1)
PYTHON
