#!/usr/bin/env bash
# transformers reading a Llama 3.1-style GGUF: the rope frequency factors in the file are dropped without a word.
#
# Expected:  llama.cpp's converter puts Llama 3.1's rope scaling into a tensor rope_freqs.weight (a divisor for each
#            frequency) and not into the metadata. A reader applies it, or says that it does not.
# Behaviour: AutoModelForCausalLM.from_pretrained(gguf_file=...) drops the tensor: with the slow half of the frequencies
#            divided by 8, inv_freq and logits equal those of a file without factors, to the bit, with no warning.
# Seen with: transformers 5.24.0 (5.23.0 alike), gguf 0.19.0, accelerate 1.15.0, torch 2.13.0, 2026-11-29
# Output:    inv_freq equal: True, warnings about rope: 0, logits moved by 0.000, and by 12.303 once divided by hand
set -euo pipefail
sed -n 's/^# //p' "$0"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
cd "$folder"
export TQDM_DISABLE=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
"$folder/venv/bin/python" - 2> "$folder/errors" <<'PYTHON' || { status=$?; tail -n 5 "$folder/errors"; exit "$status"; }
import logging
import sys
import warnings

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

FACTORS = np.repeat([1.0, 8.0], 8).astype(np.float32)  # for the 16 frequencies of a head of 32
MATRICES = [f"blk.0.{name}" for name in "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()]


def write(path, extra):
    out, draw = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    out.add_embedding_length(64), out.add_feed_forward_length(64), out.add_vocab_size(64), out.add_context_length(256)
    out.add_block_count(1), out.add_head_count(2), out.add_head_count_kv(2), out.add_rope_dimension_count(32)
    out.add_layer_norm_rms_eps(1e-5), out.add_rope_freq_base(1e4)
    tensors = {name: draw.normal(0, 0.3, (64, 64)).astype(np.float32) for name in ("token_embd", "output", *MATRICES)}
    tensors |= dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), np.ones(64, np.float32))
    for name, numbers in (tensors | extra).items():
        out.add_tensor(name + ".weight", numbers)
    out.write_header_to_file(), out.write_kv_data_to_file(), out.write_tensors_to_file(), out.close()


said, listener = [], logging.Handler(logging.WARNING)
listener.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(listener)
warnings.showwarning = lambda message, *rest: said.append(str(message))
models, logits, tokens = [], [], torch.arange(200)[None] % 64
for name, extra in (("without", {}), ("with", {"rope_freqs": FACTORS})):
    write(f"{name}.gguf", extra)
    models.append(AutoModelForCausalLM.from_pretrained(".", gguf_file=f"{name}.gguf", dtype=torch.float32).eval())
    logits.append(models[-1](tokens).logits.detach())
same = torch.equal(*(model.model.rotary_emb.inv_freq for model in models))
told = sum("rope" in line.lower() for line in said)
models[1].model.rotary_emb.inv_freq /= torch.from_numpy(FACTORS)
ignored, applied = ((made - logits[0]).abs().max().item() for made in (logits[1], models[1](tokens).logits))
print(f"inv_freq equal: {same}, warnings about rope: {told}, "
      f"logits moved by {ignored:.3f}, and by {applied:.3f} once divided by hand")
sys.exit(0 if same and told == 0 and ignored == 0 and applied > 0.1 else 1)
PYTHON
