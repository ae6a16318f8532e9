#!/usr/bin/env bash
# llama.cpp running gpt-oss: YaRN's ramp gets whole borders, although gpt-oss says "truncate": false.
#
# Expected:  gpt-oss's config.json says that the borders of YaRN's ramp (from frequencies kept to frequencies divided)
#            are not rounded: 8.1 and 17.4 of 32. transformers does so, vLLM and SGLang since their pull requests 28244
#            and 14270. Two runtimes of the same F32 weights choose the same next tokens.
# Behaviour: llama.cpp takes floor and ceil, 8 and 18, whatever the model (ggml_rope_yarn_corr_dims), and GGUF has no
#            key for it. With gpt-oss's own rope parameters and heads of 64, but small and with random weights (standard
#            deviation 0.2: how much a trained one differs is not shown), its first choice is another than transformers'
#            after a fifth of 1000 prefixes, and after none once transformers is told "truncate": true.
# Seen with: xllamacpp 2026.10.11549 (F32 KV cache, no flash attention), transformers 5.23.0, gguf 0.19.0, torch 2.13.0,
#            x86-64, 2026-11-30
# Output:    same first choice as transformers, of 1000: 788 with truncate false, 1000 with true
set -euo pipefail
sed -n 's/^# //p' "$0"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 gguf==0.19.0 xllamacpp==2026.10.11549
cd "$folder"
export TQDM_DISABLE=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
"$folder/venv/bin/python" - 2> "$folder/errors" <<'PYTHON' || { status=$?; tail -n 5 "$folder/errors"; exit "$status"; }
import sys

import gguf
import torch
import xllamacpp
from transformers import GptOssConfig, GptOssForCausalLM

TOKENS, SIZE, LAYERS, EXPERTS = 1000, 64, 4, 4  # SIZE: of heads, as gpt-oss's; of everything else, too
LETTERS = [chr(code) for code in range(33, 127)]  # the vocabulary: every token is a whole letter
YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 4096}


def build(truncate):
    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(
        vocab_size=len(LETTERS), hidden_size=SIZE, intermediate_size=SIZE, num_hidden_layers=LAYERS, head_dim=SIZE,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=2,
        initializer_range=0.2, rope_parameters=YARN | {"truncate": truncate},
    )).eval()


def tensors(model):
    """Each tensor by llama.cpp's name: experts' gate and up apart, rows are outputs."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, LAYERS)
    for name, numbers in model.state_dict().items():
        stem, _, own = name.rpartition(".")
        if own == "sinks":
            yield names.get_name(name) + ".weight", numbers
        elif not stem.endswith(".experts"):
            yield f"{names.get_name(stem)}.{own}", numbers
        else:
            suffix, numbers = ("bias", numbers) if own.endswith("_bias") else ("weight", numbers.transpose(1, 2))
            parts = {"down": numbers} if own.startswith("down") else {"gate": numbers[:, ::2], "up": numbers[:, 1::2]}
            for part, of_it in parts.items():
                yield f"{names.get_name(f'{stem}.{part}_proj')}.{suffix}", of_it


def write(model, path):
    out = gguf.GGUFWriter(path, "gpt-oss")
    out.add_context_length(4096), out.add_block_count(LAYERS), out.add_vocab_size(len(LETTERS))
    out.add_embedding_length(SIZE), out.add_feed_forward_length(SIZE), out.add_expert_feed_forward_length(SIZE)
    out.add_expert_count(EXPERTS), out.add_expert_used_count(2), out.add_sliding_window(model.config.sliding_window)
    out.add_head_count(4), out.add_head_count_kv(2), out.add_key_length(SIZE), out.add_value_length(SIZE)
    out.add_layer_norm_rms_eps(model.config.rms_norm_eps), out.add_rope_dimension_count(SIZE)
    out.add_rope_freq_base(YARN["rope_theta"]), out.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    out.add_rope_scaling_factor(YARN["factor"]), out.add_rope_scaling_orig_ctx_len(4096)
    out.add_tokenizer_model("gpt2"), out.add_tokenizer_pre("gpt-2"), out.add_token_merges(["! !"])
    out.add_token_list(LETTERS), out.add_token_types([1] * len(LETTERS))
    for name, numbers in tensors(model):
        out.add_tensor(name, numbers.contiguous().numpy())
    out.write_header_to_file(), out.write_kv_data_to_file(), out.write_tensors_to_file(), out.close()


def first_choices(path, ids):
    """llama.cpp's, after each prefix."""
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = path, TOKENS + 8, 1, 0
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server, asked = xllamacpp.Server(settings), {"n_predict": 1, "temperature": 0, "samplers": [], "logprobs": 1}
    said = [server.handle_completions(asked | {"prompt": ids[:end + 1]}) for end in range(TOKENS)]
    return torch.tensor([one["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["id"] for one in said])


models = {truncate: build(truncate) for truncate in (False, True)}
write(models[False], "model.gguf")
ids = torch.randint(len(LETTERS), (TOKENS,))
theirs = first_choices("model.gguf", ids.tolist())
with torch.no_grad():
    same = {key: int((model(ids[None]).logits[0].argmax(-1) == theirs).sum()) for key, model in models.items()}
print(f"same first choice as transformers, of {TOKENS}: {same[False]} with truncate false, {same[True]} with true")
sys.exit(0 if same[False] < 0.9 * TOKENS and same[True] > 0.99 * TOKENS else 1)
PYTHON
