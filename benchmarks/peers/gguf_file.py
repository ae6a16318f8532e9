"""Write a GGUF file from a Llama checkpoint in Hugging Face layout, and quantise it with llama.cpp's own code.

    PYTHONPATH=benchmarks ENV/bin/python -m peers.gguf_file CHECKPOINT OUT.gguf --type Q4_K_M

Tensor by tensor from mapped files, so memory stays flat. 16-bit values are written as they are and only norms widened
to 32 bit, so the unquantised file computes with the checkpoint's own weights. No vocabulary: callers give token ids.
`write_gguf` of Q4_0 by the gguf package has one of numbers, for a server, and needs no llama.cpp.
"""

import argparse
import ctypes
import json
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from gguf import (
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    TokenType,
    get_tensor_name_map,
    quants,
)

Kind = GGMLQuantizationType
DTYPES = {
    "BF16": (numpy.dtype("<u2"), Kind.BF16, "MOSTLY_BF16"),
    "F16": (numpy.dtype("<f2"), Kind.F16, "MOSTLY_F16"),
    "F32": (numpy.dtype("<f4"), Kind.F32, "ALL_F32"),
}
UNQUANTISED = {"BF16", "F16", "F32"}


@dataclass(frozen=True)
class Tensor:
    """Where a tensor's values lie in its file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> numpy.ndarray:
        """Mapped, not copied; bf16 as the 16 bits that it is."""
        return numpy.memmap(self.path, DTYPES[self.dtype][0], "r", self.offset, self.shape)


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


def add_config(writer: GGUFWriter, config: dict[str, Any], file_type: str) -> None:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    writer.add_file_type(llama_file_type(file_type))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def add_vocabulary(writer: GGUFWriter, size: int) -> None:
    """Words are numbers: nothing reads them."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{number}" for number in range(3, size))])
    writer.add_token_scores([0.0] * size)
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.NORMAL] * (size - 3)]
    writer.add_token_types([int(kind) for kind in kinds])


def llama_file_type(name: str) -> int:
    prefixed = DTYPES[name][2] if name in DTYPES else f"MOSTLY_{name}"
    return int(LlamaFileType[prefixed])


def interleaved(values: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Rotary pairs lie side by side in llama.cpp, and half a head apart in transformers."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def converted(name: str, tensor: Tensor, config: dict[str, Any]) -> numpy.ndarray:
    values = tensor.read()
    if ".q_proj." in name:
        values = interleaved(values, config["num_attention_heads"])
    elif ".k_proj." in name:
        values = interleaved(values, config.get("num_key_value_heads", config["num_attention_heads"]))
    if len(tensor.shape) == 1 and tensor.dtype == "BF16":
        return (values.astype(numpy.uint32) << 16).view(numpy.float32)
    return values.astype(numpy.float32) if len(tensor.shape) == 1 else values


def write_gguf(folder: Path, out: Path, *, q4_0: bool = False) -> None:
    """With `q4_0` every matrix, head and embeddings too."""
    config, tensors = checked_config(folder), checkpoint_tensors(folder)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    stored = max(tensors.values(), key=lambda tensor: len(tensor.shape)).dtype
    writer = GGUFWriter(out, "llama")
    add_config(writer, config, "Q4_0" if q4_0 else stored)
    if q4_0:
        add_vocabulary(writer, config["vocab_size"])
    else:
        writer.add_tokenizer_model("no_vocab")
    for name, tensor in tensors.items():
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise SystemExit(f"error: llama.cpp has no name for {name}")
        if q4_0 and len(tensor.shape) > 1:
            shape = quants.quant_shape_to_byte_shape(tensor.shape, Kind.Q4_0)
            writer.add_tensor_info(known, shape, numpy.dtype("u1"), int(numpy.prod(shape)), raw_dtype=Kind.Q4_0)
            continue
        dtype, kind, _ = DTYPES["F32" if len(tensor.shape) == 1 else tensor.dtype]
        nbytes = dtype.itemsize * int(numpy.prod(tensor.shape))
        writer.add_tensor_info(known, tensor.shape, dtype, nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        values = converted(name, tensor, config)
        if q4_0 and len(tensor.shape) > 1:
            values = quants.quantize((values.astype(numpy.uint32) << 16).view(numpy.float32), Kind.Q4_0)
        writer.write_tensor_data(numpy.ascontiguousarray(values))
    writer.close()


def quantise(source: Path, out: Path, file_type: str, threads: int) -> None:
    import llama_cpp  # what writes unquantised files, or Q4_0, does without

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_file_type(file_type)
    settings.nthread = threads
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings))
    if status:
        raise SystemExit(f"error: llama_model_quantize gave {status}")


def make(folder: Path, out: Path, file_type: str, threads: int) -> None:
    """The file appears under its name when it is whole; the unquantised one is deleted."""
    out.parent.mkdir(parents=True, exist_ok=True)
    plain = out.with_suffix(".16bit.partial")
    partial = out.with_suffix(".partial")
    write_gguf(folder, plain)
    if file_type in UNQUANTISED:
        plain.rename(out)
        return
    try:
        quantise(plain, partial, file_type, threads)
    finally:
        plain.unlink()
    partial.rename(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="checkpoint")
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="Q4_K_M", help="BF16 (the checkpoint's own), Q8_0, Q4_0, Q4_K_M, ...")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    make(args.folder, args.out, args.type, args.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
