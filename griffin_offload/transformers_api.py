"""What differs between the releases of transformers that this package runs with: here, and nowhere else.

Each difference is decided by what the installed release has, not by its number.

| from | what |
|---|---|
| 5.23 | `DummyLayer` stands for a layer without KV entries of its own; before, the cache had no layer there |
| 5.23 | `ResponseParser` takes answers apart as they come; before, tools are refused by the server |
| 5.24 | the KV cache is called `cache`, as an argument and in outputs; before, `past_key_values` |
| 5.25 | layers of states count tokens, and are croppable; no model is called stateful; Mamba's scan is in a function |

And what a few of its models do otherwise than all others, which `adapted` makes up for: the name and the length of
Mamba's cache, recurrences that several tokens begin anew, RecurrentGemma's states outside of the cache. Experts that
are called otherwise than all others' are in `blocks/routing.py`.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields
from importlib.metadata import version
from typing import Any, Protocol

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, cache_utils
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from griffin_offload.errors import UsageError

NEWEST_TESTED = (5, 25)
"""The release series whose every test was last seen to pass: `benchmarks/versions.py`."""

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What parts of models call the KV cache, in one release or another."""
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""What the KV cache is called: in arguments of `forward` and `generate`, and in what they return."""
FOREIGN_CACHE_NAMES = () if CACHE == "cache" else ("cache",)
"""Names of newer releases, that this one would take for something else."""


class NoEntries:
    """What `DummyLayer` is, for releases that have none."""

    is_compileable = is_croppable = is_initialized = True
    is_sliding = supports_early_init = False
    keys = values = None

    def get_max_length(self) -> int:
        return -1

    def _nothing(self, *_: Any, **__: Any) -> None:
        """There is nothing to forget, to move or to repeat."""

    offload = prefetch = reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _nothing


DummyLayer: Any = getattr(cache_utils, "DummyLayer", NoEntries)
"""A layer of a KV cache that keeps nothing: it reads another one's entries, or attends to nothing."""


def response_parser() -> Any:
    """What takes answers apart by a description of them; None in releases that have none."""
    try:
        from transformers.utils.chat_parsing import ResponseParser
    except ImportError:
        return None
    return ResponseParser


WITHOUT_ATTENTION = ("moe", "mlp")
"""What configs call layers that are a feed-forward alone, which keeps nothing."""


class StatesCache(DynamicCache):  # type: ignore[misc]
    """transformers' own cache of a model whose layers keep states alone: it knows how many tokens have passed."""

    is_compileable = False  # masks have two axes for such models
    _tokens = 0

    @property
    def is_linear(self) -> list[bool]:
        """Of none: `generate` asks for a length then."""
        return [False] * len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._tokens

    def count(self, tokens: int) -> None:
        """So many more have passed."""
        self._tokens += tokens

    def reset(self) -> None:
        super().reset()
        self._tokens = 0


def keeps_entries(layers: Iterable[Any]) -> bool:
    """Whether some of the layers of a cache hold keys and values, by which its tokens are counted."""
    return any(isinstance(layer, CacheLayerMixin) for layer in layers)


def counts_tokens(cache: Any) -> bool:
    """Whether a cache knows how many tokens have passed."""
    layers = getattr(cache, "layers", None)
    return hasattr(cache, "count") or not layers or keeps_entries(layers)


def stock_cache(config: PretrainedConfig) -> Any:
    """transformers' own empty KV cache, with one layer per decoder layer. Whatever that raises of a config."""
    cache = DynamicCache(config=config)
    if not keeps_entries(cache.layers) and not any(isinstance(layer, DummyLayer) for layer in cache.layers):
        return StatesCache(config=config)
    if DummyLayer is NoEntries:
        text = config.get_text_config(decoder=True)
        names = getattr(text, "layer_types", None) or []
        layers = [
            NoEntries() if name in WITHOUT_ATTENTION else layer
            for name, layer in zip([*names, *[None] * len(cache.layers)], cache.layers, strict=False)
        ]
        missing = text.num_hidden_layers - len(layers) if getattr(text, "num_kv_shared_layers", None) else 0
        cache.layers[:] = layers + [NoEntries() for _ in range(missing)]
    return cache


def with_own_name(arguments: dict[str, object]) -> dict[str, Any]:
    """`arguments` with the KV cache under the name that the installed release knows, whichever of the two that are
    its own it came by. UsageError for both at once."""
    if CACHE == "past_key_values" or "past_key_values" not in arguments:
        return arguments
    if arguments.get("cache") is not None:
        raise UsageError("cache and past_key_values are one argument by two names: give one of them")
    return {("cache" if name == "past_key_values" else name): value for name, value in arguments.items()}


