"""Several sequences in one forward, whose KV caches stay their own: a token of each, or the prompt of each.

Linear layers, norms and the head see a batch [N, 1], or prompts behind each other, [1, T] of all. Attention alone takes
one sequence after the other, each over the keys and values that it sees: lengths differ without padding, nothing is
copied to be put side by side, and no mask is needed. It works where a model looks its attention up in transformers'
`AttentionInterface`; `why_alone` and `why_prompts_alone` say where not.
"""

import contextlib
import inspect
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from griffin_offload.blocks.states import lasting_kinds, looks_at_length, rope_border, state_kinds, windows_of
from griffin_offload.engine.build import OWN_ATTENTION, SINKS_NAME, attend_to_each, eager_attention_of
from griffin_offload.engine.model_interface import StockForward, one_token_each
from griffin_offload.errors import one_line
from griffin_offload.kv_cache.kv_cache import KVCache, can_cache
from griffin_offload.kv_cache.kv_layer import KVLayer
from griffin_offload.transformers_api import CACHE, StockModel

_NAME = "griffin_offload_joint"
# Of the largest logit: rounding of 16 bits through many layers is far below, another computation far above.
_CLOSE = 0.05


class _JointStates:
    """Keys, or values, of every sequence apart, [1, heads, T, D] each; `implementation` attends to one sequence's."""

    def __init__(self, parts: Sequence[Tensor], implementation: str, lengths: "Lengths") -> None:
        self.parts, self.implementation, self.lengths = parts, implementation, lengths


Lengths = Sequence[int] | None
"""Tokens of the prompts that lie behind each other; None where a batch has a token of each sequence."""


def _apart(states: Tensor, lengths: Lengths) -> Sequence[Tensor]:
    """Of every sequence its own, [1, heads, T, D] each."""
    found: tuple[Tensor, ...] = states.split(1) if lengths is None else states.split(list(lengths), dim=2)
    return found


class _JointLayer(CacheLayerMixin):  # type: ignore[misc]
    """The same layer of several KV caches."""

    is_compileable = False

    def __init__(self, layers: Sequence[KVLayer], implementation: str, lengths: Lengths) -> None:
        super().__init__()
        self._layers, self._implementation, self._lengths = layers, implementation, lengths
        self.is_sliding, self.is_initialized = layers[0].is_sliding, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("every sequence has a prompt")

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[_JointStates, _JointStates]:
        """Append a token [N, heads, 1, D], row i to cache i; or prompts [1, heads, T, D]."""
        own = zip(self._layers, *(_apart(states, self._lengths) for states in (key_states, value_states)), strict=True)
        pairs = [layer.update(*states) for layer, *states in own]
        keys, values = ([pair[side] for pair in pairs] for side in (0, 1))
        beside = self._implementation, self._lengths
        return _JointStates(keys, *beside), _JointStates(values, *beside)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return max(layer.get_mask_sizes(query_length) for layer in self._layers)

    def get_seq_length(self) -> int:
        return max(layer.get_seq_length() for layer in self._layers)

    def get_max_length(self) -> int:
        return max(layer.get_max_length() for layer in self._layers)


def _attend(
    module: nn.Module, query: Tensor, key: _JointStates, value: _JointStates, mask: object, **options: Any
) -> tuple[Tensor, None]:
    """As transformers calls an attention: query [N, heads, 1, D] to [N, 1, heads, D], or that of prompts,
    [1, heads, T, D], to [1, T, heads, D]."""
    lengths = key.lengths
    if lengths is None and key.implementation in OWN_ATTENTION:
        return attend_to_each(module, query, key.parts, value.parts, **options)
    eager = eager_attention_of(module)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(key.implementation, eager)
    own = list(zip(_apart(query, lengths), key.parts, value.parts, strict=True))
    adds_masks = (attend is eager or key.implementation == SINKS_NAME) and lengths is not None
    masks = [_causal_mask(states[0]) if adds_masks else None for states in own]
    found = [attend(module, *states, mask, **options)[0] for states, mask in zip(own, masks, strict=True)]
    return torch.cat(found, dim=0 if lengths is None else 1), None


def _causal_mask(query: Tensor) -> Tensor:
    """What is added to the scores of a prompt's query [1, heads, T, D]: [1, 1, T, T]. torch's own attention needs none:
    it is causal by itself."""
    tokens, least = query.shape[2], torch.finfo(query.dtype).min
    full = torch.full((1, 1, tokens, tokens), least, dtype=query.dtype, device=query.device)
    return full.triu_(1)


def _no_mask(*_: Any, **__: Any) -> None:
    """A sequence's newest token sees all that its own KV cache gives."""


AttentionInterface.register(_NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _no_mask)


