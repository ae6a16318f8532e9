"""Decode by CUDA graphs: a static step is captured once and replayed for every further token.

Launching the kernels of a token one by one takes Python and the driver longer than a fast device needs to compute
them. Compact weights and the KV cache stay where they are, so a capture serves all prompts. There is one for every KV
cache, input shape and length bucket; the first token of a bucket warms up, the second is captured, so that neither a
prompt nor a short answer pays for it. What cannot be captured runs kernel by kernel, and the report says why.
"""

import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _of_modules
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from griffin_offload.blocks.base import hooks_on
from griffin_offload.blocks.states import all_keep_entries, looks_at_length, state_kinds
from griffin_offload.devices.base import Recorder
from griffin_offload.engine.model_interface import Guard, StockForward
from griffin_offload.engine.report import GraphReport
from griffin_offload.errors import one_line
from griffin_offload.kv_cache.kv_cache import KVCache
from griffin_offload.kv_cache.kv_layer import KVLayer
from griffin_offload.planner.request import GraphCosts
from griffin_offload.transformers_api import CACHE, Arguments, StockModel, StockOutput

GRAPH_COSTS = GraphCosts(
    most=8,  # KV caches times length buckets
    # A workspace of cuBLAS for the stream that captures (32 MiB on Hopper), one more of cuBLASLt, and rounding.
    pool_bytes=80 * 2**20,
    # What the driver keeps of one kernel, times kernels of a layer: estimates, beside which benchmarks/gpu.py puts
    # figures.
    layer_bytes=64 * 1024,
)
"""What captures keep, for the planner."""


# One token of decode as a static step: everything that changes from token to token is in tensors that stay where they
# are, so that the same kernels can run again without Python: as a captured CUDA graph.


SMALLEST_BUCKET = 256


def bucket_of(tokens: int, room: int) -> int:
    """The length that `tokens` of a KV cache with this `room` are read by: a power of two, or half way to the next
    one, so that attention reads at most half as much again as there is, and few lengths exist."""
    bucket = SMALLEST_BUCKET
    while bucket < tokens:
        bucket += bucket // 2 if bucket & (bucket - 1) == 0 else bucket // 3
    return min(bucket, room)


class StaticDecodeStep:
    """The forward of one token for a KV cache, an input like `like` and a bucket of `tokens`.

    `advance` counts the token on the host and says on the device where it goes; `compute` computes it, and `logits`
    [B, 1, V] are the result. Only `compute` is captured. The KV cache is an argument, and not kept alive.
    """

    def __init__(self, model: StockModel, forward: StockForward, cache: KVCache, tokens: int, like: Tensor) -> None:
        self._forward = forward
        self._name = "inputs_embeds" if like.is_floating_point() else "input_ids"
        self._inputs = torch.zeros_like(like, memory_format=torch.contiguous_format)
        self._positions = torch.zeros(like.shape[0], 1, dtype=torch.long, device=like.device)
        windows = {layer.window: layer.room for layer in cache.layers}
        self._kinds = {window: _WindowGroup(min(tokens, room), window, like.device) for window, room in windows.items()}
        self._dtype = cache.layers[0].dtype
        self._by_type = hasattr(model.config, "layer_types")
        self.logits = torch.empty(0, dtype=torch.float32, device=like.device)

    def advance(self, cache: KVCache, inputs: Tensor, positions: Tensor | None) -> None:
        """The next token: ids [B, 1], or embeddings [B, 1, H] in their place; `positions` [B, 1] if they are not
        those of the KV cache. Nothing waits for the device."""
        self._inputs.copy_(inputs)
        if positions is None:
            self._positions.fill_(cache.get_seq_length())
        else:
            self._positions.copy_(positions)
        for window, kind in self._kinds.items():
            places = {layer.advance() for layer in cache.layers if layer.window == window}
            assert len(places) == 1, "layers with the same window hold the same tokens"
            kind.say(*places.pop())

    def compute(self, cache: KVCache) -> None:
        """The same kernels at the same addresses every time."""
        output = self._forward(
            **{self._name: self._inputs},
            attention_mask=self.masks(),
            position_ids=self._positions,
            **{CACHE: Cache(layers=[_FixedLayer(layer, self._kinds[layer.window]) for layer in cache.layers])},
            use_cache=True,
            return_dict=True,
        )
        logits = output.logits[:, -1:]
        if self.logits.shape == logits.shape:
            self.logits.copy_(logits)
        else:  # the first time, which is never captured
            self.logits = logits.clone()

    def masks(self) -> Any:
        """One mask, or one by type of layer where a config has types, as transformers makes them for static caches."""
        masks = {_type_of(window): kind.mask(self._dtype) for window, kind in self._kinds.items()}
        return masks if self._by_type else next(iter(masks.values()))


def _type_of(window: int | None) -> str:
    return "full_attention" if window is None else "sliding_attention"


