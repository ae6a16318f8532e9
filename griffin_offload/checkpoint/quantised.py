"""Checkpoints that other libraries quantised: read as they lie, their matrices decoded wherever they are needed.

Which method it is stands in config.json; which matrices are packed is seen in the files, so lists of modules that were
left out need no reading. Only weights are taken: activations and the KV cache stay in the checkpoint's floats.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from griffin_offload.blocks.experts import is_experts
from griffin_offload.blocks.layouts import build_on_meta, find_feed_forwards
from griffin_offload.checkpoint.base import Checkpoint, StoredTensor
from griffin_offload.checkpoint.config_files import refuse_plain
from griffin_offload.checkpoint.converted import METHOD
from griffin_offload.checkpoint.decoding import Grid, Numbers, Scaled, Spread
from griffin_offload.checkpoint.direct_io import Extent
from griffin_offload.checkpoint.mapped import FileMaps
from griffin_offload.checkpoint.packed import Module, by_row
from griffin_offload.checkpoint.quantisation_config import Method, method_of, said_of
from griffin_offload.checkpoint.renaming import ONE_BY_ONE
from griffin_offload.checkpoint.safetensors import (
    FLOAT_TYPES,
    SafetensorsCheckpoint,
    check_files,
    directory_config,
    stored_tensors,
    untie_other_head,
)
from griffin_offload.errors import CheckpointError
from griffin_offload.formats.translated import EachExpert

# Of a module that is not packed, and of attention: scales of activations and of the KV cache, and what is left of
# weights that were only rounded.
_ASIDE = {
    *("input_scale", "input_zero_point", "input_global_scale", "activation_scale", "output_scale"),
    *("k_scale", "v_scale", "q_scale", "prob_output_scale", "k_zero_point", "v_zero_point", "output_zero_point"),
    *("weight_scale", "weight_scale_inv", "weight_zero_point", "weight_global_scale", "weight_g_idx", "weight_shape"),
}
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
_OF_CACHE = {"k_scale", "v_scale", "output_scale"}
_INSIDE = ".weight."
_SCALE, _EXPERTS_AXES = "_scale", 3
_FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class QuantisedCheckpoint(SafetensorsCheckpoint):
    """A directory in Hugging Face layout whose matrices are packed."""

    expert_rows: bool = False
    method: str = ""
    """In words."""
    listed: Mapping[str, StoredTensor] = field(default_factory=dict, compare=False)

    def tensors(self) -> Mapping[str, StoredTensor]:
        return self.listed

    def config_json(self) -> dict[str, Any]:
        found = super().config_json()
        found.pop("compression_config", None)
        if isinstance(found.get("text_config"), dict):
            found["text_config"].pop("quantization_config", None)
        return found


def open_quantised(path: Path) -> Checkpoint | None:
    """The checkpoint in the directory `path`; None where nothing says that it is quantised. Errors: CheckpointError,
    UnsupportedModel."""
    said = said_of(path / "config.json")
    if said is None or said.get("method") == METHOD:
        return None
    config = directory_config(path)
    method = method_of(said, path)
    _forget(config)
    checked = check_files(path, config, None)
    stored = {name: tensor for file in checked.files for name, tensor in stored_tensors(file).items()}
    dtype = _dtype(config, checked.most_bytes(FLOAT_TYPES), path)
    modules = _modules(stored)
    listed = dict(_listed(modules, method, dtype))
    if not any(tensor.decode for tensor in listed.values()) and not any(map(_ASIDE.intersection, modules.values())):
        refuse_plain(path, said, len(stored), dtype)
    _warn(path, method, dtype, modules)
    untied = _unties(config, listed) or untie_other_head(config, dtype, checked.headers)
    weight_bytes = sum(tensor.stored_bytes for tensor in listed.values())
    return QuantisedCheckpoint(
        path,
        config,
        dtype,
        checked.files,
        weight_bytes,
        checked.states,
        untied,
        method=method.words,
        listed=listed,
        expert_rows=method.experts is not None or _turned_one_by_one(config, listed),
    )


def read_quantised_config(file: Path, config: PretrainedConfig, dtype: torch.dtype) -> Checkpoint | None:
    """The same of a config.json alone, as `config`: what packed matrices would take; None where it is not quantised."""
    said = said_of(file)
    if said is None or said.get("method") == METHOD:
        return None
    method = method_of(said, file)
    _forget(config)
    listed = dict(_expected(config, method, dtype))
    return QuantisedCheckpoint(file.parent, config, dtype, (), 0, method=method.words, listed=listed)


def _forget(config: PretrainedConfig) -> None:
    """Take the method out of `config`: transformers would make modules of its own for it."""
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            if hasattr(part, key):
                delattr(part, key)


def _dtype(config: PretrainedConfig, most: str, path: Path) -> torch.dtype:
    """Of the model: as its makers say, as scales may outweigh all other floats."""
    said = config.get_text_config().dtype or config.dtype
    if isinstance(said, torch.dtype) and said in FLOAT_TYPES.values():
        return said
    if most not in FLOAT_TYPES:
        raise CheckpointError(f"{path} holds no floats beside packed weights, and its config.json names no dtype")
    return FLOAT_TYPES[most]


# What the files hold.


def _modules(stored: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """By module, then by what follows its name."""
    found: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        module, inside, rest = name.rpartition(_INSIDE)
        if not inside:
            module, _, rest = name.rpartition(".")
        suffix = inside[1:] + rest
        found.setdefault(module, {})[suffix] = tensor
    return found


def _listed(
    modules: Mapping[str, Mapping[str, StoredTensor]], method: Method, dtype: torch.dtype
) -> Iterator[tuple[str, StoredTensor]]:
    maps = FileMaps()
    for name, tensors in modules.items():
        reader = method.reader_of(tensors)
        if reader is not None:
            yield f"{name}.weight", reader(Module(name, tensors, maps), method.packing, dtype)
            tensors = {key: tensor for key, tensor in tensors.items() if key == "bias"}
        fused = dict(_scaled_experts(Module(name, tensors, maps), dtype))
        yield from ((f"{name}.{suffix}", tensor) for suffix, tensor in fused.items())
        tensors = {key: tensor for key, tensor in tensors.items() if key.removesuffix(_SCALE) not in fused}
        if method.experts is not None:
            made = dict(method.experts(Module(name, tensors, maps), method.packing, dtype))
            yield from ((f"{name}.{suffix}", tensor) for suffix, tensor in made.items())
            tensors = {key: tensor for key, tensor in tensors.items() if not _packs(key, made)}
        for suffix, tensor in tensors.items():
            if suffix not in _ASIDE:
                yield (f"{name}.{suffix}" if name else suffix), tensor


def _scaled_experts(module: Module, dtype: torch.dtype) -> Iterator[tuple[str, StoredTensor]]:
    """Llama 4's experts in FP8, by what follows the module's name: of each matrix codes [E, I, O], as the model has
    them, and a scale for each output of each expert, [E, 1, O] or [E, O, 1]."""
    for name, codes in module.tensors.items():
        if (
            codes.dtype not in _FP8_TYPES
            or len(codes.shape) != _EXPERTS_AXES
            or f"{name}{_SCALE}" not in module.tensors
        ):
            continue
        experts, inputs, outputs = module.need(name, _FP8_TYPES, None, None, None).shape
        turned = module.tensors[f"{name}{_SCALE}"].shape[-1] == 1
        wanted = (experts, outputs, 1) if turned else (experts, 1, outputs)
        scales = module.need(f"{name}{_SCALE}", tuple(FLOAT_TYPES.values()), *wanted)
        spread = Spread(Grid(1, scales.dtype, outputs, inputs), 1, outputs)
        parts = tuple(part for pair in zip(by_row(codes), by_row(scales), strict=True) for part in pair)
        decode = EachExpert(Scaled(Numbers(0, codes.dtype, outputs), spread), 2)
        yield name, StoredTensor(codes.shape, dtype, parts, decode=decode, of_experts=True)


def _packs(suffix: str, made: Mapping[str, StoredTensor]) -> bool:
    """Whether one of `made` is made of the tensor."""
    return suffix.rpartition("_")[0] in made and suffix.endswith(("_blocks", "_scales"))


def _unties(config: PretrainedConfig, listed: Mapping[str, StoredTensor]) -> bool:
    """Whether a packed head is there that `config` would tie to the embeddings; `config` says so then."""
    text = config.get_text_config()
    head = next((tensor for name, tensor in listed.items() if name.endswith("lm_head.weight")), None)
    if head is None or head.decode is None or not (text.tie_word_embeddings or config.tie_word_embeddings):
        return False
    text.tie_word_embeddings = config.tie_word_embeddings = False
    return True


def _turned_one_by_one(config: PretrainedConfig, names: Iterable[str]) -> bool:
    """Whether experts lie one by one, in rows of outputs, that the model has turned around and together."""
    return config.get_text_config().model_type in ONE_BY_ONE and any(_ONE_EXPERT.search(name) for name in names)


def _warn(path: Path, method: Method, dtype: torch.dtype, modules: Mapping[str, Mapping[str, StoredTensor]]) -> None:
    suffixes = {suffix for tensors in modules.values() for suffix in tensors}
    cache = method.quantises_cache or bool(suffixes & _OF_CACHE)
    left = ["activations"] * method.quantises_activations + ["the KV cache"] * cache
    if left:
        kept = str(dtype).removeprefix("torch.")
        words = f"{path.name} is read as {method.words}, weights only: {' and '.join(left)}"
        warnings.warn(f"{words}, quantised by its makers' plan, stay in {kept}", stacklevel=4)


# What a config alone says.


def _expected(config: PretrainedConfig, method: Method, dtype: torch.dtype) -> Iterator[tuple[str, StoredTensor]]:
    model = build_on_meta(config, dtype)
    decoder, _ = find_feed_forwards(model, config.get_text_config().num_hidden_layers)
    packed = {
        id(parameter)
        for name, module in model.named_modules()
        if _is_packed(module, decoder, method) and not method.leaves_out(name)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() > 1
    }
    for name, parameter in model.named_parameters():
        decoded = id(parameter) in packed
        nbytes = int(parameter.numel() * method.bits_per_weight / 8) if decoded else parameter.nbytes
        decode = _nothing_to_decode if decoded else None
        yield name, StoredTensor(tuple(parameter.shape), dtype, (Extent("", 0, nbytes),), decode=decode)


def _is_packed(module: nn.Module, decoder: nn.ModuleList, method: Method) -> bool:
    inside = any(module is one for layer in decoder for one in layer.modules())
    # Experts are one module here; in files each of their matrices is packed by itself, but for what packs them alone.
    return inside and (is_experts(module) or (method.experts is None and isinstance(module, nn.Linear)))


def _nothing_to_decode(parts: object, first: int, end: int, into: Tensor) -> None:
    raise AssertionError("of a config.json alone no weight is read")
