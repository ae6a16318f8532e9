"""The valid files that cases damage."""

import shutil
from pathlib import Path
from typing import Any

import torch
from foreign_formats import FORMATS, write_foreign
from gguf_files import write_gguf
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
FOREIGN = ("fp8 blocks", "nvfp4 of modelopt", "gptq", "awq")  # packed by ourselves: no library has to be there
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


def make_foreign(folder: Path) -> tuple[bytes, dict[str, dict[str, bytes]]]:
    """A GGUF file with a vocabulary, and directories of some formats of others; `folder` is `make_files`'."""
    model = AutoModelForCausalLM.from_pretrained(folder / "plain")
    words = {"tokens": ["<unk>", "a"], "scores": [0.0, 1.0]}
    more = {"tokenizer.ggml.model": "llama", **{f"tokenizer.ggml.{name}": value for name, value in words.items()}}
    gguf = write_gguf(model, folder / "a.gguf", "Q8_0", more=more).read_bytes()
    model.save_pretrained(folder / "single")
    packed = {}
    for name in FOREIGN:
        directory = folder / name
        write_foreign(folder / "single", directory, FORMATS[name])
        packed[name] = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    return gguf, packed


def shards(files: dict[str, bytes]) -> list[str]:
    return sorted(name for name in files if name.endswith(".safetensors"))
