"""`export` in vLLM: `GRIFFIN_VLLM=PYTHON pytest tests/engine/test_export_vllm.py`, PYTHON having it, in any build."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers as hf
from tiny_models import VOCAB, write_tokenizer

from griffin_offload import GriffinModel
from griffin_offload.engine import export as runtime

PYTHON = os.environ.get("GRIFFIN_VLLM")
LOADS = Path(__file__).parents[1] / "support" / "vllm_loads.py"
SIZES = {"vocab_size": VOCAB, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 64}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "intermediate_size": 256}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
# With the matrices of a layer as vLLM has them: q, k and v in one, o; of all experts two, of a shared one two more.
CONFIGS = {
    "Llama": (hf.LlamaConfig(**SIZES), 4),
    "Mixtral": (hf.MixtralConfig(**SIZES, num_local_experts=8), 4),
    "Qwen3Moe": (hf.Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True), 4),
    "Qwen2Moe": (hf.Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=256), 6),
}
OPTIONS = {"device": "cpu", "max_gpu_mem": "1GB", "always_stream": True, "density": 0.5, "keep_prompts": True}


@pytest.mark.skipif(PYTHON is None, reason="GRIFFIN_VLLM names no interpreter that has vLLM")
def test_vllm_reads_configs_and_its_models_take_every_tensor(tmp_path: Path):
    """Marlin's sizes are the real ones, so the models are as large as these."""
    made, expected = [], []
    prompts = [torch.randint(3, VOCAB, (12,), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for name, (config, matrices) in CONFIGS.items():
        path = tmp_path / name
        hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
        write_tokenizer(path)
        with GriffinModel.from_pretrained(path, **OPTIONS, ctx_size=40) as model:
            choice = runtime.choose(model, prompts)
        forms: list[runtime.ExportForm] = ["unquantized", "w8a16", "w4a16"]
        for form in forms:
            made.append(runtime.export(path, tmp_path / f"{name}-{form}", choice, 0.5, form=form).directory)
            packed = form != "unquantized"
            expected.append(
                {
                    "architecture": f"{name}ForCausalLM",
                    "quantization": "compressed-tensors" if packed else None,
                    "unset": [],
                    "packed": matrices * config.num_hidden_layers if packed else 0,
                }
            )
    command = [str(PYTHON), str(LOADS), str(tmp_path), *map(str, made)]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert json.loads(said.splitlines()[-1]) == expected