class _WindowGroup:
    """What layers with the same window share: where the new token goes, and which tokens it sees."""

    def __init__(self, tokens: int, window: int | None, device: torch.device) -> None:
        self.tokens, self._slides = tokens, window is not None
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self._first = torch.zeros(1, dtype=torch.long, device=device)
        self._places = torch.arange(tokens, dtype=torch.long, device=device)

    def say(self, place: int, first: int) -> None:
        self.place.fill_(place)
        if self._slides:
            self._first.fill_(first)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[1, 1, 1, tokens]: what is added to the scores. Of their dtype, because attention would have to make that of
        a mask of booleans, in every layer."""
        seen = self._places <= self.place
        if self._slides:
            seen &= self._places >= self._first
        added = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
        return added.view(1, 1, 1, -1)


class _FixedLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer of the KV cache as a static step sees it: of fixed length, written at a place that the device knows."""

    is_compileable = False

    def __init__(self, layer: KVLayer, kind: _WindowGroup) -> None:
        super().__init__()
        self._layer, self._kind = layer, kind
        self.is_sliding, self.is_initialized = layer.is_sliding, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("a static step follows a prompt")

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._layer.put(self._kind.place, key_states, value_states, self._kind.tokens)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._kind.tokens, 0

    def get_seq_length(self) -> int:
        return self._kind.tokens - 1

    def get_max_length(self) -> int:
        return self._kind.tokens


# Arguments of a forward that a static step takes, or that are the same for every token.
_TAKEN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", CACHE, "use_cache", "return_dict"}
_TAKEN |= {"logits_to_keep", "cache_position"}
_OUTPUT_HOOKS = "transformers.utils.output_capturing"
_WARM_UP = "first token of a length"
_CLOSED = "the graphs are closed"


class _Captured:
    """A static step, and what replays it when it has been captured."""

    def __init__(self, step: StaticDecodeStep, addresses: tuple[int, ...]) -> None:
        self.step, self.addresses = step, addresses
        self.warm = False
        self.replay: Callable[[], None] | None = None
        self.used = 0


class DecodeGraphs:
    """The captures of one model. `reason` says why there are none, if it has one that lasts."""

    def __init__(self, model: StockModel, forward: StockForward, recorder: Recorder, *, embeds_on_host: bool) -> None:
        self._weak = weakref.ref(model)  # whose forward keeps the engine alive, and this
        self._forward, self._recorder = forward, recorder
        self._embeds_on_host = embeds_on_host
        self._captured: weakref.WeakKeyDictionary[KVCache, dict[Any, _Captured]] = weakref.WeakKeyDictionary()
        self._clock = 0
        self._run_reason: str | None = None
        self._settings = list[object]()
        self.reason = _unsuited(model)

    @property
    def _model(self) -> StockModel:
        model = self._weak()
        assert model is not None, "whoever decodes keeps it alive"
        return model

    def close(self) -> None:
        """Give the captures' memory back."""
        self._captured.clear()
        self.reason = _CLOSED

    def begin(self, mask: object) -> None:
        """A prompt has passed, with the caller's `mask`; the one moment that waits for the device to look at it."""
        self._run_reason = self.reason
        if isinstance(mask, Tensor) and (mask.dim() != 2 or not bool(mask.all())):
            self._run_reason = self._run_reason or "padded prompts"
        if self._model.config.output_hidden_states or self._model.config.output_attentions:
            self._run_reason = self._run_reason or "hidden states or attentions by config"
        if hooked(self._model, self._model.get_input_embeddings() if self._embeds_on_host else None):
            self._run_reason = self._run_reason or "hooks on the model's modules"
        before, self._settings = self._settings, settings_of(self._model)
        if before != self._settings:
            self._captured.clear()

    @property
    def caches(self) -> list[KVCache]:
        """Those there are captures for."""
        return list(self._captured)

    def forward(self, arguments: Arguments, report: GraphReport) -> StockOutput | None:
        """The stock model's output for a forward with these `arguments`, or None: it has to run kernel by kernel."""
        reason = self._run_reason or self.reason or why_not_static(arguments)
        if reason is not None:
            report.count(reason)
            return None
        cache: KVCache = arguments[CACHE]
        inputs = arguments.get("input_ids")
        if inputs is None:
            inputs = arguments["inputs_embeds"]
        elif self._embeds_on_host:
            inputs = self._model.get_input_embeddings()(inputs)
        captured = self._for(cache, inputs)
        captured.step.advance(cache, inputs, arguments.get("position_ids"))
        self._compute(captured, cache, report)
        # A copy: the next token is written over the step's own.
        output: StockOutput = CausalLMOutputWithPast(logits=captured.step.logits.clone(), **{CACHE: cache})
        return output

    def _compute(self, captured: _Captured, cache: KVCache, report: GraphReport) -> None:
        step = captured.step
        if captured.replay is None and captured.warm:
            start = time.perf_counter()
            captured.replay = self._record(lambda: step.compute(cache))
            report.capture_s += time.perf_counter() - start
            report.captured += captured.replay is not None
        if captured.replay is not None:
            captured.replay()
            report.replayed += 1
            return
        self._recorder.warm_up(lambda: step.compute(cache))
        reason = self.reason or _WARM_UP
        report.count(reason)
        captured.warm = True

    def _record(self, compute: Callable[[], None]) -> Callable[[], None] | None:
        try:
            return self._recorder.record(compute)
        except RuntimeError as error:
            self.reason = f"capturing failed: {one_line(error)}"
            self._captured.clear()
            warnings.warn(f"decoding kernel by kernel, {self.reason}", stacklevel=2)
            return None

    def _for(self, cache: KVCache, inputs: Tensor) -> _Captured:
        """What there is for the next token of `cache`, or a new one."""
        room = max(layer.room for layer in cache.kept)
        bucket = bucket_of(min(cache.get_seq_length() + 1, room), room)
        key = (bucket, inputs.shape, inputs.dtype)
        of_cache = self._captured.setdefault(cache, {})
        found, addresses = of_cache.get(key), cache.addresses
        if found is None or found.addresses != addresses:
            for other in [other for other, kept in of_cache.items() if kept.addresses != addresses]:
                del of_cache[other]
            self._make_room()
            of_cache[key] = found = _Captured(
                StaticDecodeStep(self._model, self._forward, cache, bucket, inputs), addresses
            )
        self._clock += 1
        found.used = self._clock
        return found

    def _make_room(self) -> None:
        """Drop the capture that was used longest ago, if there are as many as were planned for."""
        kept = [(found.used, of_cache, key) for of_cache in self._captured.values() for key, found in of_cache.items()]
        if len(kept) >= GRAPH_COSTS.most:
            _, of_cache, key = min(kept, key=lambda entry: entry[0])
            del of_cache[key]