def untested(installed: str) -> str | None:
    """What to tell whoever runs with transformers `installed`: None unless it is newer than what was tested."""
    series = Version(installed).release[:2]
    if series <= NEWEST_TESTED:
        return None
    tested, after = (f"{major}.{minor}" for major, minor in (NEWEST_TESTED, (NEWEST_TESTED[0], NEWEST_TESTED[1] + 1)))
    return (
        f"transformers {installed} is newer than {tested}, the newest that this griffin-offload was tested with: if "
        f"something fails or answers look wrong, pip install 'transformers<{after}' or a newer griffin-offload"
    )


@functools.cache
def warn_if_untested() -> None:
    """Once per process: a UserWarning where the installed transformers is newer than what was tested."""
    told = untested(version("transformers"))
    if told is not None:
        warnings.warn(told, stacklevel=3)


class StockModel(nn.Module):
    """What is asked of transformers' causal language models, whichever class they are of: for types alone, nothing is
    made of it. `config`, and what modules are made of, differ between architectures; a model may have no head."""

    config: Any
    base_model: Any
    generation_config: Any
    dtype: torch.dtype
    device: torch.device
    get_input_embeddings: Callable[[], Any]
    get_output_embeddings: Callable[[], Any]
    set_input_embeddings: Callable[[nn.Module], None]
    set_output_embeddings: Callable[[nn.Module], None]
    get_decoder: Callable[[], Any]
    set_attn_implementation: Callable[[str], None]
    prepare_inputs_for_generation: Callable[..., dict[str, Any]]
    _update_model_kwargs_for_generation: Callable[..., dict[str, Any]]
    _supports_attention_backend: bool
    generate: Callable[..., Any]
    tie_weights: Callable[[], None]
    name_or_path: str
    _keys_to_ignore_on_load_missing: Any
    _weight_conversions: Any
    _get_dtype_plan: Callable[[torch.dtype], dict[str, torch.dtype]]
    _prepare_special_tokens: Callable[..., None]
    _get_logits_processor: Callable[..., Callable[[Tensor, Tensor], Tensor]]


class Tokenizer(Protocol):
    """What is asked of transformers' tokenizers."""

    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: str | dict[str, str] | None
    response_template: Any
    all_special_ids: list[int]
    added_tokens_decoder: dict[int, Any]

    def __call__(self, text: str, **options: Any) -> Any: ...

    def __len__(self) -> int: ...

    def __hash__(self) -> int: ...

    def encode(self, text: str, **options: Any) -> list[int]: ...

    def decode(self, tokens: object, **options: Any) -> str: ...

    def apply_chat_template(self, messages: object, **options: Any) -> Any: ...

    def save_pretrained(self, save_directory: object) -> Any: ...

    def get_added_vocab(self) -> dict[str, int]: ...

    def convert_tokens_to_ids(self, tokens: object) -> Any: ...

    def convert_ids_to_tokens(self, ids: object) -> Any: ...


Arguments = dict[str, Any]
"""Of a model's forward, by name: which there are differs between architectures."""


class StockOutput(Protocol):
    """What is asked of what a model's forward gives."""

    logits: Tensor


class StockCache(Protocol):
    """A KV cache as transformers' models know it: ours, one of theirs, or a caller's."""

    def get_seq_length(self) -> int: ...


# Models of states alone (Mamba): their cache has another name, and counts no tokens.

_ITS_OWN = "cache_params"

ADAPTERS: dict[str, Callable[[Any, StockModel], None]] = {}
"""By the name of a class of modules, what adapts one of a model in place: of experts, in `blocks/routing.py`."""


def adapted(model: StockModel) -> StockModel:
    """`model`, which takes and returns its cache as others do, and whose recurrences go on from any number of tokens:
    where transformers' own class does otherwise, it is of one derived from it. So are modules that have an adapter."""
    stock: Any = type(model)
    name = next((n for n in (CACHE, _ITS_OWN) if n in inspect.signature(stock.forward).parameters), None)
    if name is not None and _keeps_states_alone(model.config):
        model.__class__ = _counting(stock, name)
    for module in list(model.modules()):
        kind: Any = type(module)
        if _forgets(kind):
            module.__class__ = _going_on(kind)
        elif kind.__name__ in ADAPTERS:
            ADAPTERS[kind.__name__](module, model)
        elif kind.__name__ == "RecurrentGemmaRecurrentBlock" and "layer_types" in type(model.config).attribute_map:
            module.__class__ = _keeping_in_cache(kind)
    for index, layer in enumerate(getattr(model.base_model, "layers", ())):
        if hasattr(layer, "temporal_block"):
            layer.temporal_block.layer_idx = index
    return model


def _keeps_states_alone(config: PretrainedConfig) -> bool:
    try:
        return isinstance(stock_cache(config), StatesCache)
    except Exception:  # whoever needs the cache says what is wrong with the config
        return False


