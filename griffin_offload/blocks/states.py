"""What every layer keeps of the tokens that have passed: KV entries, a state of fixed size, or both.

It is measured, not read off the config, whose words differ from one architecture to the next (heads by layer, keys of
another size than values, entries shared between layers, convolutions, recurrences): two tokens pass the model on the
meta device, into transformers' own cache.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from griffin_offload.errors import CheckpointError, UnsupportedModel, one_line
from griffin_offload.transformers_api import CACHE, DummyLayer, StockCache, StockModel, stock_cache

_TOKENS = 2
# The last is a layer without entries of its own: it reads another one's, or attends to nothing.
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)


@dataclass(frozen=True)
class LayerState:
    """Of one layer and one sequence."""

    kv_width: int
    """Numbers per token in keys and values together; 0 where none are kept."""
    kv_heads: int
    state_bytes: int = 0
    """Of convolutions and recurrences, however many tokens have passed."""
    recurrent: bool = False
    """Whether a recurrence is among them."""


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


def lasting_kinds(config: PretrainedConfig) -> str:
    """The kinds of layers, in the config's words, that keep a state whose past cannot be taken back; empty where every
    layer keeps the keys and values of plain attention, or nothing."""
    layers, names = cache_layers(config), getattr(config.get_text_config(), "layer_types", None)
    names = names if names and len(names) == len(layers) else [_kind(layer) for layer in layers]
    other = [name for layer, name in zip(layers, names, strict=True) if type(layer) not in _PLAIN]
    return ", ".join(dict.fromkeys(str(name) for name in other))


def shares_entries(config: PretrainedConfig) -> bool:
    """Whether some layers keep no entries of their own: they read another layer's, or attend to nothing."""
    return any(isinstance(layer, DummyLayer) for layer in cache_layers(config))


def _kind(layer: Any) -> str:
    return "linear_attention" if isinstance(layer, LinearAttentionCacheLayerMixin) else type(layer).__name__


def kept_states(model: StockModel, decoder: nn.ModuleList) -> list[LayerState]:
    """What each layer of `decoder`, those of `model` on the meta device, keeps. UnsupportedModel where that is not in
    the KV cache that it is given, or cannot be known before weights are read."""
    _check_takes_cache(model)
    config = model.config
    cache = stock_cache(config)
    if len(cache.layers) != len(decoder):
        raise UnsupportedModel(f"{_name(model)} has {len(decoder)} decoder layers and caches {len(cache.layers)}")
    first = _first_of_kind(decoder, cache.layers)
    try:
        _pass_tokens(model, decoder, first, cache)
    except Exception as error:  # not every architecture can be traced
        if all(type(layer) in _PLAIN for layer in cache.layers):
            return _from_config(config, len(decoder))
        raise UnsupportedModel(
            f"{_name(model)}: what its layers ({lasting_kinds(config)}) keep cannot be known before weights are read: "
            f"{one_line(error)}"
        ) from error
    return [_state_of(cache.layers[index], model) for index in first]


def _name(model: StockModel) -> str:
    return type(model).__name__


def _check_takes_cache(model: StockModel) -> None:
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
def _pass_tokens(model: StockModel, decoder: nn.ModuleList, first: list[int], cache: StockCache) -> None:
    """A forward, for what it leaves in `cache`, in which layers like an earlier one do nothing."""
    made: list[Any] = []

    def run(forward: Any, *args: Any, **kwargs: Any) -> Any:
        made[:] = [forward(*args, **kwargs)]
        return made[0]

    def skip(*args: Any, **kwargs: Any) -> Any:
        return made[0]

    training = model.training
    try:
        for index, layer in enumerate(decoder):
            layer.forward = partial(run, layer.forward) if first[index] == index else skip
        model.eval()
        tokens = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
        model(input_ids=tokens, use_cache=True, **{CACHE: cache})
    finally:
        model.train(training)
        for layer in decoder:
            layer.__dict__.pop("forward", None)


def _state_of(kept: Any, model: StockModel) -> LayerState:
    keys, values = getattr(kept, "keys", None), getattr(kept, "values", None)
    fixed = [
        state
        for states in (getattr(kept, "conv_states", {}), getattr(kept, "recurrent_states", {}))
        for state in states.values()
        if isinstance(state, Tensor)
    ]
    if isinstance(kept, LinearAttentionCacheLayerMixin) and not fixed:
        raise UnsupportedModel(f"{_name(model)} keeps the past of its recurrent layers in its modules, not in a cache")
    if isinstance(kept, CacheLayerMixin) and not isinstance(keys, Tensor):
        raise UnsupportedModel(f"{_name(model)} does not fill the KV cache that it is given")
    state_bytes = sum(state.numel() * state.element_size() for state in fixed)
    recurrent = any(isinstance(state, Tensor) for state in getattr(kept, "recurrent_states", {}).values())
    if isinstance(kept, DummyLayer) or not isinstance(keys, Tensor) or not isinstance(values, Tensor):
        return LayerState(0, 0, state_bytes, recurrent)
    width = keys.shape[1] * keys.shape[3] + values.shape[1] * values.shape[3]
    return LayerState(width, keys.shape[1], state_bytes, recurrent)


def _from_config(config: PretrainedConfig, layers: int) -> list[LayerState]:
    """Of plain attention, in the words that most configs use."""
    text = config.get_text_config()
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return [LayerState(2 * heads * size, heads)] * layers
