"""One token of decode as a static step: everything that changes from token to token is in tensors that stay where
they are, so that the same kernels can run again without Python: as a captured CUDA graph (decode_graph.py).

The stock forward is used as it is. Attention reads the first `tokens` of every layer's store, whatever they are, under
a mask that is made on the device from the place of the new token and that of the first one it sees.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from griffin_offload.runtime.cache import KVCache, KVLayer

_SMALLEST_BUCKET = 256


def bucket_of(tokens: int, room: int) -> int:
    """The length that `tokens` of a KV cache with this `room` are read by: a power of two, or half way to the next
    one, so that attention reads at most half as much again as there is, and few lengths exist."""
    bucket = _SMALLEST_BUCKET
    while bucket < tokens:
        bucket += bucket // 2 if bucket & (bucket - 1) == 0 else bucket // 3
    return min(bucket, room)


class StaticStep:
    """The forward of one token for a KV cache, an input like `like` and a bucket of `tokens`.

    `advance` counts the token on the host and says on the device where it goes; `compute` computes it, and `logits`
    [B, 1, V] are the result. Only `compute` is captured. The KV cache is an argument, and not kept alive.
    """

    def __init__(self, model: Any, forward: Callable[..., Any], cache: KVCache, tokens: int, like: Tensor) -> None:
        self._forward = forward
        self._name = "inputs_embeds" if like.is_floating_point() else "input_ids"
        self._inputs = torch.zeros_like(like, memory_format=torch.contiguous_format)
        self._positions = torch.zeros(like.shape[0], 1, dtype=torch.long, device=like.device)
        windows = {layer.window: layer.room for layer in cache.layers}
        self._kinds = {window: _Kind(min(tokens, room), window, like.device) for window, room in windows.items()}
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
            attention_mask=self._masks(),
            position_ids=self._positions,
            past_key_values=Cache(layers=[_FixedLayer(layer, self._kinds[layer.window]) for layer in cache.layers]),
            use_cache=True,
            return_dict=True,
        )
        logits = output.logits[:, -1:]
        if self.logits.shape == logits.shape:
            self.logits.copy_(logits)
        else:  # the first time, which is never captured
            self.logits = logits.clone()

    def _masks(self) -> Any:
        """One mask, or one by type of layer where a config has types, as transformers makes them for static caches."""
        masks = {_type_of(window): kind.mask(self._dtype) for window, kind in self._kinds.items()}
        return masks if self._by_type else next(iter(masks.values()))


def _type_of(window: int | None) -> str:
    return "full_attention" if window is None else "sliding_attention"


class _Kind:
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

    def __init__(self, layer: KVLayer, kind: _Kind) -> None:
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
