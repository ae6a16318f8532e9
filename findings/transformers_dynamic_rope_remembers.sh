#!/usr/bin/env bash
# transformers, rope_type "dynamic" (NTK): what a prompt gives depends on the prompts the model has seen before it.
#
# Expected:  a forward pass without a KV cache is a function of its tokens: the same prompt gives the same logits.
# Behaviour: the rotary module keeps the longest length it has met, and that length's frequencies
#            (dynamic_frequency_update in modeling_rope_utils.py). With 64 trained positions, a prompt of 128 tokens
#            gives other logits after an independent prompt of 256 than in a fresh model; a call shorter than 64 puts
#            the frequencies back, one of exactly 64 does not. Two processes with the same weights so disagree.
# Seen with: transformers 5.24.0 (5.23.0 alike), torch 2.13.0, Python 3.11, 2026-11-29
# Output:    logits of the same 128 tokens moved by: again: 0.0000, 256: 6.5849, then 64: 6.5849, then 63: 0.0000
set -euo pipefail
sed -n 's/^# //p' "$0"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$folder"
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
"$folder/venv/bin/python" - 2> "$folder/errors" <<'PYTHON' || { status=$?; tail -n 5 "$folder/errors"; exit "$status"; }
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TRAINED = 64
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
    max_position_embeddings=TRAINED, initializer_range=0.2,
    rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
)).eval()
text = torch.randint(0, 64, (1, 4 * TRAINED))


@torch.no_grad()
def logits(tokens):
    return model(text[:, :tokens], use_cache=False).logits


def moved():
    return (logits(2 * TRAINED) - fresh).abs().max().item()


fresh = logits(2 * TRAINED)
found = {"again": moved()}
for name, tokens in (("256", 4 * TRAINED), ("then 64", TRAINED), ("then 63", TRAINED - 1)):
    logits(tokens)
    found[name] = moved()
print("logits of the same 128 tokens moved by: ", ", ".join(f"{k}: {v:.4f}" for k, v in found.items()), sep="")
still, changed = (found["again"], found["then 63"]), (found["256"], found["then 64"])
sys.exit(0 if max(still) == 0 and min(changed) > 0.001 else 1)
PYTHON
