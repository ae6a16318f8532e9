"""Write a GGUF file of random blocks: a Llama in one of llama.cpp's smaller types, or gpt-oss with experts in MXFP4.

    PYTHONPATH=benchmarks ENV/bin/python -m peers.gguf_random OUT.gguf --shape llama-2-13b --type Q4_K
    PYTHONPATH=benchmarks ENV/bin/python -m peers.gguf_random OUT.gguf --shape gpt-oss-20b

For times alone: nothing has to be quantised, and nothing of the original is there. Steps are such that weights are of a
trained model's size, and routers are skewed by their biases. Both engines read this one file, so that weights, bytes
and routing are the same. ENV has `gguf` and `numpy`.
"""

import argparse
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from peers.gguf_file import add_config, add_vocabulary, kind_of, write_file
from shapes import MIXTURES, ROUTER_SKEW, SHAPES, Mixture

Kind = GGMLQuantizationType
Tensors = Iterator[tuple[str, tuple[tuple[int, ...], GGMLQuantizationType]]]
"""Name, and shape and kind."""
# Where a block has its steps, 16-bit floats, and how large they are.
STEPS = {
    Kind.Q8_0: {0: 3e-4},
    Kind.Q4_0: {0: 4e-3},
    Kind.Q4_K: {0: 1.5e-4, 2: 1.1e-3},
    Kind.Q6_K: {208: 1.5e-5},
    Kind.Q3_K: {108: 5e-4},
    Kind.Q2_K: {80: 2e-3, 82: 3e-3},
    Kind.IQ3_XXS: {0: 2e-3},
}
# 2^-6 in E8M0, halved by the codes' own doubled values: numbers of about .02.
MXFP4_EXPONENT = 121


