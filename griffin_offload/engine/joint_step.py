"""A token each of several sequences in one forward, whose KV caches stay their own.

Linear layers, norms and the head see a batch [N, 1]. Attention alone takes one sequence after the other, each over the
keys and values that it sees: lengths differ without padding, nothing is copied to be put side by side, and no mask is
needed. It works where a model looks its attention up in transformers' `AttentionInterface`; `why_alone` says where not.
"""

import contextlib
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from griffin_offload.blocks.states import lasting_kinds, looks_at_length, state_kinds
from griffin_offload.engine.build import ATTENTION_NAME, attend_to_each
from griffin_offload.engine.model_interface import StockForward
from griffin_offload.errors import one_line
from griffin_offload.kernels.gemv import rows_apart
from griffin_offload.kv_cache.kv_cache import KVCache, can_cache
from griffin_offload.kv_cache.kv_layer import KVLayer
from griffin_offload.transformers_api import CACHE, StockModel

_NAME = "griffin_offload_joint"
# Of the largest logit: rounding of 16 bits through many layers is far below, another computation far above.
_CLOSE = 0.05


class _JointStates:
    """Keys, or values, of every sequence apart, [1, heads, T, D] each; `implementation` attends to one sequence's."""

    def __init__(self, parts: Sequence[Tensor], implementation: str) -> None:
        self.parts, self.implementation = parts, implementation


class _JointLayer(CacheLayerMixin):  # type: ignore[misc]
    """The same layer of several KV caches."""

    is_compileable = False

    def __init__(self, layers: Sequence[KVLayer], implementation: str) -> None:
        super().__init__()
        self._layers, self._implementation = layers, implementation
        self.is_sliding, self.is_initialized = layers[0].is_sliding, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("every sequence has a prompt")

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[_JointStates, _JointStates]:
        """Append a token [N, heads, 1, D], row i to cache i."""
        rows = enumerate(self._layers)
        pairs = [layer.update(key_states[i : i + 1], value_states[i : i + 1]) for i, layer in rows]
        keys, values = ([pair[side] for pair in pairs] for side in (0, 1))
        return _JointStates(keys, self._implementation), _JointStates(values, self._implementation)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return max(layer.get_mask_sizes(query_length) for layer in self._layers)

    def get_seq_length(self) -> int:
        return max(layer.get_seq_length() for layer in self._layers)

    def get_max_length(self) -> int:
        return max(layer.get_max_length() for layer in self._layers)


def _attend(
    module: nn.Module, query: Tensor, key: _JointStates, value: _JointStates, mask: object, **options: Any
) -> tuple[Tensor, None]:
    """As transformers calls an attention: query [N, heads, 1, D] to [N, 1, heads, D]."""
    if key.implementation == ATTENTION_NAME:
        return attend_to_each(module, query, key.parts, value.parts, **options)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(key.implementation, eager)
    pairs = enumerate(zip(key.parts, value.parts, strict=True))
    return torch.cat([attend(module, query[i : i + 1], *pair, None, **options)[0] for i, pair in pairs]), None


def _no_mask(*_: Any, **__: Any) -> None:
    """A sequence's newest token sees all that its own KV cache gives."""


AttentionInterface.register(_NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _no_mask)


class JointStep:
    """Forwards of one token of each of several sequences, by `forward`, the stock model's."""

    def __init__(self, model: StockModel, forward: StockForward) -> None:
        self._weak, self._forward = weakref.ref(model), forward
        self._knows_positions = "position_ids" in inspect.signature(forward).parameters
        self._checked = False
        self.why_alone = _why_alone(model)
        """Why this model computes one sequence at a time; None where it need not."""

    def __call__(self, tokens: Tensor, caches: Sequence[KVCache]) -> Tensor:
        """The logits [N, V] behind `tokens` [N, 1], the next ones of the sequences in `caches`."""
        with self._attending_apart() as implementation, rows_apart():
            rows = zip(*(cache.layers for cache in caches), strict=True)
            layers = [_JointLayer(row, implementation) if isinstance(row[0], KVLayer) else row[0] for row in rows]
            inputs = {"input_ids": tokens, CACHE: Cache(layers=layers), "use_cache": True, "return_dict": True}
            if self._knows_positions:
                lengths = [[cache.get_seq_length()] for cache in caches]
                inputs["position_ids"] = torch.tensor(lengths, dtype=torch.long, device=tokens.device)
            logits: Tensor = self._forward(**inputs).logits[:, -1]
            return logits

    @contextlib.contextmanager
    def _attending_apart(self) -> Iterator[str]:
        """Inside, the model finds our attention in the place of its own, whose name this gives."""
        config = self._weak().config.get_text_config()  # type: ignore[union-attr]
        before = config._attn_implementation
        config._attn_implementation = _NAME
        try:
            yield before
        finally:
            config._attn_implementation = before

    def check(self, new_cache: Callable[[], KVCache], device: torch.device) -> None:
        """Once, let two sequences of two tokens pass alone and together, and say in `why_alone` if that is not the
        same: an architecture may do more with keys and values than attend to them."""
        if self._checked or self.why_alone is not None:
            return
        self._checked = True
        tokens = torch.tensor([[1], [2]], dtype=torch.long, device=device)
        alone, joint = ([new_cache(), new_cache()] for _ in range(2))
        try:
            for caches in (alone, joint):
                self._alone(tokens, caches)
            expected, found = self._alone(tokens, alone), self(tokens, joint)
        except Exception as error:  # whatever an architecture does with what it does not know
            self.why_alone = f"keys and values of several do not pass its attention: {one_line(error)}"
            return
        scale = float(expected.float().abs().max())
        if not torch.allclose(found.float(), expected.float(), atol=_CLOSE * scale, rtol=0):
            self.why_alone = "its layers give other numbers for several sequences than for each of them"

    def _alone(self, tokens: Tensor, caches: Sequence[KVCache]) -> Tensor:
        rows = [self._forward(input_ids=tokens[i : i + 1], **{CACHE: cache}) for i, cache in enumerate(caches)]
        return torch.cat([row.logits[:, -1] for row in rows])


def _why_alone(model: StockModel) -> str | None:
    config = model.config
    if not can_cache(config) or state_kinds(config):
        return f"layers of kind {lasting_kinds(config) or state_kinds(config)} keep states"
    if not model._supports_attention_backend:
        return f"the attention of {config.model_type} is its own"
    return looks_at_length(config)