class JointStep:
    """Forwards of several sequences at once, a token or the prompt of each, by `forward`, the stock model's."""

    def __init__(self, model: StockModel, forward: StockForward) -> None:
        self._weak, self._forward = weakref.ref(model), forward
        known = inspect.signature(forward).parameters
        self._knows_positions = "position_ids" in known
        self._checked = False
        self.why_alone = _why_alone(model)
        """Why this model computes one sequence at a time; None where it need not."""
        self.why_prompts_alone = self.why_alone or _why_prompts_alone(model, known)
        """Why prompts pass it one by one; None where they need not."""
        windows = [] if self.why_prompts_alone else windows_of(model.config)
        self._least_window = min((window for window in windows if window is not None), default=None)

    def __call__(self, tokens: Tensor, caches: Sequence[KVCache]) -> Tensor:
        """The logits [N, V] behind `tokens` [N, 1], the next ones of the sequences in `caches`."""
        inputs: dict[str, Any] = {"input_ids": tokens}
        if self._knows_positions:
            lengths = [[cache.get_seq_length()] for cache in caches]
            inputs["position_ids"] = torch.tensor(lengths, dtype=torch.long, device=tokens.device)
        return self._joint(inputs, caches, None)[:, -1]

    def prompts(self, prompts: Sequence[Tensor], caches: Sequence[KVCache]) -> Tensor:
        """The logits [N, V] behind each of `prompts`, [1, T] each, the first tokens of the sequences in `caches`."""
        tokens, lengths = torch.cat(list(prompts), dim=1), [prompt.shape[1] for prompt in prompts]
        numbers = torch.arange(max(lengths), dtype=torch.long, device=tokens.device)
        last = torch.tensor(lengths, dtype=torch.long, device=tokens.device).cumsum(0) - 1
        positions = torch.cat([numbers[:length] for length in lengths])[None]
        inputs = {"input_ids": tokens, "position_ids": positions, "logits_to_keep": last}
        return self._joint(inputs, caches, lengths)[0]

    def _joint(self, inputs: dict[str, Any], caches: Sequence[KVCache], lengths: Lengths) -> Tensor:
        """The logits that a forward over `inputs` gives, [N, 1, V], or [1, N, V] behind prompts."""
        with self._attending_apart() as implementation, one_token_each(inputs["input_ids"]):
            rows = zip(*(cache.layers for cache in caches), strict=True)
            layers = [
                _JointLayer(row, implementation, lengths) if isinstance(row[0], KVLayer) else row[0] for row in rows
            ]
            more = {CACHE: Cache(layers=layers), "use_cache": True, "return_dict": True}
            logits: Tensor = self._forward(**inputs, **more).logits
            return logits

    def fits_windows(self, tokens: int) -> bool:
        """Whether so many tokens of a prompt see each other in every layer: beyond, they need a mask."""
        return self._least_window is None or tokens <= self._least_window

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
        same: an architecture may do more with keys and values than attend to them. Their prompts, too, of two tokens
        and one, for `why_prompts_alone`."""
        if self._checked or self.why_alone is not None:
            return
        self._checked = True
        tokens = torch.tensor([[1], [2]], dtype=torch.long, device=device)
        alone, joint = ([new_cache(), new_cache()] for _ in range(2))

        def steps() -> tuple[Tensor, Tensor]:
            for caches in (alone, joint):
                self._alone(tokens.split(1), caches)
            return self._alone(tokens.split(1), alone), self(tokens, joint)

        def passes() -> tuple[Tensor, Tensor]:
            prompts = [torch.tensor([ids], dtype=torch.long, device=device) for ids in ([1, 2], [3])]
            caches = [new_cache() for _ in range(4)]
            return self._alone(prompts, caches[:2]), self.prompts(prompts, caches[2:])

        self.why_alone = _why_not_same(steps)
        self.why_prompts_alone = self.why_alone or self.why_prompts_alone or _why_not_same(passes)

    def _alone(self, tokens: Sequence[Tensor], caches: Sequence[KVCache]) -> Tensor:
        rows = [self._forward(input_ids=own, **{CACHE: cache}) for own, cache in zip(tokens, caches, strict=True)]
        return torch.cat([row.logits[:, -1] for row in rows])


def _why_not_same(compute: Callable[[], tuple[Tensor, Tensor]]) -> str | None:
    """Why what `compute` gives, the logits of sequences alone and together, is not the same; None if it is."""
    try:
        expected, found = compute()
    except Exception as error:  # whatever an architecture does with what it does not know
        return f"keys and values of several do not pass its attention: {one_line(error)}"
    scale = float(expected.float().abs().max())
    if torch.allclose(found.float(), expected.float(), atol=_CLOSE * scale, rtol=0):
        return None
    return "its layers give other numbers for several sequences than for each of them"


def _why_alone(model: StockModel) -> str | None:
    config = model.config
    if not can_cache(config) or state_kinds(config):
        return f"layers of kind {lasting_kinds(config) or state_kinds(config)} keep states"
    if not model._supports_attention_backend:
        return f"the attention of {config.model_type} is its own"
    return looks_at_length(config)


def _why_prompts_alone(model: StockModel, known: Collection[str]) -> str | None:
    """Of a model that computes several tokens together."""
    lacking = {"position_ids", "logits_to_keep"} - set(known)
    if lacking:
        return f"{model.config.model_type} takes no {' and no '.join(sorted(lacking))}"
    border = rope_border(model.config, type(model))
    if border is not None and border.moving:
        return f"rope kind {border.kind} turns positions by what has passed before"
    return None
