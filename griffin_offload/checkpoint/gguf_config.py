"""What transformers calls what the header of a GGUF file says: what all architectures have.

transformers has a mapping, too, and leaves out much that changes the logits: factors and scaling of rotary positions,
head sizes, the part of a head that turns, soft caps. All of these are taken over here, or the file is refused.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from griffin_offload.checkpoint.gguf_blocks import numbers_of
from griffin_offload.checkpoint.gguf_file import GgufTensor
from griffin_offload.errors import CheckpointError, UnsupportedModel

_MISSING: Any = object()
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_MOST_FACTORS = 4096
_PLAIN_NORM = "ssm_norm.weight"


@dataclass(frozen=True)
class Described:
    """A model as its files describe it."""

    where: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        found = self.metadata.get("general.architecture")
        if not isinstance(found, str) or not found.isprintable():
            raise CheckpointError(f"{self.where} does not name its architecture (general.architecture)")
        return found

    def get(self, key: str, kinds: type | tuple[type, ...], default: object = _MISSING) -> Any:
        """The value of `key` behind the architecture's name. CheckpointError where it is of another kind, or absent
        without a default."""
        name = f"{self.architecture}.{key}"
        found = self.metadata.get(name, default)
        if found is _MISSING:
            raise CheckpointError(f"{self.where} does not say {name}: download or convert it again")
        if found is default:
            return default
        if isinstance(found, np.ndarray):
            found = self._of_all_layers(name, found)
        wrong = not isinstance(found, kinds) or (isinstance(found, bool) and kinds is int)
        if wrong or (isinstance(found, float) and not math.isfinite(found)):
            raise CheckpointError(f"{self.where} says {name} is {str(found)[:60]!r}")
        return found

    def _of_all_layers(self, name: str, values: Any) -> Any:
        distinct = np.unique(values)
        if len(distinct) != 1:
            raise UnsupportedModel(
                f"{self.where}: {name} differs between layers ({', '.join(map(str, distinct[:4]))}), which models of "
                f"{self.architecture} are not loaded with"
            )
        return distinct[0].item()

    def each(self, key: str, layers: int, default: object = _MISSING) -> list[Any]:
        """A number or truth value for each of `layers`, where files have one for all or an array. CheckpointError for
        an array of another length."""
        found = self.metadata.get(f"{self.architecture}.{key}")
        if not isinstance(found, np.ndarray):
            return [self.get(key, (int, bool), default)] * layers
        if len(found) != layers:
            raise CheckpointError(f"{self.where} has {len(found)} values of {key} for {layers} layers")
        values: list[Any] = found.tolist()
        return values

    def integer(self, key: str, default: object = _MISSING) -> Any:
        return self.get(key, int, default)

    def number(self, key: str, default: object = _MISSING) -> Any:
        return self.get(key, (int, float), default)

    def positive(self, key: str, default: object = _MISSING) -> Any:
        """A number that nothing can be computed with unless it is above 0."""
        found = self.number(key, default)
        if found is not None and found <= 0:
            raise CheckpointError(f"{self.where} says {self.architecture}.{key} is {found}: it has to be above 0")
        return found

    @property
    def drafting_layers(self) -> int:
        """Layers behind the model's that predict further tokens: llama.cpp's drafts, of which transformers has none."""
        return int(self.integer("nextn_predict_layers", 0))

    def has(self, name: str) -> bool:
        return name in self.tensors

    def factors(self, name: str, most: float = 1e6) -> list[float] | None:
        """The numbers of a small tensor of rotary factors, all below `most`; None where there is none."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        if len(tensor.shape) != 1 or tensor.shape[0] > _MOST_FACTORS or tensor.type.numbers != 1:
            raise CheckpointError(f"{self.where}: {name} is {tensor.type.name} {list(tensor.shape)}")
        with open(tensor.extent.path, "rb") as file:
            file.seek(tensor.extent.offset)
            content = bytearray(file.read(tensor.extent.nbytes))
        found: list[float] = numbers_of(torch.frombuffer(content, dtype=torch.uint8)[None], tensor.type)[0].tolist()
        if not all(0 < factor < most for factor in found):
            raise CheckpointError(f"{self.where}: {name} holds factors that are not above 0")
        return found


