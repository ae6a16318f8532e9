"""`quantization_config` of config.json, as other libraries write it: which method, which sizes, and what was left out.

Everything in it is a stranger's: sizes are checked before anything is divided by them, and patterns of names are used
only where they cannot cost more than a moment.
"""

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from griffin_offload.checkpoint.base import StoredTensor
from griffin_offload.checkpoint.config_files import MOST_CONFIG_BYTES, read_object, refuse_quantised
from griffin_offload.checkpoint.packed import (
    ExpertReader,
    Packing,
    Reader,
    read_awq,
    read_bitsandbytes,
    read_fp4,
    read_gptq,
    read_mxfp4_experts,
    read_packed,
    read_scaled,
)
from griffin_offload.errors import CheckpointError

_MODELOPT = "hf_quant_config.json"
_MOST_SIZE = 2**20
# Parts of patterns that can be tried in many ways at once.
_MOST_REPEATS, _MOST_PATTERN = 3, 200
_CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_COMPRESSED_FORMATS = (
    *("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized"),
    *("mxfp4-pack-quantized", "mixed-precision", "dense"),
)
_MODELOPT_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")


@dataclass(frozen=True)
class Method:
    """How the matrices of a checkpoint are packed."""

    words: str
    packing: Packing
    bits_per_weight: float
    """With its share of scales."""
    left_out: tuple[str, ...] = ()
    """Names and patterns of modules that are not packed."""
    quantises_activations: bool = False
    quantises_cache: bool = False
    transposed: Reader | None = None
    """Of GPTQ and AWQ, whose matrices are called qweight."""
    own: Reader | None = None
    """Of bitsandbytes, whose matrices keep their name."""
    experts: ExpertReader | None = None
    """Of MXFP4, which packs the experts of a layer together, and nothing else."""

    def reader_of(self, tensors: Mapping[str, StoredTensor]) -> Reader | None:
        """What reads the module with these tensors; None where it is not packed."""
        if "qweight" in tensors:
            return self.transposed
        if "weight_packed" in tensors:
            return read_packed if tensors["weight_packed"].dtype == torch.int32 else read_fp4
        weight = tensors.get("weight")
        if weight is None or weight.dtype not in (*_CODES, torch.uint8):
            return None
        return self.own or (read_fp4 if weight.dtype == torch.uint8 else read_scaled)

    def leaves_out(self, name: str) -> bool:
        """Whether the module of this name is not packed, as far as config.json says."""
        return any(_matches(pattern, name) for pattern in self.left_out)


def said_of(file: Path) -> dict[str, Any] | None:
    """What config.json `file` says of how its matrices are packed; None where it says nothing. CheckpointError for what
    is no description of that."""
    if not file.is_file():
        return None
    raw = read_object(file, MOST_CONFIG_BYTES)
    text = raw.get("text_config")
    places = [raw, text] if isinstance(text, dict) else [raw]
    for key in ("quantization_config", "compression_config"):
        said = next((place[key] for place in places if place.get(key) is not None), None)
        if said is not None and not isinstance(said, dict):
            raise CheckpointError(
                f"{file} was quantised or converted, its {key} is damaged: a {type(said).__name__}, not an object"
            )
        if said is not None:
            default = "compressed-tensors" if "config_groups" in said or key == "compression_config" else None
            return {"quant_method": default} | said if default else said
    return _of_modelopt(file.parent)


def _of_modelopt(directory: Path) -> dict[str, Any] | None:
    """What modelopt writes beside a config.json that says nothing of it."""
    if not (directory / _MODELOPT).is_file():
        return None
    said = read_object(directory / _MODELOPT, MOST_CONFIG_BYTES).get("quantization")
    if not isinstance(said, dict) or said.get("quant_algo") is None:
        return None
    return {"quant_method": "modelopt", **said}


def method_of(said: dict[str, object], where: Path) -> Method:
    """The method of a `quantization_config`. UnsupportedModel for one that cannot be read, CheckpointError for sizes
    that are none."""
    name = said.get("quant_method")
    if name is None and (said.get("load_in_4bit") or said.get("load_in_8bit")):
        name = "bitsandbytes"
    maker = _METHODS.get(str(name).lower())
    if maker is None:
        refuse_quantised(where, said)
    return maker(_Said(said, where))


