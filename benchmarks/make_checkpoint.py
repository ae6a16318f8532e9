"""Write a random checkpoint in Hugging Face layout, a file for each layer, of which one is in memory at a time.

The values carry no meaning: speed, memory and traffic do not depend on them. They are drawn once (normal, std 0.02)
into a block, and the tensors are long windows into it, so that 26 GB are written at disk speed. Norms are 1 and biases
0, so activations stay finite.

    python benchmarks/make_checkpoint.py --shape llama-2-13b DIR
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from shapes import MIXTURES, ROUTER_SKEW, SHAPES
from transformers import AutoModelForCausalLM, GenerationConfig, GptOssConfig, LlamaConfig, PretrainedConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STD = 0.02
BLOCK_VALUES = 4_194_301  # prime: rows of a matrix never start at the same place of a block

TensorShapes = dict[str, torch.Size]


def model_config(shape: str, layers: int | None = None) -> PretrainedConfig:
    if shape in MIXTURES:
        return _mixture_config(shape, layers)
    hidden, feed_forward, default_layers, heads, kv_heads, vocabulary = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=default_layers if layers is None else layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


def _mixture_config(shape: str, layers: int | None) -> PretrainedConfig:
    mixture = MIXTURES[shape]
    return GptOssConfig(
        hidden_size=mixture.hidden,
        intermediate_size=mixture.inner,
        num_hidden_layers=mixture.layers if layers is None else layers,
        num_attention_heads=mixture.heads,
        num_key_value_heads=mixture.kv_heads,
        head_dim=mixture.head_size,
        vocab_size=mixture.vocabulary,
        num_local_experts=mixture.experts,
        num_experts_per_tok=mixture.active,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 150_000.0},
    )


def tensor_shapes(config: PretrainedConfig, dtype: torch.dtype) -> TensorShapes:
    """Names and shapes as transformers itself has them; nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def split_shards(shapes: TensorShapes) -> list[TensorShapes]:
    """A file for each layer, and one for all that is in none."""
    shards: dict[str, TensorShapes] = {}
    for name, shape in shapes.items():
        found = re.search(r"layers\.(\d+)\.", name)
        shards.setdefault(found[1] if found else "", {})[name] = shape
    return list(shards.values())


class RandomWeights:
    """Endless cheap weights: windows into a block of normal values."""

    def __init__(self, dtype: torch.dtype, seed: int = 0):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype
        self.block = torch.randn(BLOCK_VALUES, generator=self.generator).mul_(STD).to(dtype)

    def of(self, name: str, shape: torch.Size) -> torch.Tensor:
        if name.endswith("router.bias"):
            ranks = torch.randperm(shape[0], generator=self.generator) + 1
            return (-ROUTER_SKEW * ranks.log()).to(self.dtype)
        if len(shape) == 1:
            return torch.full(shape, float(not name.endswith("bias")), dtype=self.dtype)
        start, count = int(torch.randint(BLOCK_VALUES, (1,), generator=self.generator)), shape.numel()
        whole = self.block.roll(-start).repeat(-(-count // BLOCK_VALUES))
        return whole[:count].view(shape).clone()


def write_weights(folder: Path, shapes: TensorShapes, dtype: torch.dtype) -> None:
    shards, weights = split_shards(shapes), RandomWeights(dtype)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: weights.of(name, shape) for name, shape in shard.items()}, path, {"format": "pt"})
        path.chmod(0o644)  # safetensors makes them private
        with path.open("rb") as file:  # leave no gigabytes of page cache behind
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        weight_map.update(dict.fromkeys(shard, path.name))
    total_bytes = sum(map(math.prod, shapes.values())) * dtype.itemsize
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def make_checkpoint(folder: Path, shape: str, layers: int | None = None, dtype: str = "bf16") -> None:
    """Write the checkpoint under a temporary name and rename it, so a half-written one is never found."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another name or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = model_config(shape, layers)
    shapes = tensor_shapes(config, DTYPES[dtype])
    needed_bytes = sum(map(math.prod, shapes.values())) * DTYPES[dtype].itemsize
    free_bytes = shutil.disk_usage(folder.parent).free
    if needed_bytes > free_bytes:
        raise OSError(f"needs {needed_bytes / 1e9:.1f} GB on disk, free {free_bytes / 1e9:.1f} GB")
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        config.save_pretrained(partial)
        GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(partial)
        write_weights(partial, shapes, DTYPES[dtype])
        partial.chmod(0o755)  # mkdtemp made it private
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="checkpoint to write; must not exist")
    parser.add_argument("--shape", choices=[*SHAPES, *MIXTURES], required=True)
    parser.add_argument("--layers", type=int, help="override the number of layers")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    args = parser.parse_args()
    try:
        make_checkpoint(args.folder, args.shape, args.layers, args.dtype)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