def blocks(kind: GGMLQuantizationType, shape: tuple[int, ...], random: numpy.random.Generator) -> numpy.ndarray:
    """Bytes [blocks, bytes of a block]."""
    numbers, nbytes = GGML_QUANT_SIZES[kind]
    found = random.integers(0, 256, (prod(shape) // numbers, nbytes), dtype=numpy.uint8)
    for at, step in STEPS.get(kind, {}).items():
        found[:, at : at + 2] = numpy.frombuffer(numpy.float16(step).tobytes(), dtype=numpy.uint8)
    if kind == Kind.Q4_K:  # steps and offsets of groups as they are to each other where weights lie about zero
        found[:, 4:16] = found[:, 4:16] & 15 | 0xA0
    if kind == Kind.MXFP4:
        found[:, 0] = MXFP4_EXPONENT
    return found


def floats(name: str, shape: tuple[int, ...], random: numpy.random.Generator) -> numpy.ndarray:
    if name.endswith("ffn_gate_inp.bias"):
        return (-ROUTER_SKEW * numpy.log(random.permutation(shape[0]) + 1)).astype("<f4")
    if name.endswith("ffn_gate_inp.weight"):
        return (0.02 * random.standard_normal(shape)).astype("<f4")
    return numpy.full(shape, float(name.endswith("norm.weight")), dtype="<f4")


def llama_tensors(shape: tuple[int, ...], file_type: str) -> Tensors:
    """Q4_K_M as llama.cpp's own program has it; of any other type all matrices but head and embeddings, in Q6_K."""
    hidden, inner, layers, heads, kv_heads, words = shape
    kv = hidden // heads * kv_heads
    sizes = {"attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden)}
    sizes |= {"attn_output": (hidden, hidden), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden)}
    sizes |= {"ffn_down": (hidden, inner)}
    embeddings = Kind.Q4_K if file_type == "Q4_K_M" else Kind.Q6_K
    yield "token_embd.weight", ((words, hidden), embeddings)
    for layer in range(layers):
        for name, size in sizes.items():
            tensor = f"blk.{layer}.{name}.weight"
            yield tensor, (size, kind_of(tensor, size, file_type, layers, head=False))
        for name in ("attn", "ffn"):
            yield f"blk.{layer}.{name}_norm.weight", ((hidden,), Kind.F32)
    yield "output_norm.weight", ((hidden,), Kind.F32)
    yield "output.weight", ((words, hidden), Kind.Q6_K)


def mixture_tensors(mixture: Mixture) -> Tensors:
    hidden, inner, experts = mixture.hidden, mixture.inner, mixture.experts
    queries, keys = mixture.heads * mixture.head_size, mixture.kv_heads * mixture.head_size
    attention = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "output": (hidden, queries)}
    yield "token_embd.weight", ((mixture.vocabulary, hidden), Kind.Q8_0)
    for layer in range(mixture.layers):
        block = f"blk.{layer}"
        for name in ("attn_norm", "post_attention_norm"):
            yield f"{block}.{name}.weight", ((hidden,), Kind.F32)
        for name, size in attention.items():
            yield f"{block}.attn_{name}.weight", (size, Kind.Q8_0)
            yield f"{block}.attn_{name}.bias", (size[:1], Kind.F32)
        yield f"{block}.attn_sinks.weight", ((mixture.heads,), Kind.F32)
        yield f"{block}.ffn_gate_inp.weight", ((experts, hidden), Kind.F32)
        yield f"{block}.ffn_gate_inp.bias", ((experts,), Kind.F32)
        for name, outputs, inputs in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            yield f"{block}.ffn_{name}_exps.weight", ((experts, outputs, inputs), Kind.MXFP4)
            yield f"{block}.ffn_{name}_exps.bias", ((experts, outputs), Kind.F32)
    yield "output_norm.weight", ((hidden,), Kind.F32)
    yield "output.weight", ((mixture.vocabulary, hidden), Kind.Q8_0)


def mixture_writer(mixture: Mixture) -> GGUFWriter:
    writer = GGUFWriter(None, "gpt-oss")
    writer.add_context_length(4096)
    writer.add_embedding_length(mixture.hidden)
    writer.add_block_count(mixture.layers)
    writer.add_feed_forward_length(mixture.inner)
    writer.add_expert_feed_forward_length(mixture.inner)
    writer.add_expert_count(mixture.experts)
    writer.add_expert_used_count(mixture.active)
    writer.add_head_count(mixture.heads)
    writer.add_head_count_kv(mixture.kv_heads)
    writer.add_key_length(mixture.head_size)
    writer.add_value_length(mixture.head_size)
    writer.add_rope_dimension_count(mixture.head_size)
    writer.add_rope_freq_base(150_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(128)
    add_vocabulary(writer, mixture.vocabulary)
    return writer


def llama_writer(shape: tuple[int, ...], file_type: str) -> GGUFWriter:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = dict(zip((*names, "vocab_size"), shape, strict=True))
    writer = GGUFWriter(None, "llama")
    add_config(
        writer,
        config | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        "Q2_K" if file_type == "Q2_K" else "Q4_K_M",
    )
    return writer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=[*SHAPES, *MIXTURES], default="llama-2-13b")
    parser.add_argument("--layers", type=int, help="fewer than a Llama's shape has")
    types = [kind.name for kind in STEPS]
    parser.add_argument("--type", choices=["Q4_K_M", *types], default="Q4_K", help="of a Llama's matrices")
    args = parser.parse_args()
    random = numpy.random.default_rng(0)
    if args.shape in MIXTURES:
        writer, tensors = mixture_writer(MIXTURES[args.shape]), dict(mixture_tensors(MIXTURES[args.shape]))
    else:
        hidden, inner, layers, *others = SHAPES[args.shape]
        shape = (hidden, inner, args.layers or layers, *others)
        writer, tensors = llama_writer(shape, args.type), dict(llama_tensors(shape, args.type))

    def data(name: str) -> numpy.ndarray:
        shape, kind = tensors[name]
        return floats(name, shape, random) if kind == Kind.F32 else blocks(kind, shape, random)

    write_file(writer, args.out, tensors, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