def _unsuited(model: StockModel) -> str | None:
    """Why no forward of `model` can be a static step."""
    config = model.config
    if getattr(config, "alibi", False) or config.model_type == "bloom":
        return "ALiBi is made from the length"
    if config.model_type == "falcon":
        return "Falcon brings indices of heads from the host"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"{config._attn_implementation} attention"
    if state_kinds(config) or not all_keep_entries(config):
        return "layers without KV entries of their own"
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = [ropes, *(value for value in ropes.values() if isinstance(value, dict))]
    if any(kind.get("rope_type") == "dynamic" for kind in kinds):
        return "dynamic rope reads positions on the host"
    return looks_at_length(config)


def hooked(model: StockModel, but: object) -> bool:
    """Whether a forward would call hooks, which a replay cannot, or a function in the place of a module's forward, as
    good as one; `but` is a module that it does not run."""
    modules = [module for module in model.modules() if module is not but and module is not model]  # its own run around
    of_all = (_of_modules._global_forward_hooks, _of_modules._global_forward_pre_hooks)
    return any(of_all) or any(
        # transformers leaves some behind, which do nothing unless a forward asks for more than logits. A guard lets
        # pass what is inside a forward.
        any(getattr(hook, "__module__", "") != _OUTPUT_HOOKS and not isinstance(hook, Guard) for hook in hooks_on(own))
        or _of_others(own.__dict__.get("forward"))
        for own in modules
    )


def _of_others(forward: object) -> bool:
    """Whether somebody has put it in the place of a module's own; ours are faster ways to the same."""
    return forward is not None and type(forward).__module__.partition(".")[0] != __name__.partition(".")[0]


_SETTINGS = (int, float, bool, str, complex, torch.dtype)


def settings_of(model: StockModel) -> list[object]:
    """What a forward reads and a replay does not: which modules there are, their numbers and functions, and how their
    tensors lie. Equal to that of another time if all is as it was; nothing of the model is kept alive."""
    found: list[object] = [*_settings(vars(model.config.get_text_config()))]
    for module in model.modules():
        kind = type(module)
        found += (weakref.ref(module), kind, kind.forward, *_settings(module.__dict__))
        for tensors in (module._parameters, module._buffers):
            found += ((own.data_ptr(), own.shape, own.stride(), own.dtype) for own in tensors.values() if _lies(own))
    return found


def _lies(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return type(tensor) in (Tensor, nn.Parameter)


def _settings(attributes: dict[str, Any]) -> Iterator[object]:
    for name, value in attributes.items():
        if isinstance(value, _SETTINGS):
            yield name, value
        elif callable(value):
            try:
                yield name, weakref.ref(value)  # another one may come to lie where it was
            except TypeError:
                yield name, id(value)


def why_not_static(arguments: Arguments) -> str | None:
    """Why a forward with these arguments is not a static step; nothing is read from the device."""
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(arguments.get(CACHE), KVCache):
        return "a KV cache of the caller's"
    if tokens is None or tokens.shape[1] != 1:
        return "several tokens at once"
    more = [
        name for name, value in arguments.items() if name not in _TAKEN and value is not None and value is not False
    ]
    if more:
        return f"the argument {more[0]}"
    if arguments.get("return_dict") is False or arguments.get("use_cache") is False:
        return "another kind of output"
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        return "a mask of the caller's"
    if positions is not None and (positions.dim() != 2 or positions.shape[1] != 1):
        return "positions of another shape"
    return None
