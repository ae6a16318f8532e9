"""What every layer keeps of the tokens that have passed: KV entries, a state of fixed size, or both.

It is measured, not read off the config, whose words differ from one architecture to the next (heads by layer, keys of
another size than values, entries shared between layers, convolutions, recurrences): two tokens pass the model on the
meta device, into transformers' own cache. Where rotary angles depend on how long a sequence is, entries hold so far:
`RopeBorder` says where they change.
"""

import contextlib
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from griffin_offload.errors import CheckpointError, UnsupportedModel, one_line
from griffin_offload.transformers_api import (
    CACHE,
    CACHE_NAMES,
    WITHOUT_ATTENTION,
    DummyLayer,
    StockModel,
    at_fixed_angles,
    stock_cache,
)

_TOKENS = 2
# The last is a layer without entries of its own: it reads another one's, or attends to nothing.
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
_WITH_STATES = (
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
STATE_KINDS = ("conv", "recurrent")
"""What a layer keeps beside KV entries: the last inputs of convolutions, and recurrences."""
_DIFFERENT = ("deepseek_v4",)
"""Types that can be loaded, and whose tokens the sweep of all architectures found to differ."""


# Bytes alive at once per number that a layer's projections make of a token, outside of its FF. torch's scans work in
# float32, chunk by chunk, all chunks at once: 28 with the gated delta rule, 24 to 46 with Mamba 2, counted in sizes as
# published (tensors alive on the meta device). Mamba 1's makes a few matrices of a state's size for every token.
_RECURRENCE_BYTES, _CONVOLUTION_BYTES = 48, 16
_BY_CHANNEL, _STATE_BYTES = 3, 16


class StateTensor(NamedTuple):
    """Of one sequence; `name` is the kind and a number, as in "conv.0"."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class LayerState:
    """Of one layer and one sequence."""

    kv_width: int
    """Numbers per token in keys and values together; 0 where none are kept."""
    kv_heads: int
    key_width: int = 0
    """Of these numbers, those of keys."""
    states: tuple[StateTensor, ...] = ()
    """Of convolutions and recurrences, however many tokens have passed."""
    writer: str | None = None
    """The part of the layer that writes these and nothing else: it can run again over fewer tokens, or in parts."""

    @property
    def state_bytes(self) -> int:
        return sum(state.nbytes for state in self.states)

    def mixing_bytes(self, numbers: int) -> int:
        """Activations per token while a recurrence or a convolution passes over a prompt, where a layer's projections
        outside of its FF make so many numbers of a token."""
        recurrent = [state.shape for state in self.states if state.name.startswith(STATE_KINDS[1])]
        by_channel = sum(math.prod(shape) for shape in recurrent if len(shape) == _BY_CHANNEL)
        own = _RECURRENCE_BYTES if recurrent else _CONVOLUTION_BYTES if self.state_bytes else 0
        return numbers * own + by_channel * _STATE_BYTES


def cache_layers(config: PretrainedConfig) -> list[Any]:
    """The layers of transformers' own KV cache; CheckpointError where it cannot make them of the config."""
    try:
        layers: list[Any] = stock_cache(config).layers
    except Exception as error:  # what a config says of its layers is not checked before
        raise CheckpointError(f"the config does not describe layers with a KV cache: {one_line(error)}") from error
    return layers


def windows_of(config: PretrainedConfig) -> list[int | None]:
    """Per layer the tokens it sees, or None for all, as transformers' own KV cache reads them off the config."""
    found = [getattr(layer, "sliding_window", None) for layer in cache_layers(config)]
    for window in found:
        if window is not None and not (isinstance(window, int) and window > 0):
            raise CheckpointError(f"the config says a layer sees {window!r} tokens: it has to be 1 or more")
    return found


def looks_at_length(config: PretrainedConfig) -> str | None:
    """Where a token's attention depends on how many are cached, and not only on what it is given of them: in which way
    (Llama 4)."""
    text = config.get_text_config()
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        return "attention in chunks begins anew at positions counted on the host"
    if getattr(text, "attn_temperature_tuning", False):
        return "attention has a temperature by positions counted on the host"
    return None


def lasting_kinds(config: PretrainedConfig) -> str:
    """The kinds of layers, in the config's words, that keep something else than the keys and values of plain attention
    and states of convolutions and recurrences; empty where there are none."""
    return _kinds_but(config, (*_PLAIN, *_WITH_STATES))


def state_kinds(config: PretrainedConfig) -> str:
    """The kinds of layers, in the config's words, that keep more than the keys and values of plain attention."""
    return _kinds_but(config, _PLAIN)


def _kinds_but(config: PretrainedConfig, known: tuple[Any, ...]) -> str:
    layers, names = cache_layers(config), getattr(config.get_text_config(), "layer_types", None)
    names = names if names and len(names) == len(layers) else [_kind(layer) for layer in layers]
    other = [name for layer, name in zip(layers, names, strict=True) if type(layer) not in known]
    return ", ".join(dict.fromkeys(str(name) for name in other))


def shares_entries(config: PretrainedConfig) -> bool:
    """Whether some layers keep no entries of their own, and read another layer's."""
    names = getattr(config.get_text_config(), "layer_types", None) or ()
    apart = {index for index, name in enumerate(names) if name in WITHOUT_ATTENTION}
    return any(isinstance(layer, DummyLayer) for index, layer in enumerate(cache_layers(config)) if index not in apart)


def all_keep_entries(config: PretrainedConfig) -> bool:
    """Whether every layer keeps something, whatever it is."""
    return not any(isinstance(layer, DummyLayer) for layer in cache_layers(config))


def _kind(layer: Any) -> str:
    return "linear_attention" if isinstance(layer, LinearAttentionCacheLayerMixin) else type(layer).__name__


_MOST_MEASURED = 256
_measured: dict[Any, tuple[LayerState, ...]] = {}
"""By all that it depends on. A pass on the meta device is a fifth of what loading a small model takes."""


def kept_states(model: StockModel, decoder: nn.ModuleList) -> list[LayerState]:
    """What each layer of `decoder`, those of `model` on the meta device, keeps. UnsupportedModel where that is not in
    the KV cache that it is given, or cannot be known before weights are read."""
    config = model.config
    said = repr(config.to_dict() | {"_name_or_path": ""})  # wherever the checkpoint is
    key = (type(model), model.dtype, tuple(map(type, decoder)), said)
    if key in _measured:
        return list(_measured[key])
    cache = stock_cache(config)
    if len(cache.layers) != len(decoder):
        raise UnsupportedModel(f"{_name(model)} has {len(decoder)} decoder layers and caches {len(cache.layers)}")
    first = _first_of_kind(decoder, cache.layers)
    writers: dict[int, set[str]] = {}
    try:
        _pass_tokens(model, decoder, first, cache, writers)
    except UnsupportedModel:
        raise
    except Exception as error:  # not every architecture can be traced
        if all(type(layer) in _PLAIN for layer in cache.layers):
            return _from_config(config, len(decoder))
        raise UnsupportedModel(
            f"{_name(model)}: what its layers ({state_kinds(config)}) keep cannot be known before weights are read: "
            f"{one_line(error)}"
        ) from error
    found = tuple(_state_of(cache.layers[index], model, writers.get(index, set())) for index in first)
    if len(_measured) == _MOST_MEASURED:
        _measured.clear()
    _measured[key] = found
    return list(found)


def _name(model: StockModel) -> str:
    return type(model).__name__


def takes_cache(part: nn.Module) -> bool:
    """Whether a part of a layer is given the KV cache, which no feed-forward has a use for."""
    return not set(CACHE_NAMES).isdisjoint(inspect.signature(type(part).forward).parameters)


def check_decodable(model: StockModel) -> None:
    """UnsupportedModel for a model that is given no KV cache, or whose answers were found to be others here."""
    if model.config.model_type in _DIFFERENT:
        raise UnsupportedModel(f"{_name(model)} does not answer here as in transformers, which is not mended yet")
    parameters = inspect.signature(model.forward).parameters
    if CACHE in parameters:
        return
    own = next((name for name in ("cache_params", "state", "mems") if name in parameters), None)
    what = "has no KV cache" if own is None else f"keeps its past in {own}, not in a KV cache"
    raise UnsupportedModel(f"{_name(model)} {what}: decoding here goes on from the KV cache of a prompt streamed once")


def _first_of_kind(decoder: nn.ModuleList, cached: Sequence[Any]) -> list[int]:
    """For every layer, the first one like it: a layer of each kind is passed."""
    seen: dict[Any, int] = {}
    found = []
    for index, (layer, kept) in enumerate(zip(decoder, cached, strict=True)):
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
        key = (type(layer), type(kept), getattr(kept, "sliding_window", None), shapes)
        found.append(seen.setdefault(key, index))
    return found


@torch.no_grad()
def _pass_tokens(
    model: StockModel, decoder: nn.ModuleList, first: list[int], cache: Any, writers: dict[int, set[str]]
) -> None:
    """A forward, for what it leaves in `cache`, in which layers like an earlier one do nothing. `writers` are told, of
    each layer that runs, which of its parts have written states."""
    made, waiting = list[Any](), set(range(len(decoder)))

    def run(index: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if index not in waiting:
            raise UnsupportedModel(f"{_name(model)} passes layer {index} several times a token: once is streamed here")
        waiting.remove(index)
        if first[index] == index:
            with _writing(decoder[index], cache.layers[index]) as writers[index]:
                made[:] = [forward(*args, **kwargs)]
        return made[0]

    training = model.training
    try:
        for index, layer in enumerate(decoder):
            layer.forward = partial(run, index, layer.forward)
        model.eval()
        tokens = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
        at_fixed_angles(model, input_ids=tokens, use_cache=True, **{CACHE: cache})
    finally:
        model.train(training)
        for layer in decoder:
            layer.__dict__.pop("forward", None)


@contextlib.contextmanager
def _writing(layer: nn.Module, kept: Any) -> Iterator[set[str]]:
    """The names of the parts of `layer` that write states into `kept` meanwhile; a "" among them says that some part
    writes KV entries, too."""
    running, found, by_both = [""], set[str](), set[str]()

    def told(who: set[str], stock: Any, *args: Any, **kwargs: Any) -> Any:
        who.add(running[0])
        return stock(*args, **kwargs)

    def started(name: str, *_: Any) -> None:
        running[0] = name

    hooks = [part.register_forward_pre_hook(partial(started, name)) for name, part in layer.named_children()]
    watched = {"update_conv_state": found, "update_recurrent_state": found, "update": by_both}
    watched = {name: who for name, who in watched.items() if hasattr(kept, name)}
    try:
        for name, who in watched.items():
            setattr(kept, name, partial(told, who, getattr(kept, name)))
        yield found
    finally:
        found |= {""} if found & by_both else set()
        for name in watched:
            kept.__dict__.pop(name, None)
        for hook in hooks:
            hook.remove()


def _state_of(kept: Any, model: StockModel, writers: set[str]) -> LayerState:
    keys, values = getattr(kept, "keys", None), getattr(kept, "values", None)
    states = tuple(StateTensor(name, tuple(state.shape), state.dtype) for name, state in states_in(kept).items())
    if isinstance(kept, LinearAttentionCacheLayerMixin) and not states:
        raise UnsupportedModel(f"{_name(model)} keeps the past of its recurrent layers in its modules, not in a cache")
    if isinstance(kept, CacheLayerMixin) and not isinstance(keys, Tensor):
        raise UnsupportedModel(f"{_name(model)} does not fill the KV cache that it is given")
    if isinstance(keys, Tensor) and keys.dim() == 4 and keys.shape[-2] > _TOKENS:
        raise UnsupportedModel(f"{_name(model)} puts {keys.shape[-2] - _TOKENS} tokens of its own in front of a prompt")
    writer = next(iter(writers)) if len(writers) == 1 and "" not in writers else None
    if isinstance(kept, DummyLayer) or not isinstance(keys, Tensor) or not isinstance(values, Tensor):
        return LayerState(0, 0, 0, states, writer)
    width = keys.shape[1] * keys.shape[3] + values.shape[1] * values.shape[3]
    return LayerState(width, keys.shape[1], keys.shape[1] * keys.shape[3], states, writer)


def states_in(kept: Any) -> dict[str, Tensor]:
    """What a layer of a KV cache holds of convolutions and recurrences, by name; nothing before tokens have passed."""
    return {
        f"{kind}.{number}": state
        for kind in STATE_KINDS
        for number, state in getattr(kept, f"{kind}_states", {}).items()
        if isinstance(state, Tensor)
    }


def _from_config(config: PretrainedConfig, layers: int) -> list[LayerState]:
    """Of plain attention, in the words that most configs use."""
    found = list[LayerState]()
    for own in config.get_text_config().per_layer_config[:layers]:  # which may differ
        heads = int(getattr(own, "num_key_value_heads", None) or own.num_attention_heads)
        size = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
        found.append(LayerState(2 * heads * size, heads, heads * size))
    return found


# Kinds that stretch the positions a model was trained with; others say what they reach in max_position_embeddings.
_STRETCHING = ("linear", "dynamic", "yarn")


@dataclass(frozen=True)
class RopeBorder:
    """Up to `tokens` a sequence is turned by one set of angles, beyond by others, all of its positions."""

    tokens: int
    kind: str
    moving: bool
    """Whether beyond the border the angles change with every token (dynamic), not once (longrope)."""
    rereads: bool
    """Whether transformers gives the model all tokens again when an answer crosses the border (Phi-3)."""

    def crossed(self, before: int, after: int) -> bool:
        """Whether a sequence that grows so is beyond the border in the end alone."""
        return before <= self.tokens < after

    def goes_on(self, known: int, entries: int, tokens: int) -> bool:
        """Whether the first `known` KV entries of a sequence of `entries` tokens are those of one of `tokens`."""
        if max(entries, tokens) <= self.tokens:
            return True
        # One more: behind exactly as many, Phi-3 is given everything again.
        return not self.moving and min(known, entries, tokens) > self.tokens + 1


def rope_border(config: PretrainedConfig, model_class: type | None = None) -> RopeBorder | None:
    """The border of `config`'s positions, or None where every length is turned alike; of several the first one."""
    text = config.get_text_config()
    borders = []
    for rope in _ropes(text):
        kind = str(rope.get("rope_type", ""))
        if "dynamic" in kind:
            borders.append(RopeBorder(text.max_position_embeddings, kind, moving=True, rereads=False))
        elif kind == "longrope":
            tokens = rope.get("original_max_position_embeddings") or text.max_position_embeddings
            borders.append(RopeBorder(int(tokens), kind, moving=False, rereads=_rereads(text, model_class)))
    return min(borders, key=lambda border: border.tokens, default=None)


def positions_reached(config: PretrainedConfig) -> int:
    """Tokens that `config`'s positions reach: max_position_embeddings, or what one rope of all layers stretches the
    trained length to."""
    most = getattr(config, "max_position_embeddings", None) or 2**31
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in _STRETCHING:
        return int(most)
    trained = rope.get("original_max_position_embeddings") or most
    return max(int(most), int(trained * (rope.get("factor") or 1)))


def begin_anew(model: Any) -> None:
    """Let positions that grow with the sequence (dynamic) forget the longest one that has passed: a prompt's angles are
    its own then, as they are of a model that was just loaded."""
    for module in model.modules():
        original = getattr(module, "original_inv_freq", None)
        if original is not None and getattr(module, "max_seq_len_cached", 0) > module.original_max_seq_len:
            module.register_buffer("inv_freq", original.to(module.inv_freq.device), persistent=False)
            module.max_seq_len_cached = module.original_max_seq_len


def _ropes(config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    """Rope parameters: one set of all layers, or one of each kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in found:
        yield found
    yield from (value for value in found.values() if isinstance(value, dict))


def _rereads(config: PretrainedConfig, model_class: type | None) -> bool:
    own = getattr(model_class, "prepare_inputs_for_generation", None)
    stock = GenerationMixin.prepare_inputs_for_generation
    return hasattr(config, "original_max_position_embeddings") and own not in (None, stock)
