"""Write a random checkpoint in Hugging Face layout, tensor by tensor, with flat memory.

The values carry no meaning: speed, memory and traffic do not depend on them. They are drawn once (normal,
std 0.02) into a few blocks, and the tensors are long windows into those blocks, so that 26 GB are written
at disk speed. Norms are 1 and biases 0, so activations stay finite.

    python benchmarks/make_checkpoint.py --shape llama-2-13b DIR
"""

import argparse
import json
import math
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from shapes import MIXTURES, ROUTER_SKEW, SHAPES
from transformers import AutoModelForCausalLM, GenerationConfig, GptOssConfig, LlamaConfig, PretrainedConfig

DTYPES = {"bf16": (torch.bfloat16, "BF16"), "fp16": (torch.float16, "F16"), "fp32": (torch.float32, "F32")}
MAX_SHARD_BYTES = int(5e9)
STD = 0.02
BLOCK_COUNT = 3
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


def split_shards(shapes: TensorShapes, value_bytes: int, max_shard_bytes: int) -> list[TensorShapes]:
    """Fill shards in order; a tensor larger than a shard gets one of its own."""
    shards: list[TensorShapes] = [{}]
    used_bytes = 0
    for name, shape in shapes.items():
        tensor_bytes = shape.numel() * value_bytes
        if shards[-1] and used_bytes + tensor_bytes > max_shard_bytes:
            shards.append({})
            used_bytes = 0
        shards[-1][name] = shape
        used_bytes += tensor_bytes
    return shards


class RandomBytes:
    """Endless cheap weights: windows into a few blocks of normal values."""

    def __init__(self, dtype: torch.dtype, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.blocks = [self._block() for _ in range(BLOCK_COUNT)]

    def _block(self) -> memoryview:
        values = torch.randn(BLOCK_VALUES, generator=self.generator).mul_(STD).to(self.dtype)
        return memoryview(values.view(torch.uint8).numpy())

    def _draw(self, high: int) -> int:
        return int(torch.randint(high, (1,), generator=self.generator))

    def of(self, name: str, shape: torch.Size) -> Iterator[memoryview]:
        """Bytes of one tensor, in pieces of at most one block."""
        if name.endswith("router.bias"):
            ranks = torch.randperm(shape[0], generator=self.generator) + 1
            yield memoryview((-ROUTER_SKEW * ranks.log()).to(self.dtype).view(torch.uint8).numpy())
            return
        if len(shape) == 1:
            constant = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
            yield memoryview(constant.to(self.dtype).view(torch.uint8).numpy())
            return
        block = self.blocks[self._draw(BLOCK_COUNT)]
        start = self._draw(BLOCK_VALUES) * self.dtype.itemsize
        left_bytes = shape.numel() * self.dtype.itemsize
        while left_bytes:
            piece = block[start : start + left_bytes]
            yield piece
            left_bytes -= len(piece)
            start = 0


def safetensors_header(shapes: TensorShapes, dtype_name: str, value_bytes: int) -> bytes:
    """Length, then JSON padded so that the data start at a multiple of 8 bytes (the format's rule)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + shape.numel() * value_bytes
        header[name] = {"dtype": dtype_name, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_shard(path: Path, shapes: TensorShapes, weights: RandomBytes, dtype_name: str) -> None:
    with path.open("wb", buffering=0) as file:
        file.write(safetensors_header(shapes, dtype_name, weights.dtype.itemsize))
        for name, shape in shapes.items():
            for piece in weights.of(name, shape):
                while piece:  # an unbuffered write may be short
                    piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # leave no gigabytes of page cache behind


def write_weights(folder: Path, shapes: TensorShapes, dtype: str, max_shard_bytes: int) -> None:
    torch_dtype, dtype_name = DTYPES[dtype]
    shards = split_shards(shapes, torch_dtype.itemsize, max_shard_bytes)
    total_bytes = sum(map(math.prod, shapes.values())) * torch_dtype.itemsize
    weights = RandomBytes(torch_dtype)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        write_shard(folder / file_name, shard, weights, dtype_name)
        weight_map.update(dict.fromkeys(shard, file_name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def make_checkpoint(
    folder: Path,
    shape: str,
    layers: int | None = None,
    dtype: str = "bf16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the checkpoint under a temporary name and rename it, so a half-written one is never found."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another name or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = model_config(shape, layers)
    shapes = tensor_shapes(config, DTYPES[dtype][0])
    needed_bytes = sum(map(math.prod, shapes.values())) * DTYPES[dtype][0].itemsize
    free_bytes = shutil.disk_usage(folder.parent).free
    if needed_bytes > free_bytes:
        raise OSError(f"needs {needed_bytes / 1e9:.1f} GB on disk, free {free_bytes / 1e9:.1f} GB")
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        config.save_pretrained(partial)
        GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(partial)
        write_weights(partial, shapes, dtype, max_shard_bytes)
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
    parser.add_argument("--max-shard-bytes", type=int, default=MAX_SHARD_BYTES)
    args = parser.parse_args()
    try:
        make_checkpoint(args.folder, args.shape, args.layers, args.dtype, args.max_shard_bytes)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