@dataclass(frozen=True)
class RowOrder:
    """Of a matrix whose rows, or columns, llama.cpp keeps in another order, by the config."""

    count: Callable[[Mapping[str, Any]], int]
    """Rows that it has to have."""
    index: Callable[[Mapping[str, Any]], Tensor]
    """Which row of the file is each of the model's, int64."""

    def of(self, config: Mapping[str, Any], tensor: GgufTensor, where: Path, *, axis: int = 0) -> Tensor:
        """That of `tensor`. CheckpointError where it has other rows: a config may lie, and ask for any number."""
        wanted, there, what = self.count(config), tensor.shape[axis], ("columns" if axis else "rows")
        if wanted != there:
            raise CheckpointError(f"{where}: {tensor.name} has {there} {what}, by its heads it should have {wanted}")
        return self.index(config)


@dataclass(frozen=True)
class Architecture:
    """How a file of an architecture becomes a model of transformers."""

    model_type: str
    names: str
    """The architecture's name in the package's tables of tensors."""
    extend: Callable[[Described, dict[str, Any]], None] = lambda described, config: None
    """Adds what is its own to a config."""
    norm_eps: str = "rms_norm_eps"
    rows: Mapping[str, RowOrder] = field(default_factory=dict)
    """By the tensor's name behind the layer's number and without .weight or .bias."""
    columns: Mapping[str, RowOrder] = field(default_factory=dict)
    """The same of columns."""
    norms_minus_one: bool = False
    """Its norms are stored with 1 added."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """What the package's tables call names of transformers', by their ends."""
    logs: tuple[str, ...] = ()
    """Tensors of which files have what the model computes of them: -exp(x)."""
    transposed: tuple[str, ...] = ()
    """Ends of names in transformers, of matrices that lie there [inputs, outputs]."""
    rotary: bool = True
    turns_parts: bool = False
    """transformers' class can leave numbers behind the first of a head as they are."""
    layers_differ: bool = False
    """In heads of keys and values, and in neurons, which files have an array of: `extend` says what each has."""
    written: bool = True
    """Whether exports write such files."""

    def adds(self, name: str) -> float:
        """What all numbers of the tensor `name` of a file have more than the model's."""
        return float(self.norms_minus_one and name.endswith("norm.weight") and not name.endswith(_PLAIN_NORM))


def common_config(described: Described, architecture: Architecture) -> dict[str, Any]:
    """What every architecture has, in the words that most configs of transformers understand. CheckpointError for a
    header that lacks something."""
    embeddings = described.tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise CheckpointError(f"{described.where} has no matrix token_embd.weight: download it again")
    hidden, heads = described.integer("embedding_length"), described.integer("attention.head_count")
    if heads < 1 or hidden < 1:
        raise CheckpointError(f"{described.where} says that it has {heads} heads of a hidden size of {hidden}")
    eps = described.positive("attention.layer_norm_rms_epsilon", None)
    config = {
        "model_type": architecture.model_type,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture.model_type]],
        "vocab_size": embeddings.shape[0],
        "hidden_size": hidden,
        "intermediate_size": _neurons(described, architecture),
        "num_hidden_layers": described.integer("block_count") - described.drafting_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(described, architecture, heads),
        "head_dim": described.integer("attention.key_length", hidden // heads),
        "max_position_embeddings": described.integer("context_length"),
        architecture.norm_eps: described.positive("attention.layer_norm_epsilon", 1e-5) if eps is None else eps,
        "tie_word_embeddings": not described.has("output.weight"),
    }
    config |= {f"{name}_token_id": _token(described, key) for name, key in _TOKENS.items()}
    return config | ({"rope_parameters": _rope(described, architecture, config)} if architecture.rotary else {})


def _neurons(described: Described, architecture: Architecture) -> Any:
    if (most := _most(described, architecture, "feed_forward_length")) is not None:
        return most
    of_experts = described.integer("expert_feed_forward_length", None)
    return described.integer("feed_forward_length", *([] if of_experts is None else [of_experts]))


def _kv_heads(described: Described, architecture: Architecture, heads: int) -> int:
    most = _most(described, architecture, "attention.head_count_kv")
    return int(described.integer("attention.head_count_kv", heads)) if most is None else most


def _most(described: Described, architecture: Architecture, key: str) -> int | None:
    """Of any layer, where layers differ in it."""
    found = described.metadata.get(f"{described.architecture}.{key}")
    return int(found.max()) if architecture.layers_differ and are_integers(found) and found.size else None


def are_integers(values: object) -> TypeGuard[Any]:
    """Whether they are an array of whole numbers: one of others may hold what is no number."""
    return isinstance(values, np.ndarray) and values.dtype.kind in "iu"


_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _token(described: Described, name: str) -> int | None:
    found = described.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return found if isinstance(found, int) and found < 2**31 else None


