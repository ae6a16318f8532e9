"""Write a GGUF file from a Llama checkpoint in Hugging Face layout, its matrices quantised by ggml's own code.

    PYTHONPATH=benchmarks ENV/bin/python -m peers.gguf_file CHECKPOINT OUT.gguf --type Q4_K_M

Tensor by tensor from mapped files, so memory stays flat. 16-bit values are written as they are and norms widened to 32
bit, so that a file in the checkpoint's own type computes with its weights. Words are numbers: callers give token ids.
ENV has `xllamacpp`, `gguf` and `numpy`.
"""

import argparse
import json
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    TokenType,
    get_tensor_name_map,
)

Kind = GGMLQuantizationType
PLAIN = {"BF16": ("<u2", "MOSTLY_BF16"), "F16": ("<f2", "MOSTLY_F16"), "F32": ("<f4", "ALL_F32")}
QUANTISED = ("Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M")
# For rows that are no whole blocks of 256, as llama.cpp has it.
OF_SHORT_ROWS = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}


@dataclass(frozen=True)
class Tensor:
    """Where a tensor's values lie in its file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> numpy.ndarray:
        """Mapped, not copied; bf16 as the 16 bits that it is."""
        return numpy.memmap(self.path, PLAIN[self.dtype][0], "r", self.offset, self.shape)


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """From the headers of the safetensors files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start = 8 + length + entry["data_offsets"][0]
            found[name] = Tensor(path, entry["dtype"], tuple(entry["shape"]), start)
    return found


def checked_config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    if config["model_type"] != "llama" or rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise SystemExit(f"error: {folder.name} is not a Llama model with plain rotary positions")
    return dict(config)


def add_config(writer: GGUFWriter, config: Mapping[str, Any], file_type: str) -> None:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    writer.add_file_type(int(LlamaFileType[PLAIN[file_type][1] if file_type in PLAIN else f"MOSTLY_{file_type}"]))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    add_vocabulary(writer, config["vocab_size"])


def add_vocabulary(writer: GGUFWriter, size: int) -> None:
    """Word N is "tN" for every N, and none is kept from what the server says."""
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{number}" for number in range(size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([int(TokenType.NORMAL)] * size)


def write_file(
    writer: GGUFWriter,
    out: Path,
    tensors: Mapping[str, tuple[Sequence[int], GGMLQuantizationType]],
    data: Callable[[str], numpy.ndarray],
) -> None:
    """Shapes and kinds of all, then the bytes of one after the other. The file appears under its name when it is whole;
    `writer` has what else is in it."""
    partial = out.with_suffix(".partial")
    for name, (shape, kind) in tensors.items():
        numbers, nbytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % numbers:
            raise SystemExit(f"error: {name} has rows of {shape[-1]} numbers, {kind.name} has blocks of {numbers}")
        stored = (*shape[:-1], shape[-1] // numbers * nbytes)
        writer.add_tensor_info(name, stored, numpy.dtype("u1"), prod(stored), raw_dtype=kind)
    writer.write_header_to_file(partial)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in tensors:
        writer.write_tensor_data(numpy.ascontiguousarray(data(name)))
    writer.close()
    partial.rename(out)


def interleaved(values: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Rotary pairs lie side by side in llama.cpp, and half a head apart in transformers."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def float32(values: numpy.ndarray) -> numpy.ndarray:
    return (values.astype("<u4") << 16).view("<f4") if values.dtype == numpy.dtype("<u2") else values.astype("<f4")


def kind_of(name: str, shape: Sequence[int], file_type: str, layers: int, *, head: bool) -> GGMLQuantizationType:
    """Of a tensor by llama.cpp's name, as its own program has it in quantised files of this type. Q4_0 is Q4_0
    throughout, which is fewer bytes than in its own."""
    if len(shape) == 1:
        return Kind.F32
    kind = Kind[file_type.removesuffix("_M")]
    if file_type.endswith("_K_M"):
        _, number, *part = name.split(".") if name.startswith("blk.") else ("", "0", "")
        eighth, layer = layers // 8, int(number)
        more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
        if head or (more and part[0] in ("attn_v", "ffn_down")):
            kind = Kind.Q6_K
    return OF_SHORT_ROWS[kind] if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


def write_gguf(folder: Path, out: Path, file_type: str, threads: int) -> None:
    config, stored = checked_config(folder), checkpoint_tensors(folder)
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, layers)
    known = {names.get_name(name, try_suffixes=(".weight", ".bias")): name for name in stored}
    if None in known:
        raise SystemExit(f"error: llama.cpp has no name for {known[None]}")
    head = "output.weight" if "output.weight" in known else "token_embd.weight"

    def kind(name: str, tensor: Tensor) -> GGMLQuantizationType:
        if file_type in PLAIN and len(tensor.shape) > 1:
            return Kind[tensor.dtype]
        return kind_of(name, tensor.shape, file_type, layers, head=name == head)

    kinds = {name: kind(name, stored[own]) for name, own in known.items()}

    def data(name: str) -> numpy.ndarray:
        values = stored[known[name]].read()
        for part, count in (("attn_q", heads), ("attn_k", config.get("num_key_value_heads", heads))):
            values = interleaved(values, count) if part in name else values
        if len(values.shape) == 1:
            return float32(values)
        if file_type in PLAIN:
            return values
        from peers.ggml import quantise  # what writes random files does without llama.cpp

        return quantise(float32(values), kinds[name], threads=threads)

    writer = GGUFWriter(None, "llama")
    add_config(writer, config, file_type)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(writer, out, {name: (stored[own].shape, kinds[name]) for name, own in known.items()}, data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="checkpoint")
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="Q4_K_M", choices=(*PLAIN, *QUANTISED), help="BF16: the checkpoint's own")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    write_gguf(args.folder, args.out, args.type, args.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
