#!/usr/bin/env bash
# transformers reading a Mixtral's GGUF: a dense Llama whose feed-forwards are drawn at random.
#
# Expected:  llama.cpp's converter writes a Mixtral under the architecture "llama", with llama.expert_count and tensors
#            ffn_gate_exps, ffn_up_exps, ffn_down_exps and ffn_gate_inp. A reader makes a Mixtral of it, or refuses it.
# Behaviour: AutoModelForCausalLM.from_pretrained(gguf_file=...) makes a LlamaForCausalLM without experts. Attention is
#            the file's; experts and router are dropped, and each layer gets one feed-forward, newly drawn with
#            initializer_range, so that two loads of one file differ. No error; the usual log table calls the three
#            "MISSING" and "newly initialized", and no line of it names an expert.
# Seen with: transformers 5.23.0, gguf 0.19.0, accelerate 1.15.0, torch 2.13.0, 2026-11-30
# Output:    LlamaForCausalLM, attention as stored: True, of 3 feed-forward matrices: 0 from the file,
#            0 equal in two loads, lines of warnings on experts: 0
set -euo pipefail
sed -n 's/^# //p' "$0"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
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

EXPERTS, draw = 4, np.random.default_rng(0)


def matrix(*shape):
    return draw.normal(0, 0.3, shape).astype(np.float32)


def write(path):
    """A one-layer Mixtral of 4 experts, 2 to a token; returns its tensors."""
    out = gguf.GGUFWriter(path, "llama")
    out.add_embedding_length(64), out.add_feed_forward_length(96), out.add_vocab_size(64), out.add_context_length(256)
    out.add_block_count(1), out.add_head_count(2), out.add_head_count_kv(2), out.add_rope_dimension_count(32)
    out.add_layer_norm_rms_eps(1e-5), out.add_rope_freq_base(1e4)
    out.add_expert_count(EXPERTS), out.add_expert_used_count(2)
    names = ("token_embd", "output", "blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v", "blk.0.attn_output")
    tensors = {name: matrix(64, 64) for name in names}
    tensors |= dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), np.ones(64, np.float32))
    tensors |= {f"blk.0.ffn_{name}_exps": matrix(EXPERTS, 96, 64) for name in ("gate", "up")}
    tensors |= {"blk.0.ffn_down_exps": matrix(EXPERTS, 64, 96), "blk.0.ffn_gate_inp": matrix(EXPERTS, 64)}
    for name, numbers in tensors.items():
        out.add_tensor(name + ".weight", numbers)
    out.write_header_to_file(), out.write_kv_data_to_file(), out.write_tensors_to_file(), out.close()
    return tensors


said, listener = [], logging.Handler(logging.WARNING)
listener.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(listener)
warnings.showwarning = lambda message, *rest: said.append(str(message))
stored = write("mixtral.gguf")
models = [AutoModelForCausalLM.from_pretrained(".", gguf_file="mixtral.gguf", dtype=torch.float32) for _ in range(2)]
layers = [model.model.layers[0] for model in models]
read = all(torch.equal(layer.self_attn.v_proj.weight, torch.from_numpy(stored["blk.0.attn_v"])) for layer in layers)
again = of_the_file = 0
for name in ("gate", "up", "down"):
    first, second = (layer.mlp.get_submodule(f"{name}_proj").weight for layer in layers)
    again += torch.equal(first, second)
    of_the_file += sum(torch.equal(first, expert) for expert in torch.from_numpy(stored[f"blk.0.ffn_{name}_exps"]))
told = sum("exp" in line.lower() for text in said for line in text.splitlines())
print(f"{type(models[0]).__name__}, attention as stored: {read}, of 3 feed-forward matrices: {of_the_file} from "
      f"the file, {again} equal in two loads, lines of warnings on experts: {told}")
sys.exit(0 if type(models[0]).__name__ == "LlamaForCausalLM" and read and of_the_file == again == told == 0 else 1)
PYTHON
