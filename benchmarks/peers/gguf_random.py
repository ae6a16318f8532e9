"""Write a GGUF file of a Llama's shape whose blocks are random numbers, in any of llama.cpp's smaller types.

    PYTHONPATH=benchmarks ENV/bin/python -m peers.gguf_random OUT.gguf --shape llama-2-13b --type Q4_K

For times alone: nothing has to be quantised, and nothing of the original is there. Steps are such that weights are of a
trained model's size. Head and embeddings are Q6_K, as in llama.cpp's own mixtures; words are numbers.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from make_checkpoint import SHAPES
from peers.gguf_file import add_config, add_vocabulary

# Where a block has its steps, 16-bit floats, and how large they are.
STEPS = {
    "Q8_0": {0: 3e-4},
    "Q4_0": {0: 4e-3},
    "Q4_K": {0: 1.5e-4, 2: 1.1e-3},
    "Q6_K": {208: 1.5e-5},
    "Q3_K": {108: 5e-4},
    "Q2_K": {80: 2e-3, 82: 3e-3},
    "IQ3_XXS": {0: 2e-3},
}


def blocks(kind: str, rows: int, width: int, random: numpy.random.Generator) -> numpy.ndarray:
    """Bytes [rows, bytes of a row]."""
    numbers, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    found = random.integers(0, 256, (rows * width // numbers, nbytes), dtype=numpy.uint8)
    for at, step in STEPS[kind].items():
        found[:, at : at + 2] = numpy.frombuffer(numpy.float16(step).tobytes(), dtype=numpy.uint8)
    if kind == "Q4_K":  # steps and offsets of groups as they are to each other where weights lie about zero
        found[:, 4:16] = found[:, 4:16] & 15 | 0xA0
    return found.reshape(rows, -1)


def tensors(shape: Sequence[int], kind: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """By llama.cpp's names: type, and [outputs, inputs] or [numbers]."""
    hidden, inner, layers, heads, kv_heads, words = shape
    kv = hidden // heads * kv_heads
    found: dict[str, tuple[str, tuple[int, ...]]] = {"token_embd.weight": ("Q6_K", (words, hidden))}
    for index in range(layers):
        sizes = {"attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden)}
        sizes |= {"attn_output": (hidden, hidden), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden)}
        sizes |= {"ffn_down": (hidden, inner)}
        found |= {f"blk.{index}.{name}.weight": (kind, size) for name, size in sizes.items()}
        found |= {f"blk.{index}.{name}_norm.weight": ("F32", (hidden,)) for name in ("attn", "ffn")}
    return found | {"output_norm.weight": ("F32", (hidden,)), "output.weight": ("Q6_K", (words, hidden))}


def write(out: Path, shape: Sequence[int], kind: str) -> None:
    """The file appears under its name when it is whole."""
    hidden, inner, layers, heads, kv_heads, words = shape
    config: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": words}
    config |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    config |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    writer = GGUFWriter(out.with_suffix(".partial"), "llama")
    add_config(writer, config, "Q2_K" if kind == "Q2_K" else "Q4_K_M")
    add_vocabulary(writer, words)
    known = tensors(shape, kind)
    for name, (own, size) in known.items():
        numbers, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[own]]
        bytes_shape = (*size[:-1], size[-1] // numbers * nbytes)
        writer.add_tensor_info(
            name, bytes_shape, numpy.dtype("u1"), int(numpy.prod(bytes_shape)), raw_dtype=GGMLQuantizationType[own]
        ) if own != "F32" else writer.add_tensor_info(
            name, size, numpy.dtype("f4"), 4 * size[0], raw_dtype=GGMLQuantizationType.F32
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = numpy.random.default_rng(0)
    for own, size in known.values():
        data = numpy.ones(size, dtype=numpy.float32) if own == "F32" else blocks(own, *size, random)
        writer.write_tensor_data(data)
    writer.close()
    out.with_suffix(".partial").rename(out)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-2-13b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--type", choices=list(STEPS), default="Q4_K", help="of the layers' matrices")
    options = parser.parse_args(arguments)
    hidden, inner, layers, *others = SHAPES[options.shape]
    write(options.out, (hidden, inner, options.layers or layers, *others), options.type)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