def _rope(described: Described, architecture: Architecture, config: dict[str, Any]) -> dict[str, Any]:
    """transformers' rope_parameters: base, scaling, and factors of single frequencies."""
    base, size = described.positive("rope.freq_base", 10_000.0), config["head_dim"]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(base)}
    turned = described.integer("rope.dimension_count", size)
    if turned < size:
        key = f"{described.architecture}.rope.dimension_count"
        said = f"{described.where} turns {turned} of the {size} numbers of a head ({key})"
        if turned < 1 or turned % 2:
            raise CheckpointError(f"{said}: they are turned in pairs, download or convert it again")
        if not architecture.turns_parts:
            raise UnsupportedModel(f"{said}, transformers' {architecture.model_type} turns all of them")
        rope["partial_rotary_factor"] = turned / size
    return rope | _scaling(described, config)


def _scaling(described: Described, config: dict[str, Any]) -> dict[str, Any]:
    kind = described.get("rope.scaling.type", str, "none")
    factor = described.positive("rope.scaling.factor", described.positive("rope.scale_linear", 1.0))
    trained = described.integer("rope.scaling.original_context_length", None)
    attention = described.number("rope.scaling.attn_factor", None)
    single, long, short = (described.factors(name) for name in ROPE_TENSORS)
    found: dict[str, Any] = {} if attention is None else {"attention_factor": attention}
    if trained is not None:
        found["original_max_position_embeddings"] = trained
    if long is not None and short is not None:
        return found | {"rope_type": "longrope", "long_factor": long, "short_factor": short}
    if single is not None:  # Llama 3.1 and its like; no other kind of transformers' takes factors as they are
        if kind not in ("none", "linear") or factor != 1:
            raise UnsupportedModel(f"{described.where} scales rotary positions by {kind} and by single factors")
        most = config["max_position_embeddings"]
        alike = {"long_factor": single, "short_factor": single, "original_max_position_embeddings": most}
        return alike | {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0}
    if kind == "yarn":
        return found | {"rope_type": "yarn", "factor": factor}
    if kind in ("none", "linear"):
        return {"rope_type": "linear", "factor": factor} if factor != 1 and kind != "none" else {}
    raise UnsupportedModel(f"{described.where} scales rotary positions by {kind!r}, which is not read")


# Rows of matrices that llama.cpp keeps in another order.


def pairs_apart(heads: str) -> RowOrder:
    """Of q and k: llama.cpp turns neighbours, transformers the halves of a head."""

    def count(config: Mapping[str, Any]) -> int:
        return int(config[heads] * 2 * (config["head_dim"] // 2))

    def index(config: Mapping[str, Any]) -> Tensor:
        rows = torch.arange(count(config), dtype=torch.int64, device="cpu")
        return rows.view(-1, config["head_dim"] // 2, 2).transpose(1, 2).reshape(-1)

    return RowOrder(count, index)


def _rows_of_qkv(config: Mapping[str, Any]) -> int:
    heads, groups = config["num_attention_heads"], config["num_kv_heads"]
    return int((heads + 2 * groups) * (config["hidden_size"] // heads))


def _grouped_qkv(config: Mapping[str, Any]) -> Tensor:
    """Queries, keys and values, each of all heads, back to heads in groups with the keys and values they share."""
    heads, groups = config["num_attention_heads"], config["num_kv_heads"]
    size = config["hidden_size"] // heads
    q = torch.arange(heads * size, dtype=torch.int64, device="cpu")
    kv = torch.arange(groups * size, dtype=torch.int64, device="cpu").view(groups, -1)
    keys, values = kv + heads * size, kv + (heads + groups) * size
    return torch.cat([q.view(groups, -1), keys, values], dim=1).reshape(-1)


def heads_of_values(size: str | None, *, behind_keys: bool = False) -> RowOrder:
    """Of linear attention: heads of values that share a head of keys lie beside each other in transformers, in files
    the first ones of all heads of keys come first. Each has `size` rows, by the config, and may lie behind the
    queries and keys."""

    def before(config: Mapping[str, Any]) -> int:
        return int(2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]) if behind_keys else 0

    def count(config: Mapping[str, Any]) -> int:
        keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
        return before(config) + int(values // keys * keys * (config[size] if size else 1))

    def index(config: Mapping[str, Any]) -> Tensor:
        first, keys = before(config), config["linear_num_key_heads"]
        rows = torch.arange(count(config), dtype=torch.int64, device="cpu")
        values = rows[first:].view(-1, keys, config[size] if size else 1).transpose(0, 1)
        return torch.cat([rows[:first], values.reshape(-1)])

    return RowOrder(count, index)


QKV_ROWS = RowOrder(_rows_of_qkv, _grouped_qkv)
"""Of queries, keys and values in one matrix."""