class _Said:
    """The entries of a `quantization_config`, checked when they are asked for."""

    def __init__(self, entries: dict[str, object], where: Path) -> None:
        self.entries, self.where = entries, where

    def size(self, key: str, value: object, default: int | None = None) -> int:
        """A number above 0; CheckpointError otherwise."""
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MOST_SIZE:
            raise CheckpointError(
                f"{self.where} says in its quantization_config that {key} is {repr(value)[:40]}: it has to be a whole "
                f"number from 1 to {_MOST_SIZE}"
            )
        return value

    def pair(self, key: str, value: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes of blocks, outputs and inputs; none for None."""
        if value is None:
            return (), ()
        if not isinstance(value, list) or len(value) != 2:
            raise CheckpointError(
                f"{self.where} says in its quantization_config that {key} is {repr(value)[:40]}: two sizes are needed"
            )
        rows, columns = (self.size(key, size) for size in value)
        return (rows,), (columns,)

    def group(self, value: object) -> tuple[int, ...]:
        """A size of groups, of which -1 means one for all inputs."""
        return () if value in (None, -1) else (self.size("group_size", value),)

    def names(self, *keys: str) -> tuple[str, ...]:
        """Modules that are not packed."""
        found: list[str] = []
        for key in keys:
            value = self.entries.get(key) or []
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                raise CheckpointError(f"{self.where} says in its quantization_config that {key} is no list of names")
            found += value
        return tuple(found)

    def groups(self) -> Iterator[dict[str, Any]]:
        """The objects of `config_groups`."""
        found = self.entries.get("config_groups") or {}
        entries = list(found.values()) if isinstance(found, dict) else [None]
        for entry in entries:
            if not isinstance(entry, dict):
                raise CheckpointError(f"{self.where} has damaged config_groups in its quantization_config")
            yield entry

    def refuse(self, why: str) -> NoReturn:
        """UnsupportedModel."""
        refuse_quantised(self.where, self.entries, why)


def _fp8(said: _Said) -> Method:
    entries = said.entries
    rows, columns = said.pair("weight_block_size", entries.get("weight_block_size"))
    return Method(
        "FP8 in blocks" if rows else "FP8",
        Packing(row_blocks=rows, groups=columns),
        8 + (32 / (rows[0] * columns[0]) if rows else 0),
        said.names("modules_to_not_convert", "ignored_layers"),
        quantises_activations=entries.get("activation_scheme") is not None or "activation_scale_ub" in entries,
    )


def _compressed(said: _Said) -> Method:
    entries = said.entries
    sparsity = entries.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        said.refuse("its matrices are sparse")
    if entries.get("transform_config"):
        said.refuse("its activations are turned by matrices of their own (transform_config)")
    groups = list(said.groups())
    formats = [entries.get("format"), *(group.get("format") for group in groups)]
    if any(name is not None and name not in _COMPRESSED_FORMATS for name in formats):
        said.refuse("this format is not read")
    weights = [found for group in groups if isinstance(found := group.get("weights"), dict)]
    packing, bits = _of_groups(said, weights)
    return Method(
        f"compressed-tensors ({entries.get('format') or 'packed'})",
        packing,
        bits,
        said.names("ignore"),
        quantises_activations=any(group.get("input_activations") for group in groups),
        quantises_cache=bool(entries.get("kv_cache_scheme")),
    )


def _of_groups(said: _Said, weights: list[dict[str, object]]) -> tuple[Packing, float]:
    """The sizes that groups of modules have, and the most bits of a weight."""
    row_blocks: set[int] = set()
    inputs: set[int] = set()
    bits = 0.0
    for one in weights:
        rows, columns = said.pair("block_structure", one.get("block_structure"))
        group = said.group(one.get("group_size"))
        row_blocks.update(rows)
        inputs.update((*columns, *group))
        bits = max(bits, said.size("num_bits", one.get("num_bits"), 8) + (16 / group[0] if group else 0))
    return Packing(row_blocks=tuple(row_blocks), groups=tuple(inputs)), bits or 8


def _modelopt(said: _Said) -> Method:
    entries = said.entries
    algorithm = str(entries.get("quant_algo"))
    if algorithm not in _MODELOPT_ALGORITHMS:
        said.refuse("this format is not read")
    weights = [found for group in said.groups() if isinstance(found := group.get("weights"), dict)]
    packing, _ = _of_groups(said, weights)
    blocks = (128,) if algorithm == "FP8_PB_WO" else ()
    return Method(
        f"{algorithm} of modelopt",
        Packing(row_blocks=packing.row_blocks + blocks, groups=packing.groups + blocks),
        4.5 if "NVFP4" in algorithm else 8,
        said.names("ignore", "exclude_modules"),
        quantises_activations="W4A16" not in algorithm and algorithm != "FP8_PB_WO",
        quantises_cache=bool(entries.get("kv_cache_quant_algo") or entries.get("kv_cache_scheme")),
    )


def _gptq(said: _Said) -> Method:
    entries = said.entries
    bits: Any = entries.get("bits")
    layout = str(entries.get("checkpoint_format") or entries.get("format") or "gptq")
    if bits not in (2, 4, 8) or isinstance(bits, bool):
        said.refuse("2, 4 and 8 bits are read")
    if layout not in ("gptq", "gptq_v2") or entries.get("is_marlin_format"):
        said.refuse("it is laid out for one kernel")
    dynamic = entries.get("dynamic") or {}
    if not isinstance(dynamic, dict) or any(not str(name).startswith("-:") for name in dynamic):
        said.refuse("its modules have different bits (dynamic)")
    group = said.group(entries.get("group_size", 128))
    packing = Packing(bits=int(bits), groups=group, adds_one=layout == "gptq")
    left_out = (*said.names("modules_to_not_convert"), *(f"re:{name[2:]}" for name in dynamic))
    return Method(
        f"GPTQ ({bits} bit)", packing, bits + (16 + bits) / (group or (4096,))[0], left_out, transposed=read_gptq
    )


def _awq(said: _Said) -> Method:
    entries = said.entries
    bits, version = entries.get("bits", entries.get("w_bit", 4)), str(entries.get("version", "gemm")).lower()
    if bits != 4 or isinstance(bits, bool):
        said.refuse("4 bits are read")
    if version != "gemm":
        said.refuse("the layout gemm is read")
    group = said.group(entries.get("group_size", entries.get("q_group_size", 128)))
    left_out = said.names("modules_to_not_convert")
    per_weight = 4 + 20 / (group or (4096,))[0]
    return Method("AWQ (4 bit)", Packing(bits=4, groups=group), per_weight, left_out, transposed=read_awq)


def _bitsandbytes(said: _Said) -> Method:
    entries = said.entries
    four = bool(entries.get("load_in_4bit") or entries.get("_load_in_4bit"))
    kind = str(entries.get("bnb_4bit_quant_type", "fp4")) if four else "int8"
    left_out = said.names("llm_int8_skip_modules")
    return Method(f"{kind} of bitsandbytes", Packing(), 4.5 if four else 8, left_out, own=read_bitsandbytes)


def _mxfp4(said: _Said) -> Method:
    left_out = said.names("modules_to_not_convert")
    return Method("MXFP4", Packing(), 4.25, left_out, experts=read_mxfp4_experts)


_METHODS = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
}


# Names of modules that are not packed.


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return _matches_expression(pattern[3:], name)
    if "*" in pattern:
        return fnmatch.fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def _matches_expression(pattern: str, name: str) -> bool:
    """A regular expression; one that could take long to try is taken as matching nothing: a plan is then that of more
    packed matrices, and nothing else is made of it."""
    repeats = len(re.findall(r"[*+{]", pattern))
    if len(pattern) > _MOST_PATTERN or repeats > _MOST_REPEATS or re.search(r"\)[*+{?]", pattern):
        return False
    try:
        return re.match(pattern, name) is not None
    except (re.error, OverflowError):
        return False