@functools.cache
def _counting(stock: type[Any], name: str) -> type[Any]:
    """Of a class that calls its cache by `name`."""
    known = inspect.signature(stock.forward)

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        other = kwargs.pop(_ITS_OWN, None)
        given = kwargs.pop(CACHE, other)
        bound = known.bind_partial(self, *args, **kwargs).arguments
        ids = bound.get("input_ids")
        tokens = (bound["inputs_embeds"] if ids is None else ids).shape[1]
        if given is None and bound.get("use_cache", self.config.use_cache):
            given = stock_cache(self.config)
        mask = bound.get("attention_mask")
        if mask is not None:  # of these tokens alone
            kwargs["attention_mask"] = mask[:, -tokens:] if given is not None and given.get_seq_length() else mask
        output = stock.forward(self, *args, **{name: given}, **kwargs)
        if given is not None:
            given.count(tokens)
        if not isinstance(output, dict):
            return output
        same = {word: output.get(word) for word in ("loss", "logits", "hidden_states")}
        return CausalLMOutputWithPast(**same, **{CACHE: output.get(name)})

    renamed = [one.replace(name=CACHE) if one.name == name else one for one in known.parameters.values()]
    forward.__signature__ = known.replace(parameters=renamed)  # type: ignore[attr-defined]
    # transformers would make a second cache, by the name that it knows.
    own = {"forward": forward, "_supports_default_dynamic_cache": lambda self: False, "__module__": stock.__module__}
    return type(stock.__name__, (stock,), own)


def _forgets(kind: type[nn.Module]) -> bool:
    """Whether several tokens at once would begin the recurrence of such a part anew (Mamba 1)."""
    called = inspect.unwrap(kind.forward)
    for name in ("mamba_scan_forward", "mamba_selective_scan"):  # the one calls the other, since transformers 5.25
        if name in getattr(getattr(called, "__code__", None), "co_names", ()):
            called = inspect.unwrap(called.__globals__[name])
    return called.__name__ == "mamba_selective_scan" and "initial_states" not in inspect.signature(called).parameters


@functools.cache
def _going_on(stock: type[Any]) -> type[Any]:
    known = inspect.signature(stock.forward)
    name = next(name for name in CACHE_NAMES if name in known.parameters)

    @functools.wraps(stock.forward)
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        cache, tokens = known.bind(self, hidden_states, *args, **kwargs).arguments.get(name), hidden_states.shape[1]
        if cache is None or tokens == 1 or not cache.has_previous_state(self.layer_idx):
            found: Tensor = stock.forward(self, hidden_states, *args, **kwargs)
            return found
        # As decoding does: nothing behind a state is padding.
        parts = hidden_states.split(1, dim=1)
        return torch.cat([stock.forward(self, one, **{name: cache}) for one in parts], dim=1)

    return type(stock.__name__, (stock,), {"forward": forward, "__module__": stock.__module__})


@functools.cache
def _keeping_in_cache(stock: type[Any]) -> type[Any]:
    """Of RecurrentGemma's recurrences, which keep their states as attributes, and begin anew with several tokens."""

    @functools.wraps(stock.forward)
    def forward(self: Any, input_states: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE)
        if cache is None:
            return stock.forward(self, input_states, position_ids, None, use_cache=False)
        kept, parts = cache.layers[self.layer_idx], [(input_states, position_ids)]
        if kept.has_previous_state[0]:
            self.conv1d_state, self.rg_lru.recurrent_states = kept.conv_states[0], kept.recurrent_states[0]
            parts = list(zip(input_states.split(1, dim=1), position_ids.split(1, dim=1), strict=True))
        else:
            batch, inputs = len(input_states), self.conv1d_width - 1
            self.conv1d_state = input_states.new_zeros(batch, self.lru_width, inputs)
            self.rg_lru.recurrent_states = input_states.new_zeros(batch, self.lru_width, dtype=torch.float32)
        outputs = [stock.forward(self, *part, None, use_cache=True)[0] for part in parts]
        kept.update_conv_state(self.conv1d_state, conv_kernel_size=self.conv1d_width - 1)
        kept.update_recurrent_state(self.rg_lru.recurrent_states)
        self.conv1d_state = self.rg_lru.recurrent_states = None
        return torch.cat(outputs, dim=1), None

    return type(stock.__name__, (stock,), {"forward": forward, "__module__": stock.__module__})


def at_fixed_angles(model: StockModel, **inputs: Any) -> Any:
    """A forward on the meta device, where kinds of positions that change with the length (dynamic) cannot compare it:
    they are turned as at every other length, which changes no shape."""
    ropes: list[tuple[Any, Any]] = [(part, part.rope_type) for part in model.modules() if hasattr(part, "rope_type")]
    try:
        for part, kind in ropes:
            part.rope_type = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
        return model(**inputs)
    finally:
        for part, kind in ropes:
            part.rope_type = kind
