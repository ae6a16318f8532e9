#!/usr/bin/env bash
# transformers, Nemotron-H: a prompt and the same tokens one by one are two different recurrences.
#
# Expected:  tokens that pass at once give the logits of the same tokens passed one after the other behind a KV cache.
# Behaviour: the scan over a prompt makes time steps no shorter than config.time_step_min (mamba2_chunk_scan, dt_limit),
#            a single token's step has no such limit (mamba2_selective_state_update). Where softplus(dt + dt_bias) is
#            below it, states and logits differ: 0.001 by default, raised here so that more of it shows.
# Seen with: transformers 5.24.0 (5.20.2 and 5.23.0 alike), torch 2.13.0, Python 3.11, 2026-11-30
# Output:    at once and one by one differ by: time_step_min 1e-09: 0.0000, 0.001: 0.0089, 0.5: 1.6005
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
from transformers import DynamicCache, NemotronHConfig, NemotronHForCausalLM


@torch.no_grad()
def difference(least):
    torch.manual_seed(0)
    model = NemotronHForCausalLM(NemotronHConfig(
        hidden_size=32, intermediate_size=64, vocab_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"], mamba_num_heads=4, mamba_head_dim=16,
        n_groups=2, ssm_state_size=16, chunk_size=16, initializer_range=0.3, time_step_min=least, time_step_max=1.0,
    )).eval()
    tokens = torch.randint(0, 64, (1, 24))
    cache = DynamicCache(config=model.config)
    name = "cache" if "cache" in model.forward.__code__.co_varnames else "past_key_values"
    steps = [model(tokens[:, i : i + 1], use_cache=True, **{name: cache}).logits for i in range(tokens.shape[1])]
    return float((torch.cat(steps, 1) - model(tokens, use_cache=False).logits).abs().max())


found = {least: difference(least) for least in (1e-9, 0.001, 0.5)}
print("at once and one by one differ by:", ", ".join(
    f"{'time_step_min ' if least == 1e-9 else ''}{least:g}: {most:.4f}" for least, most in found.items()
))
sys.exit(0 if found[1e-9] < 1e-4 < 0.01 < found[0.5] else 1)
PYTHON
