"""Checkpoints of gpt-oss whose experts are packed in MXFP4, as its makers publish them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_checkpoint
from torch import Tensor

EXPERT_MATRICES = ("gate_up_proj", "down_proj")


def pack(tensors: dict[str, Tensor], seed: int = 0) -> None:
    """Put random codes in the place of all matrices of experts, [E, I, O]: blocks [E, O, I / 32, 16] and scales."""
    generator = torch.Generator().manual_seed(seed)
    for name in [name for name in tensors if name.endswith(EXPERT_MATRICES)]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 125, shape, generator=generator, dtype=torch.uint8)


def write_mxfp4(directory: Path) -> Path:
    """A tiny gpt-oss with packed experts."""
    write_checkpoint("gpt_oss", directory, torch.bfloat16, shards=1)
    tensors = load_file(directory / "model.safetensors")
    pack(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    left_out = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    method = {"quant_method": "mxfp4", "modules_to_not_convert": left_out}
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    return directory
