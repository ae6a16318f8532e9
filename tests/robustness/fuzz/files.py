"""The valid files that cases damage."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from griffin_offload.demo import demo_directory
from griffin_offload.engine.convert import convert
from griffin_offload.engine.model import GriffinModel

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 4096}
SIZES |= {"max_position_embeddings": 128}
MORE: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "mistral": {"intermediate_size": 64, "sliding_window": 16, "num_key_value_heads": 2},
    "gemma2": {"intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 2, "sliding_window": 16},
    "qwen2": {"intermediate_size": 64, "num_key_value_heads": 2},
    "phi3": {"intermediate_size": 64, "pad_token_id": 0},
    "gpt_neox": {"intermediate_size": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "falcon": {"ffn_hidden_size": 64},
    "gpt2": {"n_inner": 64},
    "gptj": {"n_inner": 64, "rotary_dim": 4},
    "bloom": {},
}
PLANTED = b"import os\nos.system('true')\nopen('/tmp/planted', 'w')\n"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def make_files(folder: Path) -> tuple[dict[str, bytes], dict[str, bytes], bytes]:
    """A checkpoint of three shards, its int8 copy, and a saved context."""
    config = AutoConfig.for_model("llama", **SIZES, **MORE["llama"], eos_token_id=None, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "plain", max_shard_size="60kB")
    for name in TOKENIZER_FILES:
        shutil.copy(demo_directory() / name, folder / "plain")
    convert(folder / "plain", folder / "converted", "int8")
    with GriffinModel.from_pretrained(folder / "plain", density=0.5, ctx_size=64) as loaded:
        context = loaded.new_context()
        loaded.generate(torch.arange(20)[None], max_new_tokens=4, context=context)
        loaded.save_context(context, folder / "a.ctx")
    read = [{path.name: path.read_bytes() for path in (folder / name).iterdir()} for name in ("plain", "converted")]
    return read[0], read[1], (folder / "a.ctx").read_bytes()


def shards(files: dict[str, bytes]) -> list[str]:
    return sorted(name for name in files if name.endswith(".safetensors"))
