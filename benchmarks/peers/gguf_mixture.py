"""Write a random GGUF file of gpt-oss' shape: experts in MXFP4, other matrices in Q8_0, routers skewed by their biases.

    PYTHONPATH=benchmarks ENV/bin/python -m peers.gguf_mixture OUT.gguf --shape gpt-oss-20b

Both engines read this one file, so that weights, bytes and routing are the same. The values carry no meaning; they are
windows into a few random blocks, small enough that activations stay finite. ENV has `gguf` and `numpy`.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from mixtures import MIXTURES, ROUTER_SKEW, Mixture
from peers.gguf_file import add_vocabulary

Kind = GGMLQuantizationType
Tensors = Iterator[tuple[str, tuple[int, ...], GGMLQuantizationType]]
BLOCKS = 262_139  # prime: rows of a matrix never start at the same place of them
_MXFP4_EXPONENT = 121
"""2^-6 in E8M0, halved by the codes' own doubled values: numbers of about .02."""
_Q8_0_STEP = 0.0004


def tensors_of(mixture: Mixture) -> Tensors:
    """(name, shape, kind) in the order of the file."""
    hidden, inner, experts = mixture.hidden, mixture.inner, mixture.experts
    queries, keys = mixture.heads * mixture.head_size, mixture.kv_heads * mixture.head_size
    yield "token_embd.weight", (mixture.vocabulary, hidden), Kind.Q8_0
    for layer in range(mixture.layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (hidden,), Kind.F32
        for name, outputs, inputs in (
            ("q", queries, hidden),
            ("k", keys, hidden),
            ("v", keys, hidden),
            ("output", hidden, queries),
        ):
            yield f"{block}.attn_{name}.weight", (outputs, inputs), Kind.Q8_0
            yield f"{block}.attn_{name}.bias", (outputs,), Kind.F32
        yield f"{block}.attn_sinks.weight", (mixture.heads,), Kind.F32
        yield f"{block}.post_attention_norm.weight", (hidden,), Kind.F32
        yield f"{block}.ffn_gate_inp.weight", (experts, hidden), Kind.F32
        yield f"{block}.ffn_gate_inp.bias", (experts,), Kind.F32
        for name, outputs, inputs in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            yield f"{block}.ffn_{name}_exps.weight", (experts, outputs, inputs), Kind.MXFP4
            yield f"{block}.ffn_{name}_exps.bias", (experts, outputs), Kind.F32
    yield "output_norm.weight", (hidden,), Kind.F32
    yield "output.weight", (mixture.vocabulary, hidden), Kind.Q8_0


def add_metadata(writer: GGUFWriter, mixture: Mixture) -> None:
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
    writer.add_vocab_size(mixture.vocabulary)
    add_vocabulary(writer, mixture.vocabulary)


class RandomBlocks:
    """Endless cheap weights: windows into blocks of each kind that were drawn once."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = numpy.random.default_rng(seed)
        self._blocks = {Kind.MXFP4: self._mxfp4(), Kind.Q8_0: self._q8_0()}

    def _mxfp4(self) -> numpy.ndarray:
        blocks = self._generator.integers(0, 256, (BLOCKS, 17), dtype=numpy.uint8)
        blocks[:, 0] = _MXFP4_EXPONENT
        return blocks

    def _q8_0(self) -> numpy.ndarray:
        step = numpy.full((BLOCKS, 1), _Q8_0_STEP, dtype="<f2").view(numpy.uint8)
        numbers = (40 * self._generator.standard_normal((BLOCKS, 32))).clip(-127, 127).astype(numpy.int8)
        return numpy.concatenate([step, numbers.view(numpy.uint8)], axis=1)

    def of(self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> numpy.ndarray:
        if kind != Kind.F32:
            count = math.prod(shape) // GGML_QUANT_SIZES[kind][0]
            start = int(self._generator.integers(BLOCKS))
            return numpy.take(self._blocks[kind], range(start, start + count), axis=0, mode="wrap")
        if name.endswith("ffn_gate_inp.bias"):
            ranks = self._generator.permutation(shape[0]) + 1
            return (-ROUTER_SKEW * numpy.log(ranks)).astype("<f4")
        if name.endswith("ffn_gate_inp.weight"):
            return (0.02 * self._generator.standard_normal(shape)).astype("<f4")
        return numpy.full(shape, float(name.endswith("norm.weight")), dtype="<f4")


def write_mixture(shape: str, out: Path) -> None:
    """The file appears under its name when it is whole."""
    mixture, partial = MIXTURES[shape], out.with_suffix(".partial")
    writer = GGUFWriter(partial, "gpt-oss")
    add_metadata(writer, mixture)
    for name, sizes, kind in tensors_of(mixture):
        count, size = GGML_QUANT_SIZES[kind]
        stored = (*sizes[:-1], sizes[-1] // count * size) if kind != Kind.F32 else sizes
        dtype = numpy.dtype("<f4" if kind == Kind.F32 else "u1")
        writer.add_tensor_info(name, stored, dtype, math.prod(stored) * dtype.itemsize, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    weights = RandomBlocks()
    for name, sizes, kind in tensors_of(mixture):
        writer.write_tensor_data(weights.of(name, sizes, kind))
    writer.close()
    partial.rename(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=MIXTURES, default="gpt-oss-20b")
    args = parser.parse_args()
    write_mixture(args.shape, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
